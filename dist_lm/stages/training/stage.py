"""Stages that train on a gang of ranks: their interface to the launcher and to ranks."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dist_lm.config.corpus import HF
from dist_lm.config.root import TRUST_ME, Config
from dist_lm.data.manifest import require_content, require_inputs
from dist_lm.errors import ConfigError
from dist_lm.stages.registry import load_config, stage_named
from dist_lm.stages.stage import (
    BITS_PER_BYTE,
    IMPORT,
    TRAIN_LOSS,
    VAL_LOSS,
    Action,
    Look,
    Place,
    Stage,
    run_of,
    shown_path,
)
from dist_lm.storage import durable
from dist_lm.storage.durable import json_lines
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.readable import change, counted, percent, three_decimals
from dist_lm.training import checkpoint_files

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch.distributed import ProcessGroup

    from dist_lm.data.batch import Batch
    from dist_lm.data.stream import StepStream
    from dist_lm.model.transformer import Transformer
    from dist_lm.parallel.mesh import World
    from dist_lm.tokenizer.tokenizer import Tokenizer
    from dist_lm.tracking.console import Console
    from dist_lm.training.heartbeat import Heartbeat, StopRequest
    from dist_lm.training.objective import Objective, Prepare
    from dist_lm.training.trainer import Evaluate

# keys that may change when a run is continued: placement and tracking, nothing that changes the result
FREE_KEYS = (
    *("work_dir", "prerequisites", "dry_run", "device", "sandbox", "hardware.", "cluster.", "tracking.", "profile."),
    *("tokenizer.source", "tokenizer.add_marks", "tokenizer.train_bytes", "tokenizer.workers"),
    "corpus.",  # what training sees of corpora is compared by its hash
    *("parallel.auto", "parallel.dp_replicate", "parallel.dp_shard", "parallel.tp", "parallel.sp"),
    *("parallel.reshard_after_forward", "parallel.reduce_every_micro_batch", "parallel.activation_checkpointing"),
    *("parallel.compile", "parallel.cpu_offload", "parallel.loss_chunk_mib"),
    *("stage.init_from", "stage.branch_from", "stage.micro_batch", "stage.checkpoint_every", "stage.checkpoint_async"),
    *("stage.keep_checkpoints", "stage.log_every", "stage.max_nonfinite_steps"),
    *("stage.eval_tasks", "stage.eval_new_tokens", "eval."),
)
# keys of the schedule, which may change as long as the steps that were taken keep their learning rates
SCHEDULE_KEYS = ("stage.steps", "stage.schedule", "stage.decay", "stage.min_lr_ratio")
SAMPLE_LINES = 12


@dataclass(frozen=True)
class Opening:
    """Arguments of `TrainingStage.open_data` on a rank."""

    config: Config
    run: RunDirectory
    world: "World"
    tokenizer: "Tokenizer"
    data_ranks: "ProcessGroup"  # the ranks that read different data, this one included
    dp_rank: int  # among `data_ranks`
    dp_size: int
    position: int  # sequences consumed so far
    initial: "Callable[[], AbstractContextManager[Transformer]] | None" = None  # the model that training starts from
    alive: Callable[[], None] = lambda: None  # writes a heartbeat; long preparations call it regularly


@dataclass(frozen=True)
class StageData:
    """Training stream and evaluation of a rank."""

    stream: "StepStream"
    evaluate: "Evaluate"
    bytes_per_token: float = 0.0  # of the training text; 0: the data is not text


@dataclass(frozen=True)
class Closing:
    """Arguments of `before_training` and `after_training` on a rank."""

    config: Config
    run: RunDirectory
    world: "World"
    tokenizer: "Tokenizer"
    model: "Callable[[], Transformer]"  # makes a whole copy of the model on every rank (collective)
    step: int
    alive: Callable[[], None] = lambda: None  # writes a heartbeat; call it regularly


class TrainingStage(Stage):
    """A stage that trains a model."""

    place = Place.RANKS
    free_keys: ClassVar[tuple[str, ...]] = FREE_KEYS
    schedule_keys: ClassVar[tuple[str, ...]] = SCHEDULE_KEYS
    key_figures = ((BITS_PER_BYTE,), (VAL_LOSS,), (TRAIN_LOSS,))
    unit: ClassVar[str] = "tokens"  # unit of `tokens` in its result

    # on ranks

    def run_rank(self, run: RunDirectory, stop: "StopRequest", heartbeat: "Heartbeat") -> None:
        """Train in this process, one of the ranks of the run, until the last step or a stop.

        The program of the ranks is imported here, since it needs torch and the launcher must start without it.
        """
        from dist_lm.stages.training.program import run_rank

        run_rank(run, stop, heartbeat)

    def objective(self, config: Config) -> "Objective":
        """The loss of a batch."""
        raise NotImplementedError(f"stage {self.name} has a program of its own")

    def prepare(self, config: Config) -> "Prepare | None":
        """What is called with the micro-batches of a step before its passes; None: nothing."""
        return None

    def open_data(self, opening: Opening) -> StageData:
        """The training stream of this rank, and its evaluation."""
        raise NotImplementedError(f"stage {self.name} has a program of its own")

    def before_training(self, closing: Closing) -> dict[str, float]:
        """Metrics before the first step, with stage.eval_at_start; the same on every rank (collective)."""
        return {}

    def after_training(self, closing: Closing) -> dict[str, float]:
        """Metrics after the last step; the same on every rank (collective)."""
        return {}

    def result(self, config: Config, run: RunDirectory, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Additional fields of `result.json` (first rank).

        Args:
            metrics: metrics of the last step.
        """
        return {}

    def example_batch(self, config: Config) -> "Batch | None":
        """A micro-batch for the dry run; None: random tokens for next-token prediction."""
        return None

    # in the launcher

    def resolved(self, config: Config, finished: bool) -> Config:
        """`config` with the stage's own references as absolute paths.

        Args:
            finished: whether the run has its result; references are not checked again then.

        Raises:
            ConfigError, ArtefactError: a reference names nothing, or something else.
        """
        return config

    def look(self, config: Config, *, is_target: bool, rebuilt: Collection[str]) -> Look:
        run, given = run_of(config), config.stage.init_from
        done = json.loads(run.result.read_text(encoding="utf-8"))["steps"] if run.result.exists() else 0
        finished = done > 0 and (not is_target or done >= config.stage.steps)
        config = self.resolved(with_start(self, config), finished)
        if run.config.exists() and has_output(run):
            # a later stage uses only the weights of a finished run, so only the model must be the same
            keys = "" if is_target or not finished else "model."
            old = load_config(run.config)
            prefix = "stage." if is_target else f"stages.{self.name}."
            conflicts = [one.replace("stage.", prefix, 1) for one in differing_keys(old, config, keys, self.free_keys)]
            schedule = tuple(key.replace("stage.", prefix) for key in self.schedule_keys)
            if any(conflict.startswith(schedule) for conflict in conflicts):
                from dist_lm.stages.training.continuing import without_schedule

                conflicts = without_schedule(conflicts, schedule, run, old, config)
            refuse_other_settings(run, config, conflicts)
        if finished:
            return Look(config, Action.READY, f"{done:,} steps, {shown_path(run.path, config)}")
        if config.stage.eval_tasks:
            from dist_lm.evaluation.tasks import check_tasks

            check_tasks(list(config.stage.eval_tasks), config.eval.files, config.sandbox == TRUST_ME)
        latest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
        if latest:
            require_content(run, config.streams)
            require_inputs(run, config.corpus, config.streams)
            run.require_files(config.noted_files)
            if config.stage.lora.rank:
                from dist_lm.training.adapters import adapted_model

                adapted_model(latest)  # refuses a base that is gone or has changed
            return Look(config, Action.RESUME, f"from {latest.name} to step {config.stage.steps:,}")
        if config.stage.branch_from:
            from dist_lm.stages.training.continuing import check_branch

            start = check_branch(self, config)
            return Look(config, Action.BUILD, f"to step {config.stage.steps:,}, from {shown_path(start, config)}")
        origin = f" from the {self.starts_from} checkpoint" if self.starts_from in rebuilt else ""
        if given.startswith(HF) and IMPORT in rebuilt:
            from dist_lm.interop.snapshot import named_model

            checkpoint_files.check_start(Path(given), asdict(named_model(given)), config.model)
            origin = f" from {given}"
        if config.stage.init_from != "none" and not origin:
            start = checkpoint_files.find_checkpoint(Path(config.stage.init_from))
            state, saved_model = checkpoint_files.read_state(start)
            checkpoint_files.check_start(start, saved_model, config.model)
            if run.work.tokenizer_model.exists():
                checkpoint_files.check_tokenizer(start, state, durable.sha256_of(run.work.tokenizer_model))
            origin = f" from {shown_path(start, config)}"
        return Look(config, Action.BUILD, f"{config.stage.steps:,} steps{origin}")

    def output(self, config: Config) -> Path:
        return run_of(config).path

    def progress(self, config: Config) -> str:
        latest = checkpoint_files.read_pointer(run_of(config).checkpoints, checkpoint_files.LATEST)
        return latest.name if latest else "the start of the stage, it has no checkpoint yet"

    def summarize(self, config: Config, console: "Console") -> None:
        run = run_of(config)
        result = json.loads(run.result.read_text(encoding="utf-8"))
        self.print_figures(config, result, console)
        self.print_samples(run, console)
        console.summary(f"stage={self.name} is done", dict(self.entries(config, run, result)))

    def print_figures(self, config: Config, result: Mapping[str, Any], console: "Console") -> None:
        """Print the tables of the summary."""
        print_before_and_after(result, console)

    def print_samples(self, run: RunDirectory, console: "Console") -> None:
        """Print the first sample of each language of the last file of samples."""
        shown: set[str] = set()
        for sample in last_samples(run):
            if sample["language"] not in shown:
                shown.add(sample["language"])
                parses = sample.get("parses")
                verdict = "" if parses is None else ", parses" if parses else ", does not parse"
                console.line(f"--- {sample['language']}{verdict}")
                for line in (sample["prompt"] + sample["completion"]).splitlines()[:SAMPLE_LINES]:
                    console.line(f"    {line}")

    def entries(self, config: Config, run: RunDirectory, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """(what, value) of the summary's last box."""
        metrics = result["metrics"]
        bits = f", {metrics['val/bits_per_byte']:.3f} bits per byte" if "val/bits_per_byte" in metrics else ""
        steps, amount = f"{result['steps']:,} steps", f"{result['tokens']:,} {self.unit}"
        trained = result.get("trained_parameters", result["parameters"])
        adapters = f", {trained:,} of them trained" if config.stage.lora.rank else ""
        yield "parameters", f"{result['parameters']:,}{adapters}"
        yield "trained", f"{steps}, {amount} on {counted(result['ranks'], 'rank')}"
        if "val/loss" in metrics:
            yield "val", f"loss {three_decimals(metrics['val/loss'])}{bits}"
        if packing := result.get("packing"):
            yield "packed", self.packing_text(packing)
        yield from task_entries(result)
        yield from self.own_entries(result)
        yield "checkpoint", str(run.checkpoints / str(result["checkpoint"]))
        yield "samples", str(run.samples)
        yield "metrics", str(run.metrics)
        yield "rank logs", str(run.logs)
        if config.tracking.name == "wandb":
            yield "wandb", str(run.wandb)
        if config.stage.corpus:
            yield "corpus", f"dist-lm data inspect {run.work.corpus(config.stage.corpus)}"

    def own_entries(self, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """The stage's own lines of the summary's last box."""
        return iter(())

    packed: ClassVar[str] = "conversations"  # kind of documents that are packed whole

    def packing_text(self, packing: Mapping[str, Any]) -> str:
        """How documents that are packed whole fill their sequences."""
        everything = packing["documents"] + packing["left_out"]
        left_out = f", {packing['left_out']:,} of {everything:,} too long for one" if packing["left_out"] else ""
        return (
            f"{packing['documents']:,} {self.packed} into {packing['sequences']:,} sequences, "
            f"{percent(packing['padding'])} padding{left_out}"
        )


def training_stage(name: str) -> TrainingStage:
    """The training stage of that name."""
    stage = stage_named(name)
    assert isinstance(stage, TrainingStage), f"stage {name} does not train"
    return stage


def print_before_and_after(result: Mapping[str, Any], console: "Console") -> None:
    """Print the loss on held-out documents before the first and after the last step, if both were measured."""
    before, after = result.get("before", {}), result["metrics"]
    names = [name for name in after if name.startswith("val/loss") and name in before]
    if names:
        rows = [
            (
                name.removeprefix("val/loss").removeprefix("_") or "all",
                three_decimals(before[name]),
                three_decimals(after[name]),
                change(after[name] / before[name]),
            )
            for name in names
        ]
        console.table("loss on held-out documents", ("documents", "before", "after", "change"), rows)


def before_and_after(
    name: str, before: Mapping[str, float], after: Mapping[str, float], form: Callable[[float], str]
) -> str:
    """`0.51 -> 0.73`: a metric before the first and after the last step; empty if it was not measured at the end."""
    if after.get(name) is None:
        return ""
    return " -> ".join(form(metrics[name]) for metrics in (before, after) if metrics.get(name) is not None)


def task_entries(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A line with the figures of stage.eval_tasks; none without tasks."""
    before, after = result.get("before", {}), result["metrics"]
    shown = {
        name.split("/")[1]: before_and_after(name, before, after, three_decimals)
        for name in sorted(after)
        if name.startswith("eval/") and name.endswith("/pass@1")
    }
    if shown:
        yield "tasks", ", ".join(f"{task} {figure}" for task, figure in shown.items())


def last_samples(run: RunDirectory) -> list[dict[str, Any]]:
    """The lines of the newest file of samples."""
    files = sorted(run.samples.glob("step_*.jsonl"))
    return list(json_lines(files[-1])) if files else []


def with_start(stage: Stage, config: Config) -> Config:
    """`config` with `stage.init_from` as `none` or an absolute path; ranks may run in another folder.

    `auto` becomes the run of the previous stage with the same run_id, `hf:SOURCE` the run of its import. A branch
    has the start of the run that it continues.
    """
    start = config.stage.init_from
    if config.stage.branch_from:
        from dist_lm.stages.training.continuing import with_branch

        return with_branch(config)
    if start.startswith(HF):
        from dist_lm.stages.importing.stage import imported_run

        start = str(imported_run(config).path.resolve())
    if start == "auto":
        work = WorkDirectory(Path(config.work_dir).resolve())
        start = str(work.run(stage.starts_from, config.run_id).path) if stage.starts_from else "none"
    return replace(config, stage=replace(config.stage, init_from=start))


def has_output(run: RunDirectory) -> bool:
    """Whether a run has a checkpoint or a result, which other settings would contradict."""
    return run.result.exists() or checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST) is not None


def refuse_other_settings(run: RunDirectory, config: Config, conflicts: list[str]) -> None:
    """Refuse to continue a run with other settings.

    Raises:
        ConfigError: names the run and each key.
    """
    if conflicts:
        raise ConfigError(
            f"{run.path} exists with other settings: {'; '.join(conflicts)}: "
            f"give them the same values, or choose another run_id than {config.run_id}"
        )


def differing_keys(old: Config, new: Config, prefix: str, free: tuple[str, ...]) -> list[str]:
    """`key=new (was old)` for every key that starts with `prefix`, differs, and is not in `free`.

    Args:
        free: beginnings of keys; * stands for any text.
    """
    return [
        f"{key}={after} (was {before})"
        for key, before, after in _differences(asdict(old), asdict(new))
        if key.startswith(prefix) and not any(fnmatchcase(key, f"{one}*") for one in free)
    ]


def _differences(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, before, after) of each difference. A mapping on one side only is one difference."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(name), after.get(name), f"{key}.{name}".removeprefix("."))
    elif before != after:
        yield key, before, after
