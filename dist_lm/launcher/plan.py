"""Which stages run, from which artefacts, with what is missing: computed and shown before anything starts."""

import importlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from dist_lm.config.file import load_config
from dist_lm.config.generate import GenerateRunConfig
from dist_lm.config.model import ModelConfig
from dist_lm.config.rlhf_run import AUTO, RlhfRunConfig, check_reward_model, with_reward_run
from dist_lm.config.root import Config
from dist_lm.data.corpus import form_of
from dist_lm.data.prompts import find_prompts
from dist_lm.errors import ConfigError
from dist_lm.stages.registry import STAGES, StageInfo
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.readable import counted
from dist_lm.training import checkpoint_files

# what may change between two commands on one run: where it runs and how it is watched, not what it computes
FREE_KEYS = (
    "work_dir",
    "prerequisites",
    "dry_run",
    "device",
    "parallel.auto",
    "parallel.dp_replicate",
    "parallel.dp_shard",
    "parallel.tp",
    "parallel.sp",
    "parallel.reshard_after_forward",
    "parallel.reduce_every_micro_batch",
    "parallel.activation_checkpointing",
    "parallel.compile",
    "parallel.cpu_offload",
    "parallel.loss_chunk_mib",
    "hardware.",
    "cluster.",
    "tracking.",
    "tokenizer.workers",
    "stage.init_from",
    "stage.micro_batch",
    "stage.checkpoint_every",
    "stage.checkpoint_async",
    "stage.keep_checkpoints",
    "stage.log_every",
    "stage.max_nonfinite_steps",
    "stage.actors",
    "rlhf.reward_model",
    "rlhf.pool.",
    "rlhf.micro_batch_tokens",
    "rlhf.table_rollouts",
    "rlhf.max_nonfinite_updates",
    "stage.max_sequences",
)
SHARDS, RANKINGS = "shards", "rankings"
PREDICT_TOKENS = ("language", "code", "tools")
# what answers depend on
GENERATION_KEYS = ("seed", "model.", "stage.", "parallel.compute_dtype", "parallel.tp")
GENERATION_FREE_KEYS = tuple(key for key in FREE_KEYS if key not in GENERATION_KEYS)


