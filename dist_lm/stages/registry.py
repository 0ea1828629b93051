"""The stages by name, and what each needs. Their code is imported only where it runs."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_lm.stages.training_stage import TrainingStage


@dataclass(frozen=True)
class StageInfo:
    """What a plan has to know of a stage."""

    name: str
    trains: bool  # runs on a gang of ranks; otherwise in the launcher's own process, or see `generates`
    needs: tuple[str, ...]  # stages whose artefacts it reads
    starts_from: str | None = None  # stage whose checkpoint it starts from, or asks for samples
    generates: bool = False  # runs on a pool of engines
    in_pipeline: bool = True  # `stage=pipeline` may end with it
    program: str = "dist_lm.ranks.program"  # module whose `run_rank` is what each of its ranks does


# in the order of the pipeline
STAGES = {
    info.name: info
    for info in (
        StageInfo("tokenizer", trains=False, needs=()),
        StageInfo("shards", trains=False, needs=("tokenizer",)),
        StageInfo("language", trains=True, needs=("shards",)),
        StageInfo("code", trains=True, needs=("shards", "language"), starts_from="language"),
        StageInfo("tools", trains=True, needs=("shards", "code"), starts_from="code"),
        # rankings may be of that stage's own samples; not in the pipeline's end until stage rlhf is
        StageInfo("rankings", trains=False, needs=("shards", "tools"), starts_from="tools", in_pipeline=False),
        StageInfo("reward", trains=True, needs=("rankings", "tools"), starts_from="tools", in_pipeline=False),
        StageInfo(
            "rlhf",
            trains=True,
            needs=("shards", "rankings", "tools", "reward"),
            starts_from="tools",
            in_pipeline=False,
            program="dist_lm.ranks.rlhf.program",
        ),
        # takes the newest checkpoint there is, and trains none
        StageInfo("generate", trains=False, needs=(), generates=True, in_pipeline=False),
    )
}


def training_stage(name: str) -> "TrainingStage":
    """The objective and closing report of a training stage."""
    return importlib.import_module(f"dist_lm.stages.{name}").STAGE
