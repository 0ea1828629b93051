"""Settings that may change when a run continues, for all stages: free keys, the schedule, branches of another run.

A run continues under the settings that its `config.yaml` records. A changed setting is refused and the error names the
key, unless it is one of these:

- `FREE_KEYS` and the additions of a stage: placement, tracking and the like, which do not change results.
- `SCHEDULE_KEYS`: they may change as long as all steps so far keep their learning rates, and their mix of corpora.

`stage.init_from` gives a run only weights: it begins at step 0, at the beginning of the data, with a new optimizer.
`stage.branch_from` gives it the whole state of a checkpoint, so only the schedule may differ from the run before.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lm.config.corpus import HF, STAGE_RUN
from dist_lm.config.root import Config
from dist_lm.config.stage import WSD, StageConfig
from dist_lm.data.manifest import Split, manifest_path, read_manifest, recorded_content
from dist_lm.data.order import DocumentSlice
from dist_lm.data.phases import require_same_past
from dist_lm.errors import ArtefactError, ConfigError, require
from dist_lm.stages.registry import load_config
from dist_lm.stages.stage import IMPORT, Stage, run_of
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint_files
from dist_lm.training.state import TrainState

if TYPE_CHECKING:
    from dist_lm.data.without import DocumentIds
    from dist_lm.stages.training.arguments import TrainingSequences
    from dist_lm.stages.training.stage import TrainingStage

# Keys that do not change the result of any stage. A key that ends with a dot stands for its whole group.
FREE_KEYS = (
    *("work_dir", "prerequisites", "dry_run", "device", "sandbox", "hardware.", "cluster.", "tracking.", "profile."),
    *("tokenizer.source", "tokenizer.add_marks", "tokenizer.train_bytes", "tokenizer.workers"),
    "corpus.",  # the content of corpora is compared by its hash
    *("parallel.auto", "parallel.dp_replicate", "parallel.dp_shard", "parallel.tp", "parallel.cp", "parallel.sp"),
    *("parallel.reshard_after_forward", "parallel.reduce_every_micro_batch", "parallel.activation_checkpointing"),
    *("parallel.compile", "parallel.cpu_offload", "parallel.loss_chunk_mib"),
    *("stage.init_from", "stage.branch_from", "stage.micro_batch", "stage.checkpoint_every", "stage.checkpoint_async"),
    *("stage.keep_checkpoints", "stage.log_every", "stage.max_nonfinite_steps"),
    *("stage.eval_tasks", "stage.eval_new_tokens", "stage.max_epochs", "eval."),
)
# Keys that are also free in stage rlhf.
RLHF_FREE_KEYS = (
    *("rlhf.reward_model", "rlhf.pool.", "rlhf.micro_batch_tokens", "rlhf.table_rollouts"),
    *("rlhf.max_nonfinite_updates", "rlhf.max_failed_fraction", "rlhf.environments_at_once"),
    *("rlhf.keep_conversations", "rlhf.controller"),
    *("rlhf.rewards.*.timeout_s", "rlhf.rewards.*.workers"),
)
# Stages generate and evaluate compare only the keys that their answers depend on; all others are free.
ANSWER_KEYS = ("seed", "model.", "stage.", "parallel.compute_dtype", "parallel.tp")
ANSWER_FREE_KEYS = (
    *(key for key in FREE_KEYS if key not in ANSWER_KEYS),
    "stage.actors",
    "stage.max_sequences",
    "stage.step_tokens",
)
EVALUATION_KEYS = (*ANSWER_KEYS, "eval.")
EVALUATION_FREE_KEYS = (
    *(key for key in ANSWER_FREE_KEYS if key not in EVALUATION_KEYS),
    *("stage.cache_tokens", "eval.pool."),
)
# A change of the schedule is refused only if it changes the learning rate or the mix of a step that was taken.
SCHEDULE_KEYS = (
    *("stage.steps", "stage.epochs", "stage.schedule", "stage.decay", "stage.min_lr_ratio"),
    "stage.phases",
)
# Besides the schedule, a branch has its own name and its own measurements, and may leave out documents that its start
# has not read.
BRANCH_KEYS = ("run_id", "stage.eval_", "stage.sampling.", "stage.without")


def require_same_settings(
    stage: "TrainingStage", run: RunDirectory, config: Config, *, finished: bool, is_target: bool
) -> None:
    """Refuses to continue a run of a training stage with other settings than it records; returns nothing.

    A run without a checkpoint and without a result passes. Keys in `free_keys` of the stage may differ, and those of
    the schedule if all steps so far keep their learning rates and momenta and there are more steps to take. Of a
    finished run that the command builds on the way only `model` is compared.

    Args:
        finished: whether the run has all its steps.
        is_target: whether the command names the stage, or builds it on the way.

    Raises:
        ConfigError: names the run and each key as the command gives it (`stage.KEY` or `stages.NAME.KEY`), or a phase
            that has begun and would change; or this version cannot read what the run records.
        ArtefactError: the phases differ, and the newest checkpoint or a corpus is damaged.
    """
    # Without output there is nothing that other settings would contradict.
    if not (run.config.exists() and has_output(run)):
        return
    recorded = load_config(run.config)

    # A later stage uses only the weights of a finished run, so only the model must be the same.
    compared = "model." if finished and not is_target else ""
    prefix = "stage." if is_target else f"stages.{stage.name}."
    conflicts = [
        conflict.replace("stage.", prefix, 1)
        for conflict in differing_keys(recorded, config, compared, stage.free_keys)
    ]

    schedule_keys = tuple(key.replace("stage.", prefix) for key in stage.schedule_keys)
    if any(conflict.startswith(schedule_keys) for conflict in conflicts):
        latest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
        if latest and (recorded.stage.phases or config.stage.phases):
            check_phases_of_past(stage, config, run.path, checkpoint_files.read_state(latest)[0])
        conflicts = without_schedule(conflicts, schedule_keys, run, recorded, config)
    refuse_other_settings(run, config, conflicts)


def has_output(run: RunDirectory) -> bool:
    """Returns whether a run has a checkpoint or a result, which other settings would contradict."""
    return run.result.exists() or checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST) is not None


def refuse_other_settings(run: RunDirectory, config: Config, conflicts: list[str]) -> None:
    """Refuses to continue a run with other settings; passes without `conflicts`.

    Raises:
        ConfigError: names the run and each key.
    """
    if conflicts:
        raise ConfigError(
            f"{run.path} exists with other settings: {'; '.join(conflicts)}: "
            f"give them the same values, or choose another run_id than {config.run_id}"
        )


def differing_keys(old: Config, new: Config, prefix: str, free: tuple[str, ...]) -> list[str]:
    """Returns `key=new (was old)` for every key that starts with `prefix`, differs, and is not in `free`.

    Args:
        free: beginnings of keys; * stands for any text.
    """
    return [
        f"{key}={_shown(after)} (was {_shown(before)})"
        for key, before, after in _differences(asdict(old), asdict(new))
        if key.startswith(prefix) and not any(fnmatchcase(key, f"{free_key}*") for free_key in free)
    ]


def _shown(value: Any) -> str:
    """Returns a value for people; an empty text has quotes."""
    return str(value) or "''"


def _differences(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (key, before, after) for each difference. A mapping on one side only is one difference."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(name), after.get(name), f"{key}.{name}".removeprefix("."))
    elif before != after:
        yield key, before, after


# --- the schedule ---


def without_schedule(
    conflicts: list[str], keys: tuple[str, ...], run: RunDirectory, old: Config, new: Config
) -> list[str]:
    """Returns `conflicts` of a begun run without those of its schedule, if all steps so far keep their learning rates
    and momenta and there are more steps to take.

    If not, and there are other conflicts too, all are returned.

    Args:
        conflicts: `key=new (was old)`.
        keys: beginnings of the keys that belong to the schedule.

    Raises:
        ConfigError: the schedule is the only conflict, and changes steps so far (the message names the first one) or
            leaves no step.
    """
    schedule_conflicts = [conflict for conflict in conflicts if conflict.startswith(keys)]
    other_conflicts = [conflict for conflict in conflicts if conflict not in schedule_conflicts]

    steps_taken = checkpoint_files.newest_step(run.checkpoints)
    changed_step = first_other_rate(old.stage, new.stage, steps_taken)
    if changed_step is None and new.stage.steps > steps_taken:
        return other_conflicts
    if other_conflicts:
        return conflicts

    reason = f"it has taken {steps_taken} steps"
    if changed_step is not None:
        reason += (
            f", and step {changed_step + 1} would have had another rate or momentum with "
            f"stage.schedule={new.stage.schedule}"
        )
    raise ConfigError(
        f"{run.path} exists with other settings: {'; '.join(schedule_conflicts)}: {reason}. Give the same values, "
        f"choose another run_id than {new.run_id}, or branch from one of its checkpoints: stage={new.stage.name} "
        f"stage.branch_from={run.path}@STEP and another run_id. A run of stage.schedule={WSD} can go on with more "
        "steps until its decay begins"
    )


def first_other_rate(before: StageConfig, after: StageConfig, steps: int) -> int | None:
    """Returns the first of `steps` 0-based steps whose learning rate or momentum of Muon differs between two schedules;
    else None."""
    from dist_lm.training.optimizer import muon_momentum, stage_rate  # imports torch

    for step in range(steps):
        if stage_rate(before, step) != stage_rate(after, step):
            return step
        # The momentum of Muon follows the schedule too.
        if muon_momentum(before, step) != muon_momentum(after, step):
            return step
    return None


def check_phases_of_past(stage: "TrainingStage", config: Config, origin: Path, state: TrainState) -> None:
    """Refuses phases that would change steps which were taken. Passes if a corpus is not there; ranks compare again.

    Args:
        origin: what is continued, for the message.
        state: its state.

    Raises:
        ConfigError: names the phase, or a corpus that cannot fill one.
        ArtefactError: a corpus is damaged.
    """
    phases = stage.known_phases(config)
    if phases or not config.stage.phases:
        require_same_past(origin, state.phases, [phase.record() for phase in phases], state.step)


# --- where a run starts ---


def with_start(stage: Stage, config: Config) -> Config:
    """Returns `config` with `stage.init_from` as `none` or an absolute path, and `stage.without` as an absolute path;
    ranks may run in another folder.

    `auto` becomes the run of the previous stage with the same run_id, `stage:NAME` that of stage NAME, `hf:SOURCE` the
    run of its import. A branch has the start of the run that it continues. Nothing is checked to exist.

    Raises:
        ConfigError: this version cannot read the configuration of the run of stage.branch_from.
    """
    init_from = config.stage.init_from
    if config.stage.without:
        without = str(Path(config.stage.without).expanduser().resolve())
        config = replace(config, stage=replace(config.stage, without=without))
    if config.stage.branch_from:
        return with_branch(config)
    if init_from.startswith(HF):
        # only the stage that imports knows where its runs lie
        from dist_lm.stages.importing.stage import imported_run

        init_from = str(imported_run(config).path.resolve())
    elif init_from == "auto" or init_from.startswith(STAGE_RUN):
        init_from = "none"
        if name := stage.start_of(config):
            init_from = str(WorkDirectory(Path(config.work_dir).resolve()).run(name, config.run_id).path)
    return replace(config, stage=replace(config.stage, init_from=init_from))


def with_branch(config: Config) -> Config:
    """Returns `config` with stage.branch_from as an absolute path, and stage.init_from of the run that it names.

    Raises:
        ConfigError: this version cannot read the configuration of that run.
    """
    path = Path(config.stage.branch_from).expanduser().resolve()
    origin_config = _config_at(path)
    init_from = origin_config.stage.init_from if origin_config else "none"
    return replace(config, stage=replace(config.stage, branch_from=str(path), init_from=init_from))


def check_branch(stage: "TrainingStage", config: Config) -> Path:
    """Returns the checkpoint of stage.branch_from, after comparing its run with `config`.

    Raises:
        ArtefactError: there is no checkpoint, or it belongs to another model, tokenizer or content.
        ConfigError: the run belongs to another stage, differs in more than its schedule, has no fewer steps than
            `config`, or a decay is longer than the steps that are left; or as `check_unread`.
        OSError: a file cannot be read.
    """
    branch_from = config.stage.branch_from
    start = checkpoint_files.find_checkpoint(Path(branch_from))
    # An average lies in a run too, but only a checkpoint of the run has the state that a branch continues.
    origin_config = None
    if start.parent.name == "checkpoints":
        origin_config = _config_at(start)
    if origin_config is None or origin_config.stage.name != config.stage.name:
        kind = "a checkpoint without its run"
        if origin_config:
            kind = f"a run of stage={origin_config.stage.name}"
        raise ConfigError(
            f"stage.branch_from={branch_from}: {kind}; expected RUN@STEP of stage={config.stage.name}: a branch "
            "continues a run. stage.init_from begins a run with the weights of any checkpoint"
        )

    state, saved_model = checkpoint_files.read_state(start)
    checkpoint_files.check_same_model(start, saved_model, config.model)
    run = run_of(config)
    if run.work.tokenizer_model.exists():
        checkpoint_files.check_tokenizer(start, state, durable.sha256_of(run.work.tokenizer_model))

    differing = differing_keys(origin_config, config, "", (*stage.free_keys, *stage.schedule_keys, *BRANCH_KEYS))
    if differing:
        raise ConfigError(
            f"stage.branch_from={branch_from}: its run has other settings: {'; '.join(differing)}: a branch changes "
            f"only the schedule ({', '.join(stage.schedule_keys)}). stage.init_from begins a run with the "
            "weights alone"
        )

    check_phases_of_past(stage, config, start, state)
    if config.stage.without != origin_config.stage.without:
        check_unread(stage, config, origin_config, start, state.position)
    # Steps that follow from epochs are compared when the corpus is there.
    if config.stage.epochs and not config.stage.steps:
        require_same_content(start, run, config.corpus_names, config.corpus.folders)
        return start
    # A branch continues at the step of its start, with at least one step to take.
    accepted = f"more than {state.step}, the steps of {branch_from}"
    require(config.stage.steps > state.step, "stage.steps", config.stage.steps, accepted)
    steps_left = config.stage.steps - state.step
    accepted = f"at most {steps_left}: the branch begins at step {state.step} of {config.stage.steps}"
    require(config.stage.decay_steps <= steps_left, "stage.decay_steps", config.stage.decay_steps, accepted)

    require_same_content(start, run, config.corpus_names, config.corpus.folders)
    return start


def left_out_by(config: Config, run: RunDirectory) -> "DocumentIds":
    """Returns the documents of stage.without; none without that key. Documents that a corpus excludes are not among
    them.

    Args:
        run: that of the configuration.

    Raises:
        ArtefactError: the file has changed since the run began with it, cannot be read or has a line that is no id; or
            there is no such corpus or document; or no document would be left to learn from.
        ConfigError: stage.document_mask=false with a corpus that excludes documents.
        OSError: a file cannot be read.
    """
    require_mask_of_excluded(config, run)
    path = config.stage.without
    if not path:
        return {}
    from dist_lm.data.without import read_ids

    ids = read_ids(Path(path))
    run.require_files({name: files for name, files in config.noted_files.items() if files == [Path(path)]})
    for folder, numbers in ids.items():
        train = read_manifest(run.work.corpus(folder)).splits.get("train", Split())
        if (largest := max(numbers)) >= train.counts.documents:
            raise ArtefactError(
                f"{path}: {folder}:{largest}: corpus {folder} has {train.counts.documents:,} train documents"
            )
    require_documents_left(config, run, ids, path)
    return ids


def require_mask_of_excluded(config: Config, run: RunDirectory) -> None:
    """Refuses stage.document_mask=false where a corpus excludes documents: others would see them, and learn from them.

    Raises:
        ConfigError: names the corpus.
        ArtefactError: a manifest is damaged.
    """
    if config.stage.document_mask:
        return
    for name in config.corpus_names:
        directory = config.corpus_in(run.work, name)
        if manifest_path(directory).is_file() and (n_excluded := read_manifest(directory).n_excluded):
            accepted = f"true: {directory} excludes {n_excluded:,} documents, which others would learn from"
            require(False, "stage.document_mask", "false", accepted)


def require_documents_left(config: Config, run: RunDirectory, ids: "DocumentIds", path: str) -> None:
    """Refuses to leave out every document that a run could learn from: it would train on no token.

    Args:
        path: the file of the ids, for the message.

    Raises:
        ArtefactError: names the corpora; or a corpus is damaged.
        OSError: a file cannot be read.
    """
    folders = [config.corpus_in(run.work, name).name for name in config.corpus_names]
    splits = [read_manifest(run.work.corpus(folder)).splits.get("train", Split()) for folder in folders]
    n_left = sum(
        split.counts.documents - len(ids.get(folder, ())) for folder, split in zip(folders, splits, strict=True)
    )
    if not n_left:
        raise ArtefactError(
            f"{path}: all train documents of {', '.join(folders)} are left out: expected some to learn from"
        )


def check_unread(stage: "TrainingStage", config: Config, origin: Config, start: Path, position: int) -> None:
    """Refuses a branch that leaves out documents which its start has learned from, or learns from documents which that
    left out; passes if it has read none of them.

    Args:
        origin: the configuration of the run that is continued.
        start: a checkpoint of that run.
        position: sequences that the start has consumed.

    Raises:
        ConfigError: names stage.without and the verb that finds another start.
        ArtefactError: as `left_out_by`, or a corpus is missing or damaged.
    """
    from dist_lm.data.without import differing

    run, origin_run = run_of(config), _run_at(start)
    assert origin_run is not None, f"{start} lies in no run"
    changed = differing(left_out_by(config, run), left_out_by(origin, origin_run))
    first = first_reading(stage.sequences(config, run), changed, position)
    if first is not None:
        raise ConfigError(
            f"stage.without={config.stage.without or 'none'}: {start} has read documents of which this changes whether "
            f"they count, the first one in step {first // config.stage.global_batch + 1:,}: `dist-lm data without` "
            "goes on from an earlier checkpoint"
        )


def first_reading(sequences: "TrainingSequences", ids: "DocumentIds", end: int) -> int | None:
    """Returns the number of the first sequence below `end` in which a token of these documents is an input whose target
    may count; None: there is none.

    Args:
        ids: folders that the sequences do not read are passed over.
    """
    first: int | None = None
    for corpus in sequences.corpora:
        numbers = ids.get(corpus.directory.name, frozenset())
        # The end-of-text that opens a document is the last target of the one before, which still counts.
        parts = [
            DocumentSlice(number, min(1, length - 1), length)
            for number in sorted(numbers)
            if (length := int(corpus.lengths[number]))
        ]
        for visits in sequences.numbers(corpus, parts, end).values():
            if visits and (first is None or visits[0] < first):
                first = visits[0]
    return first


def check_init(stage: Stage, config: Config, init_from: str, rebuilt: Collection[str]) -> Path | None:
    """Returns the checkpoint of stage.init_from, after comparing it with `config`; None if there is none, or this
    command builds it.

    Args:
        init_from: stage.init_from before it was resolved; `config` has it as `none` or a path.
        rebuilt: earlier stages that this command builds.

    Raises:
        ArtefactError: there is no checkpoint, or it belongs to another model or tokenizer.
        UserError: a package that is needed to read `hf:SOURCE` is not installed.
    """
    # The weights are not there yet, but the shape of the model can be compared already.
    if init_from.startswith(HF) and IMPORT in rebuilt:
        from dist_lm.stages.importing.stage import imported_model

        start_config = replace(config, stage=replace(config.stage, init_from=init_from))
        checkpoint_files.check_start(Path(init_from), asdict(imported_model(start_config)), config.model)
        return None
    if config.stage.init_from == "none" or started_stage(stage, init_from) in rebuilt:
        return None

    start = checkpoint_files.find_checkpoint(Path(config.stage.init_from))
    state, saved_model = checkpoint_files.read_state(start)
    checkpoint_files.check_start(start, saved_model, config.model)
    tokenizer_model = run_of(config).work.tokenizer_model
    if tokenizer_model.exists():
        checkpoint_files.check_tokenizer(start, state, durable.sha256_of(tokenizer_model))
    return start


def started_stage(stage: Stage, init_from: str) -> str | None:
    """Returns the stage that a stage starts from in a plan, unless stage.init_from names a run by its path.

    Args:
        init_from: stage.init_from before it was resolved.
    """
    if init_from.startswith(STAGE_RUN):
        return init_from.removeprefix(STAGE_RUN)
    return stage.starts_from


def recorded_folders(config: Config) -> dict[str, str]:
    """Returns the folders that the run of a configuration has begun with, by corpus; those of a branch are the folders
    of the run that it continues.

    None for a new run, and for a folder that is gone.

    Raises:
        ArtefactError: the record of the run is damaged.
        OSError: a file cannot be read.
    """
    run = run_of(config)
    begun_run: RunDirectory | None = run
    if checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST) is None:
        branch_from = getattr(config.stage, "branch_from", "")
        begun_run = _run_at(Path(branch_from).expanduser().resolve()) if branch_from else None
    # A run of another work directory has read other folders.
    if begun_run is None or run.work.path.resolve() not in begun_run.path.resolve().parents:
        return {}
    folders = begun_run.corpus_folders()
    return {name: folder for name, folder in folders.items() if manifest_path(run.work.corpus(folder)).is_file()}


def with_recorded_folders(config: Config) -> Config:
    """Returns `config` with the folders of corpora that its run has begun with, whatever else `corpus.folders` says.

    Raises:
        ArtefactError: as `recorded_folders`.
        OSError: a file cannot be read.
    """
    folders = {name: folder for name, folder in recorded_folders(config).items() if name in config.corpus_names}
    return replace(config, corpus=replace(config.corpus, folders={**config.corpus.folders, **folders}))


def require_same_content(
    start: Path, run: RunDirectory, corpora: Sequence[str], folders: Mapping[str, str] | None = None
) -> None:
    """Refuses to continue from a checkpoint on other content than its run trained on. Missing corpora are not compared.

    Args:
        start: checkpoint of the run that is continued.
        run: the branch, whose work directory has the corpora.
        folders: corpus -> its folder there; a corpus that is not in it has the folder of its name.

    Raises:
        ArtefactError: names the corpus.
        OSError: a file cannot be read.
    """
    origin_run = _run_at(start)
    assert origin_run is not None, f"{start} lies in no run"
    recorded = recorded_content(origin_run)
    for name in corpora:
        corpus_path = run.work.corpus((folders or {}).get(name, name))
        if manifest_path(corpus_path).is_file() and read_manifest(corpus_path).content != recorded.get(name):
            raise ArtefactError(
                f"{origin_run.path} was trained on other content of corpus {name} than {corpus_path} holds: a branch "
                "continues at its place in the data: restore that corpus, or begin with the weights alone "
                "(stage.init_from)"
            )


def _run_at(path: Path) -> RunDirectory | None:
    """The run that a checkpoint, a folder of checkpoints, a run or RUN@STEP belongs to; None if there is none."""
    name, at, step = str(path).rpartition("@")
    if at and step.isdecimal() and not path.exists():
        path = Path(name)
    candidates = (path, *path.parents[:2])
    return next((RunDirectory(folder) for folder in candidates if (folder / "checkpoints").is_dir()), None)


def _config_at(path: Path) -> Config | None:
    """Returns the configuration of the run at `path`; None if there is no run, or it recorded none.

    Raises:
        ConfigError: this version cannot read it.
    """
    run = _run_at(path)
    if run is None or not run.config.is_file():
        return None
    return load_config(run.config)