class Action(Enum):
    """What the plan does about a stage."""

    READY = "there"
    BUILD = "build"
    RESUME = "continue"


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan."""

    info: StageInfo
    config: Config
    action: Action
    detail: str


@dataclass(frozen=True)
class Plan:
    """Stages in the order they run; the last is the one asked for."""

    stages: tuple[PlannedStage, ...]

    @property
    def missing(self) -> tuple[PlannedStage, ...]:
        return tuple(stage for stage in self.stages if stage.action is not Action.READY)


def make_plan(target: str, compose: Callable[[str], Config]) -> Plan:
    """Look at the work directory and decide about `target` and everything it needs.

    Args:
        compose: the configuration of a stage, by its name.

    Raises:
        ConfigError: a run exists with other settings than asked for, or prerequisites=fail and one is missing.
        ArtefactError: something there belongs to something else.
    """
    # a start that was given makes the stage before unnecessary
    asked = compose(target)
    start_given = STAGES[target].starts_from is not None and asked.stage.init_from != "auto"
    needed = in_order(target, without=STAGES[target].starts_from if start_given else None, spared=asked.not_needed)
    configs = {name: compose(name) for name in needed}
    if target != RANKINGS and RANKINGS in configs:
        configs[RANKINGS] = for_readers(
            configs[RANKINGS],
            [c for n, c in configs.items() if RANKINGS in STAGES[n].needs and RANKINGS not in c.not_needed],
        )
    if target != SHARDS and SHARDS in configs:
        configs[SHARDS] = for_stages(configs[SHARDS], list(configs.values()))
    rebuilt: set[str] = set()
    planned = []
    for name, config in configs.items():
        if name in PREDICT_TOKENS:
            refuse_rankings(config)
        if isinstance(config, RlhfRunConfig):
            refuse_texts(config)
        stage = _look_at(STAGES[name], config, rebuilt, is_target=name == target)
        if stage.action is not Action.READY:
            rebuilt.add(name)
        planned.append(stage)
    missing = [stage.info.name for stage in planned[:-1] if stage.action is not Action.READY]
    if missing and planned[-1].config.prerequisites == "fail":
        commands = ", then ".join(f"`python -m dist_lm.launch stage={name}`" for name in missing)
        raise ConfigError(f"prerequisites=fail: stage={target} needs {', '.join(missing)} first: run {commands}")
    return Plan(tuple(planned))


def refuse_rankings(config: Config) -> None:
    """Refuse rankings where next tokens are predicted: the worst completions would be learned as the best are.

    Raises:
        ConfigError: names the key.
    """
    stage = config.stage
    mixed = [("stage.mix", name) for name in stage.mix or {}]
    for key, name in (("stage.corpus", stage.corpus), *mixed):
        if name and form_of(config.corpus, name) == "ranking":
            raise ConfigError(f"{key}={name}: expected texts or conversations; stage=reward learns from rankings")


def refuse_texts(config: RlhfRunConfig) -> None:
    """Refuse texts where prompts are asked for: nobody is to answer in them.

    Raises:
        ConfigError: names the key.
    """
    prompted = [name for name in config.corpus.corpora if form_of(config.corpus, name) != "text"]
    if not config.rlhf.prompts_from and config.stage.corpus not in prompted:
        raise ConfigError(
            f"stage.corpus={config.stage.corpus}: expected conversations or rankings, whose prompts are answered "
            f"({', '.join(prompted)}); or give rlhf.prompts_from=FILE"
        )


def for_stages(shards: Config, stages: Sequence[Config]) -> Config:
    """The configuration of stage `shards` that builds what `stages` read, and no other corpus."""
    read = {name for config in stages for name in config.streams}
    return replace(shards, stage=replace(shards.stage, corpora=sorted(read)))


def for_readers(rankings: Config, readers: Sequence[Config]) -> Config:
    """The configuration of stage `rankings` that builds what `readers` read; the model they start from is sampled."""
    corpora = sorted({config.stage.corpus for config in readers if config.stage.corpus})
    return replace(rankings, stage=replace(rankings.stage, corpora=corpora, init_from=readers[0].stage.init_from))


def in_order(target: str, without: str | None = None, spared: Collection[str] = ()) -> list[str]:
    """`target` and every stage it needs (apart from `without`), each after those it needs itself.

    Args:
        spared: what `target` itself does not need, as it is configured; stages before it may.
    """
    order: list[str] = []

    def visit(name: str) -> None:
        for need in STAGES[name].needs:
            if need != without and not (name == target and need in spared):
                visit(need)
        if name not in order:
            order.append(name)

    visit(target)
    return order


def _look_at(info: StageInfo, config: Config, rebuilt: set[str], is_target: bool) -> PlannedStage:
    if info.trains:
        return _look_at_run(info, config, rebuilt, is_target)
    if isinstance(config, GenerateRunConfig):
        return _look_at_generation(info, config)
    if info.starts_from:
        config = replace(config, stage=replace(config.stage, init_from=_starting_point(info, config)))
    artefact = importlib.import_module(f"dist_lm.stages.{info.name}").inspect(config)
    return PlannedStage(info, config, Action.READY if artefact.ready else Action.BUILD, artefact.detail)


def _look_at_run(info: StageInfo, config: Config, rebuilt: set[str], is_target: bool) -> PlannedStage:
    run = run_of(config)
    config = replace(config, stage=replace(config.stage, init_from=_starting_point(info, config)))
    if isinstance(config, RlhfRunConfig):
        if not run.result.exists():
            _check_given(config)
        config = with_reward_run(config)
    if run.config.exists() and has_output(run):
        # of a finished earlier stage only its weights are used, however they were trained
        keys = "" if is_target or not run.result.exists() else "model."
        conflicts = differing_keys(load_config(run.config), config, keys)
        if not is_target:
            conflicts = [conflict.replace("stage.", f"stages.{info.name}.") for conflict in conflicts]
        _refuse_other_settings(run, config, conflicts)
    if run.result.exists():
        result = json.loads(run.result.read_text())
        return PlannedStage(info, config, Action.READY, f"{result['steps']:,} steps, {_shown(run.path, config)}")
    latest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
    if latest:
        return PlannedStage(info, config, Action.RESUME, f"from {latest.name} to step {config.stage.steps:,}")
    origin = f" from the {info.starts_from} checkpoint" if info.starts_from in rebuilt else ""
    if config.stage.init_from != "none" and not origin:
        start = checkpoint_files.find_checkpoint(Path(config.stage.init_from))
        checkpoint_files.check_start(start, checkpoint_files.read_state(start)[1], config.model)
        origin = f" from {_shown(start, config)}"
    return PlannedStage(info, config, Action.BUILD, f"{config.stage.steps:,} steps{origin}")


def _check_given(config: RlhfRunConfig) -> None:
    """Refuse prompts, functions and a reward model that were named and are not there, or are something else."""
    from dist_lm.stages import rlhf

    group = config.rlhf
    rlhf.check_given(group)
    if group.asks_reward_model and group.reward_model != AUTO:
        found = checkpoint_files.find_checkpoint(Path(group.reward_model).expanduser())
        check_reward_model(config, ModelConfig(**checkpoint_files.read_state(found)[1]))


def _shown(path: Path, config: Config) -> str:
    """A path as the plan has it: from the work directory on, which stands above it."""
    work = Path(config.work_dir)
    return str(path.relative_to(work) if path.is_relative_to(work) else path)


def _look_at_generation(info: StageInfo, config: GenerateRunConfig) -> PlannedStage:
    from dist_lm.stages import generate

    run = run_of(config)
    generate.params_of(config.stage)
    generate.check_tokens(config.stage, config.model)
    generate.tp_of(config)
    if files := find_prompts(config.stage.prompts):  # none yet of an address
        generate.check_inputs(files, config.stage, run)
    begun = load_config(run.config) if run.inputs.exists() else None
    before = Path(begun.stage.checkpoint) if isinstance(begun, GenerateRunConfig) else None
    if run.result.exists() and before:  # its checkpoint is not needed any more
        start = before if config.stage.checkpoint == generate.AUTO else generate.find_start(config, before)
    else:
        start = generate.find_start(config, before)
        generate.tokenizer_of(config, start)
    config = replace(config, stage=replace(config.stage, checkpoint=str(start)))
    if begun:
        found = (one for key in GENERATION_KEYS for one in differing_keys(begun, config, key, GENERATION_FREE_KEYS))
        _refuse_other_settings(run, config, list(found))
    if run.result.exists():
        result = json.loads(run.result.read_text())
        return PlannedStage(
            info, config, Action.READY, f"{counted(result['answers'], 'answer')}, {_shown(run.samples, config)}"
        )
    parts = len(list(run.samples.glob("part-*.jsonl")))
    detail = f"{config.stage.prompts} with {generate.label_of(start)}, {generate.sampling_text(config.stage)}"
    if parts:
        return PlannedStage(info, config, Action.RESUME, f"{detail}; {counted(parts, 'file')} there")
    return PlannedStage(info, config, Action.BUILD, detail)


def _refuse_other_settings(run: RunDirectory, config: Config, conflicts: list[str]) -> None:
    if conflicts:
        raise ConfigError(
            f"{run.path} exists with other settings: {'; '.join(conflicts)}: "
            f"give them the same values, or choose another run_id than {config.run_id}"
        )


def has_output(run: RunDirectory) -> bool:
    """Whether a run has anything that other settings would contradict: a checkpoint or its result."""
    return run.result.exists() or checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST) is not None


def run_of(config: Config) -> RunDirectory:
    """The run directory that a configuration belongs to."""
    return WorkDirectory(Path(config.work_dir)).run(config.stage.name, config.run_id)


def _starting_point(info: StageInfo, config: Config) -> str:
    """`stage.init_from` as `none` or a path: auto is the run of the stage before, under the same run_id."""
    if config.stage.init_from != "auto":
        return config.stage.init_from
    if info.starts_from is None:
        return "none"
    # absolute: ranks may run in another folder
    return str(WorkDirectory(Path(config.work_dir).resolve()).run(info.starts_from, config.run_id).path)


def differing_keys(old: Config, new: Config, prefix: str = "", free: tuple[str, ...] = FREE_KEYS) -> list[str]:
    """`key=new (was old)` for every key, of those that start with `prefix`, whose change would make one run compute
    two things."""
    return [
        f"{key}={after} (was {before})"
        for key, before, after in _differences(asdict(old), asdict(new))
        if key.startswith(prefix) and not key.startswith(free)
    ]


def _differences(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, before, after) of what differs; a mapping that only one of them has is one difference."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(name), after.get(name), f"{key}.{name}".removeprefix("."))
    elif before != after:
        yield key, before, after
