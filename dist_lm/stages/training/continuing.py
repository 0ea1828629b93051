"""Runs that go on under another schedule: with more steps, or as a branch of another run of the same stage.

`stage.init_from` gives a run only weights: it begins at step 0, at the beginning of the data, with a new optimizer.
`stage.branch_from` gives it the whole state of a checkpoint, so only the schedule may differ from the run before.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lm.config.root import Config
from dist_lm.config.stage import WSD, StageConfig
from dist_lm.data.manifest import manifest_path, read_manifest
from dist_lm.errors import ArtefactError, ConfigError, require
from dist_lm.stages.registry import load_config
from dist_lm.stages.stage import run_of
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.training import checkpoint_files

if TYPE_CHECKING:
    from dist_lm.stages.training.stage import TrainingStage

# what a branch may set anew besides the schedule: its name, and what is measured on the way
OWN_KEYS = ("run_id", "stage.eval_", "stage.sampling.")


def first_other_rate(before: StageConfig, after: StageConfig, steps: int) -> int | None:
    """The first of `steps` 0-based steps whose learning rate or momentum of Muon differs between two schedules; None if
    there is none."""
    from dist_lm.training.optimizer import muon_momentum, stage_rate

    def at(stage: StageConfig, step: int) -> tuple[float, float]:
        return stage_rate(stage, step), muon_momentum(stage, step)

    return next((step for step in range(steps) if at(before, step) != at(after, step)), None)


def without_schedule(
    conflicts: list[str], keys: tuple[str, ...], run: RunDirectory, old: Config, new: Config
) -> list[str]:
    """`conflicts` of a begun run without those of its schedule, if all steps so far keep their learning rates.

    Args:
        conflicts: `key=new (was old)`.
        keys: that belong to the schedule.

    Raises:
        ConfigError: the schedule is the only conflict and changes steps so far; the message names the first one.
    """
    scheduled = [conflict for conflict in conflicts if conflict.startswith(keys)]
    others = [conflict for conflict in conflicts if conflict not in scheduled]
    taken = checkpoint_files.newest_step(run.checkpoints)
    other = first_other_rate(old.stage, new.stage, taken)
    if other is None and new.stage.steps > taken:
        return others
    if others:
        return conflicts
    reason = f"it has taken {taken} steps"
    if other is not None:
        reason += (
            f", and step {other + 1} would have had another rate or momentum with stage.schedule={new.stage.schedule}"
        )
    raise ConfigError(
        f"{run.path} exists with other settings: {'; '.join(scheduled)}: {reason}. Give the same values; or branch "
        f"from one of its checkpoints: stage={new.stage.name} stage.branch_from={run.path}@STEP and another run_id. A "
        f"run of stage.schedule={WSD} can go on with more steps until its decay begins"
    )


def with_branch(config: Config) -> Config:
    """`config` with stage.branch_from as an absolute path, and stage.init_from of the run that it names."""
    place = Path(config.stage.branch_from).expanduser().resolve()
    run = _run_at(place)
    start = load_config(run.config).stage.init_from if run and run.config.is_file() else "none"
    return replace(config, stage=replace(config.stage, branch_from=str(place), init_from=start))


def check_branch(stage: "TrainingStage", config: Config) -> Path:
    """The checkpoint of stage.branch_from, after comparing its run with `config`.

    Raises:
        ArtefactError: there is no checkpoint, or it belongs to another model, tokenizer or content.
        ConfigError: the run belongs to another stage, or differs in more than its schedule.
    """
    given = config.stage.branch_from
    start = checkpoint_files.find_checkpoint(Path(given))
    run = _run_at(start) if start.parent.name == "checkpoints" else None
    before = load_config(run.config) if run and run.config.is_file() else None
    if run is None or before is None or before.stage.name != config.stage.name:
        found = f"a run of stage={before.stage.name}" if before else "a checkpoint without its run"
        raise ConfigError(
            f"stage.branch_from={given}: {found}; expected RUN@STEP of stage={config.stage.name}: a branch continues a "
            "run. stage.init_from begins a run with the weights of any checkpoint"
        )
    state, saved_model = checkpoint_files.read_state(start)
    checkpoint_files.check_same_model(start, saved_model, config.model)
    own = run_of(config)
    if own.work.tokenizer_model.exists():
        checkpoint_files.check_tokenizer(start, state, durable.sha256_of(own.work.tokenizer_model))
    from dist_lm.stages.training.stage import differing_keys

    differing = differing_keys(before, config, "", (*stage.free_keys, *stage.schedule_keys, *OWN_KEYS))
    if differing:
        raise ConfigError(
            f"stage.branch_from={given}: its run has other settings: {'; '.join(differing)}: a branch changes only the "
            f"schedule ({', '.join(stage.schedule_keys)}). stage.init_from begins a run with the "
            "weights alone"
        )
    accepted = f"more than {state.step}, the steps of {given}"
    require(config.stage.steps > state.step, "stage.steps", config.stage.steps, accepted)
    left = config.stage.steps - state.step
    accepted = f"at most {left}: the branch begins at step {state.step} of {config.stage.steps}"
    require(config.stage.decay_steps <= left, "stage.decay_steps", config.stage.decay_steps, accepted)
    require_same_content(start, own, config.streams)
    return start


def require_same_content(start: Path, own: RunDirectory, corpora: Sequence[str]) -> None:
    """Refuse to continue from a checkpoint on other content than its run trained on. Missing corpora are not compared.

    Raises:
        ArtefactError: names the corpus.
    """
    run = _run_at(start)
    assert run is not None, f"{start} lies in no run"
    recorded = durable.read_json(run.corpora)
    for name in corpora:
        directory = own.work.corpus(name)
        if manifest_path(directory).is_file() and read_manifest(directory).content != recorded.get(name):
            raise ArtefactError(
                f"{run.path} was trained on other content of corpus {name} than {directory} holds: a branch continues "
                "at its place in the data: restore that corpus, or begin with the weights alone (stage.init_from)"
            )


def _run_at(place: Path) -> RunDirectory | None:
    """The run that a checkpoint, a folder of checkpoints, a run or RUN@STEP belongs to."""
    name, at, step = str(place).rpartition("@")
    if at and step.isdecimal() and not place.exists():
        place = Path(name)
    candidates = (place, place.parent, place.parents[1]) if len(place.parents) > 1 else ()
    return next((RunDirectory(path) for path in candidates if (path / "checkpoints").is_dir()), None)
