"""Stage `generate`: reads prompts and a checkpoint, writes work/runs/generate/RUN_ID/samples/part-*.jsonl.

This module has the keys and the checks before anything starts: the checkpoint, the sampling parameters, and whether the
prompts are those that the run began with. `parts.py` makes requests and writes answers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from dist_lm.config.pool import EngineConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import SamplingConfig, StageGroup
from dist_lm.data.prompts import find_prompts
from dist_lm.errors import ArtefactError, require
from dist_lm.stages.continuing import ANSWER_FREE_KEYS, ANSWER_KEYS, differing_keys, refuse_other_settings
from dist_lm.stages.generate.inputs import check_checkpoint, check_inputs, label_of
from dist_lm.stages.registry import load_config
from dist_lm.stages.stage import Action, Look, PoolStage, PoolWork, run_of, shown_path
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.readable import counted
from dist_lm.training import checkpoint_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from dist_lm.generation.engine_options import EngineOptions
    from dist_lm.sandbox.pool import Sandboxes
    from dist_lm.tokenizer.tokenizer import Tokenizer
    from dist_lm.tracking.console import Console

AUTO = "auto"
FROM = ("code", "language")  # stage.checkpoint=auto takes the first of these stages that has a checkpoint


@dataclass
class GenerateConfig(SamplingConfig, EngineConfig, StageGroup):
    """Prompts, checkpoint, sampling parameters and size of the engines.

    `SamplingParams` and `EngineOptions` check the bounds of their parameters before anything starts.
    """

    prompts: str = ""  # file or glob: .jsonl (`prompt`, optionally `id` and `suffix`), or .txt (a prompt per line)
    checkpoint: str = AUTO  # run or checkpoint; auto: the newest of the code stage, else of the language stage
    chat: bool = (
        False  # a prompt is the turn of a user, in the model's layout of conversations, and the answer its turn
    )
    n: int = 1  # answers per prompt
    prompts_per_shard: int = 1000  # prompts per output file; after a kill an unfinished file is generated again
    truncate: str = "refuse"  # a prompt that fills the context: refuse | left (cut off its beginning, of plain text)
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0  # taken from the logits of tokens that the answer has already; 0: off
    frequency_penalty: float = 0.0  # the same, for each time that the answer has the token
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> added to its logit
    stop: list[str] = field(default_factory=list)  # texts that end an answer
    stop_tokens: list[int] = field(default_factory=list)  # beside end-of-text
    ignore_eot: bool = False  # end-of-text does not end an answer

    def __post_init__(self) -> None:
        for key in ("n", "prompts_per_shard"):
            require(getattr(self, key) > 0, f"stage.{key}", getattr(self, key), "a positive integer")
        self.check_actors("stage")
        require(self.truncate in ("refuse", "left"), "stage.truncate", self.truncate, "refuse or left")
        require(bool(self.checkpoint), "stage.checkpoint", self.checkpoint, "auto, or the path of a run or checkpoint")


@dataclass
class GenerateRunConfig(Config):
    """The whole configuration of stage `generate`."""

    stage: GenerateConfig = MISSING


class Generate(PoolStage):
    name = "generate"
    result_kinds = {"answers": int, "tokens": int}  # noqa: RUF012
    schema = GenerateRunConfig

    def look(self, config: Config, *, is_target: bool, rebuilt: Collection[str]) -> Look:
        """Returns what is there of the run and what is to do, with the path of the checkpoint in `stage.checkpoint`.

        Raises:
            ConfigError: settings that no engine can run with, no prompts, or a run that exists with other settings.
            ArtefactError: the checkpoint is missing or does not fit, or prompts or weights changed since the run began.
            OSError: a file cannot be read.
            UserError: the package `tokenizers` is needed and not installed.
        """
        from dist_lm.stages.generate import parts as generate_parts

        config, run = generate_config(config), run_of(config)
        generate_parts.check(config)
        check_inputs(find_prompts(config.stage.prompts), config.stage, run)

        # The checkpoint that the run began with, else the one that the command names.
        recorded = recorded_checkpoint = None
        if run.inputs.exists():
            recorded = generate_config(load_config(run.config))
            recorded_checkpoint = Path(recorded.stage.checkpoint)
        if run.result.exists() and recorded_checkpoint and config.stage.checkpoint == AUTO:
            # It may have been removed since the run was finished.
            start = recorded_checkpoint
        else:
            start = find_start(config, recorded_checkpoint)
        if not (run.result.exists() and recorded_checkpoint):
            check_checkpoint(start, run)
        config = replace(config, stage=replace(config.stage, checkpoint=str(start)))
        if not run.result.exists():
            # Refused before anything starts.
            self.tokenizer(config)

        if recorded:
            conflicts = [
                conflict for key in ANSWER_KEYS for conflict in differing_keys(recorded, config, key, ANSWER_FREE_KEYS)
            ]
            refuse_other_settings(run, config, conflicts)
        if run.result.exists():
            answers = self.read_result(run)["answers"]
            return Look(config, Action.READY, f"{counted(answers, 'answer')}, {shown_path(run.samples, config)}")

        n_parts = len(list(run.samples.glob("part-*.jsonl")))
        detail = f"{config.stage.prompts} with {label_of(start)}, {sampling_text(config.stage)}"
        if n_parts:
            return Look(config, Action.RESUME, f"{detail}; {counted(n_parts, 'file')} there")
        return Look(config, Action.BUILD, detail)

    def checkpoint(self, config: Config) -> Path:
        return Path(generate_config(config).stage.checkpoint)

    def tokenizer(self, config: Config) -> "Tokenizer":
        from dist_lm.generation.load import stage_tokenizer

        return stage_tokenizer(self.checkpoint(config), WorkDirectory(Path(config.work_dir)), config.model.vocab_size)

    def engine(self, config: Config) -> "tuple[EngineOptions, int, int]":
        from dist_lm.stages.generate import parts as generate_parts

        config = generate_config(config)
        return generate_parts.options_of(config.stage), generate_parts.tp_of(config), config.stage.actors

    def work(
        self, config: Config, run: RunDirectory, tokenizer: "Tokenizer", sandboxes: "Callable[[], Sandboxes]"
    ) -> PoolWork:
        from dist_lm.stages.generate.parts import Samples

        return Samples(generate_config(config), run, tokenizer)

    def summarize(self, config: Config, console: "Console") -> None:
        """Prints the number of answers and their folder.

        Raises:
            ArtefactError: a file is damaged.
        """
        run = run_of(config)
        result = self.read_result(run)
        console.summary(
            "stage=generate is done",
            {
                "answers": f"{result['answers']:,} to {counted(result['prompts'], 'prompt')}, {refused_text(result)}",
                "tokens": f"{result['tokens']:,}, {result['tokens_per_s']:,.0f} a second "
                f"on {counted(result['actors'], 'actor')}",
                "checkpoint": result["checkpoint"],
                "samples": f"{run.samples} ({counted(result['parts'], 'file')})",
            },
        )

    def rejection(self, config: Config) -> str:
        result = self.read_result(run_of(config))
        if result["answers"]:
            return ""
        prompts = generate_config(config).stage.prompts
        return f"stage.prompts={prompts}: no prompt was answered, {refused_text(result)}"

    def figures(self, result: Mapping[str, Any]) -> str:
        return f"{result['answers']:,} answers, {result['tokens']:,} tokens" if result else ""


def generate_config(config: Config) -> GenerateRunConfig:
    """`config` with the type of this stage."""
    assert isinstance(config, GenerateRunConfig)
    return config


def refused_text(result: Mapping[str, Any]) -> str:
    """Returns the number of refused prompts and the first reason."""
    first_reason = result.get("first_refusal")
    return f"{result['refused']:,} refused" + (f": {first_reason}" if first_reason else "")


def sampling_text(stage: GenerateConfig) -> str:
    """Returns sampling parameters as text, `KEY=VALUE` with blanks between: the usual ones, and others that differ from
    their default.
    """
    from dist_lm.stages.generate.parts import sampling_keys

    usual_keys = ("temperature", "top_k", "top_p", "max_new_tokens", "n")
    defaults = GenerateConfig(name="")
    other_keys = [key for key in sampling_keys() if key not in usual_keys]
    changed_keys = [key for key in other_keys if getattr(stage, key) != getattr(defaults, key)]

    texts = []
    for key in (*usual_keys, *changed_keys):
        setting = getattr(stage, key)
        texts.append(f"{key}={setting:g}" if isinstance(setting, float) else f"{key}={setting}")
    return " ".join(texts)


def find_start(config: GenerateRunConfig, before: Path | None) -> Path:
    """Returns the absolute path of the checkpoint to generate from.

    Args:
        before: checkpoint that the run began with; it is kept unless stage.checkpoint names another one.

    Raises:
        ArtefactError: there is no checkpoint, or it belongs to another model.
    """
    path = None if config.stage.checkpoint == AUTO else Path(config.stage.checkpoint).expanduser().resolve()
    if before and (path is None or before.is_relative_to(path)):
        checkpoint = before
        if not before.is_dir():
            raise ArtefactError(f"{before}: this run began with this checkpoint, which is gone: choose another run_id")
    else:
        run_path = path or newest_run(WorkDirectory(Path(config.work_dir).resolve())).path
        checkpoint = checkpoint_files.find_checkpoint(run_path)

    model = checkpoint_files.read_state(checkpoint)[1]
    checkpoint_files.check_same_model(checkpoint, model, config.model, "use the same model")
    return checkpoint


def newest_run(work: WorkDirectory, key: str = "stage.checkpoint", value: str = "PATH") -> RunDirectory:
    """Returns the run with the newest checkpoint of the code stage, else of the language stage; newest by its time of
    writing.

    Args:
        key: the key that asks for it, for messages.
        value: placeholder for what `key` may name instead.

    Raises:
        ArtefactError: neither stage has a checkpoint.
    """
    # Models of the later stage know more, so they are preferred.
    for stage in FROM:
        latest_of = {
            run: checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST) for run in work.runs(stage)
        }
        written_at = {run: checkpoint.stat().st_mtime for run, checkpoint in latest_of.items() if checkpoint}
        if written_at:
            return max(written_at, key=written_at.__getitem__)
    raise ArtefactError(
        f"{key}=auto: no checkpoint of stage {' or '.join(FROM)} in {work.path}: "
        f"run `python -m dist_lm.launch stage=code` first, or give {key}={value}"
    )


STAGE = Generate()
