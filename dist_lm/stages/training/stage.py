"""Stages that train on a gang of ranks: their interface to the launcher and to ranks."""

import importlib.util
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar

from dist_lm.config.corpus import HF
from dist_lm.config.root import TRUST_ME, Config
from dist_lm.config.stage import NEEDS_BITSANDBYTES
from dist_lm.data.epochs import NAMED as MOST_CORPORA
from dist_lm.data.epochs import CorpusPass, in_words, repetition_warning
from dist_lm.data.manifest import manifest_path, require_content
from dist_lm.data.phases import MixPhase
from dist_lm.errors import ArtefactError, UserError
from dist_lm.stages.continuing import (
    FREE_KEYS,
    SCHEDULE_KEYS,
    check_branch,
    check_init,
    has_output,
    require_same_settings,
    started_stage,
    with_recorded_folders,
    with_start,
)
from dist_lm.stages.registry import load_config, stage_named
from dist_lm.stages.stage import (
    BITS_PER_BYTE,
    IMPORT,
    TRAIN_LOSS,
    VAL_LOSS,
    Action,
    Look,
    RunsIn,
    Stage,
    run_of,
    shown_path,
)
from dist_lm.stages.training.arguments import DataArguments, EvaluationArguments, StageData, TrainingSequences
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.readable import change, counted, listed, passes_in_words, percent, three_decimals
from dist_lm.training import checkpoint_files

if TYPE_CHECKING:
    from dist_lm.data.batch import Batch
    from dist_lm.tracking.console import Console
    from dist_lm.training.heartbeat import Heartbeat, StopRequest
    from dist_lm.training.objective import Objective, Prepare


log = logging.getLogger(__name__)

SAMPLE_LINES = 12


class TrainingStage(Stage):
    """A stage that trains a model."""

    runs_in = RunsIn.RANKS
    free_keys: ClassVar[tuple[str, ...]] = FREE_KEYS
    schedule_keys: ClassVar[tuple[str, ...]] = SCHEDULE_KEYS
    result_kinds = {"steps": int}  # noqa: RUF012
    key_figures = ((BITS_PER_BYTE,), (VAL_LOSS,), (TRAIN_LOSS,))
    unit: ClassVar[str] = "tokens"  # unit of `tokens` in its result
    has_sequences: ClassVar[bool] = False  # whether its training stream is sequences of corpora (`sequences`)

    # --- on ranks ---

    def run_rank(self, run: RunDirectory, stop: "StopRequest", heartbeat: "Heartbeat") -> None:
        """Trains in this process, one of the ranks of the run, until the last step or a stop.

        The program of the ranks is imported here, since it needs torch and the launcher must start without it.

        Raises:
            UserError, PoolFailure, OSError, StrangerError, MessageError: see `training.program.run_rank`.
        """
        from dist_lm.stages.training.program import run_rank

        run_rank(self, run, stop, heartbeat)

    def objective(self, config: Config) -> "Objective":
        """Returns the function that computes the loss of a batch."""
        raise NotImplementedError(f"stage {self.name} has a program of its own")

    def prepare(self, config: Config) -> "Prepare | None":
        """Returns a function that the trainer calls on the micro-batches of a step before the forward passes; None: no
        objective of this stage needs that."""
        return None

    def open_data(self, arguments: DataArguments) -> StageData:
        """Returns the training stream of this rank, and its evaluation.

        Raises:
            ArtefactError: a corpus is missing or damaged, or fills no sequence.
            ConfigError, UserError: settings do not fit the ranks or the tokenizer; names the key or the mark.
        """
        raise NotImplementedError(f"stage {self.name} has a program of its own")

    def before_training(self, arguments: EvaluationArguments) -> dict[str, float]:
        """Returns the metrics before the first step, with stage.eval_at_start; the same on every rank (collective)."""
        return {}

    def after_training(self, arguments: EvaluationArguments) -> dict[str, float]:
        """Returns the metrics after the last step; the same on every rank (collective)."""
        return {}

    def result(self, config: Config, run: RunDirectory, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Returns additional fields of `result.json` (first rank).

        Args:
            metrics: metrics of the last step.
        """
        return {}

    def passes(self, config: Config, exact: bool) -> tuple[CorpusPass, ...]:
        """Returns the corpora of the training stream with the sequences of an epoch, that of the stage first; none for
        a stage that reads no corpus.

        Args:
            exact: whether tokens count that fill-in-the-middle adds, for which the length of each document is read.

        Raises:
            ArtefactError: a corpus is missing or damaged.
        """
        return ()

    def phases(self, config: Config) -> tuple[MixPhase, ...]:
        """Returns stage.phases in numbers; none for a run without phases.

        Raises:
            ArtefactError: a corpus is missing or damaged.
            ConfigError: a corpus cannot fill a phase; names both, and the numbers.
        """
        return ()

    def sequences(self, config: Config, run: RunDirectory) -> TrainingSequences:
        """Returns which parts of documents the training stream reads, where `has_sequences`.

        Raises:
            ArtefactError: a corpus or the tokenizer is missing or damaged.
            UserError: the tokenizer lacks a mark, or the package that it needs is not installed.
        """
        raise NotImplementedError(f"stage {self.name} reads no sequences of a corpus")

    def example_batch(self, config: Config) -> "Batch | None":
        """Returns a micro-batch for the dry run; None: random tokens for next-token prediction."""
        return None

    # --- where the run is prepared: in the launcher, or on rank 0 without one ---

    def resolved(self, config: Config, finished: bool) -> Config:
        """`config` with the stage's own references as absolute paths.

        Args:
            finished: whether the run has its result; references are not checked again then.

        Raises:
            ConfigError, ArtefactError: a reference names nothing, or something else.
        """
        return config

    def look(self, config: Config, *, is_target: bool, rebuilt: Collection[str]) -> Look:
        """Returns what is there of the run and what is to do, after comparing settings and checking everything that
        ranks read.

        Raises:
            ConfigError: the run exists with other settings, or a key names something that does not fit.
            ArtefactError: a checkpoint, a corpus or a file is missing or does not fit.
            UserError: a package that is needed to read `hf:SOURCE` is not installed.
            OSError: a file cannot be read.
        """
        init_from = config.stage.init_from
        config = with_recorded_folders(config)
        config = self.with_steps(config, rebuilt)
        on_disk = find_run(config, is_target=is_target)
        # Settings are compared with paths in place of `auto`, which may mean another run by now.
        config = self.resolved(with_start(self, config), on_disk.finished)
        require_same_settings(self, on_disk.run, config, finished=on_disk.finished, is_target=is_target)
        start, phases = None, ()
        if not on_disk.finished:
            start = self.verify(on_disk, config, init_from, rebuilt)
            phases = self.phase_rows(config, rebuilt)  # refuses a phase that a corpus cannot fill
        return replace(self.describe(on_disk, config, start, init_from, rebuilt), phases=phases)

    def with_steps(self, config: Config, rebuilt: Collection[str] = ()) -> Config:
        """Returns `config` with the steps that follow from stage.epochs: those that the run has recorded, else those of
        the corpus; unchanged without stage.epochs.

        The steps stay 0 if the corpus is not there yet, or if this command builds it first.

        Args:
            rebuilt: earlier stages that this command builds.

        Raises:
            ConfigError: another key does not fit the steps, or this version cannot read the configuration of the run.
            ArtefactError: a corpus is damaged, or fills no sequence.
        """
        stage = config.stage
        if not stage.epochs:
            return config

        run, steps = run_of(config), 0
        recorded = load_config(run.config).stage if run.config.exists() and has_output(run) else None
        # A corpus that was built again may have grown; the run goes on to the step that it set out for.
        if recorded is not None and recorded.epochs == stage.epochs:
            steps = recorded.steps
        elif passes := self.known_passes(config, rebuilt, exact=True):
            steps = passes[0].steps(stage.epochs, stage.global_batch)
        return replace(config, stage=replace(stage, steps=steps))

    def known_passes(self, config: Config, rebuilt: Collection[str], exact: bool) -> tuple[CorpusPass, ...]:
        """Returns what `passes` does; nothing if a corpus is not there yet, or if this command builds it first.

        Raises:
            ArtefactError: a corpus is damaged, or fills no sequence.
        """
        work = run_of(config).work
        if not self._has_corpora(config, rebuilt):
            return ()
        passes = self.passes(config, exact)
        for corpus_pass in passes:
            if not corpus_pass.n_sequences:
                directory, seq_len = config.corpus_in(work, corpus_pass.corpus), config.stage.seq_len
                raise ArtefactError(
                    f"corpus {directory} fills no sequence of stage.seq_len={seq_len}: "
                    "shorten stage.seq_len or add text"
                )
        return passes

    def known_phases(self, config: Config, rebuilt: Collection[str] = ()) -> tuple[MixPhase, ...]:
        """Returns what `phases` does; nothing if a corpus is not there yet, or if this command builds it first.

        Raises:
            ArtefactError: a corpus is damaged.
            ConfigError: a corpus cannot fill a phase; names both, and the numbers.
        """
        if not config.stage.phases or not self._has_corpora(config, rebuilt):
            return ()
        return self.phases(config)

    def _has_corpora(self, config: Config, rebuilt: Collection[str]) -> bool:
        """Returns whether the run reads corpora, all of them are there, and this command does not build them again."""
        if set(rebuilt) & set(self.needs):
            return False
        folders = [config.corpus_in(run_of(config).work, name) for name in config.corpus_names]
        return bool(folders) and all(manifest_path(folder).is_file() for folder in folders)

    def epochs_in_words(self, config: Config, rebuilt: Collection[str] = ()) -> str:
        """Returns the passes over the corpora for the plan: `, 3.0 epochs of code, 0.2 of language`; empty if they are
        not known yet."""
        stage = config.stage
        passes = self._passes_for_people(config, rebuilt)
        if not passes or not stage.steps:
            return ""
        return f", {in_words(passes, stage.steps * stage.global_batch)}"

    def repetition(self, config: Config) -> str:
        passes = self._passes_for_people(config)
        if not passes or not config.stage.steps:
            return ""
        return repetition_warning(self.name, passes, config.stage.steps, config.stage.global_batch)

    def phase_rows(self, config: Config, rebuilt: Collection[str] = ()) -> tuple[tuple[str, ...], ...]:
        """Returns a row (phase, corpus, sequences, tokens, epochs, epochs so far) for each corpus of each phase of the
        run; a sequence counts with `stage.seq_len` tokens. Empty without phases, and where `known_phases` is.

        Raises:
            ArtefactError, ConfigError: as `known_phases`.
        """
        phases = self.known_phases(config, rebuilt)
        passes = self.known_passes(config, rebuilt, exact=True) if phases else ()

        stage, rows = config.stage, []
        sequences_before = dict.fromkeys(config.corpus_names, 0)
        for number, phase in enumerate(phases, 1):
            rate = f", rate x {factor:g}" if (factor := stage.phases[number - 1].lr) != 1 else ""
            name = f"{number}: steps {phase.begin + 1:,} to {phase.until:,}{rate}"

            for corpus in passes:
                sequences = phase.sequences[corpus.corpus]
                sequences_before[corpus.corpus] += sequences
                if not sequences:
                    continue
                epochs, epochs_so_far = (
                    passes_in_words(count / corpus.n_sequences)
                    for count in (sequences, sequences_before[corpus.corpus])
                )
                tokens = f"{sequences * stage.seq_len:,}"
                rows.append((name, corpus.corpus, f"{sequences:,}", tokens, epochs, epochs_so_far))
                name = ""  # once for each phase
        return tuple(rows)

    def _passes_for_people(self, config: Config, rebuilt: Collection[str] = ()) -> tuple[CorpusPass, ...]:
        """As `known_passes`; none for a corpus that cannot be read, which others refuse with the way out."""
        try:
            return self.known_passes(config, rebuilt, exact=False)
        except UserError as error:
            log.info("no epochs are counted: %s", error)
            return ()

    def verify(self, on_disk: "RunState", config: Config, init_from: str, rebuilt: Collection[str]) -> Path | None:
        """Checks everything that the ranks will read, so that they do not fail on it later. Returns the start of a new
        run.

        Args:
            on_disk: the state of the run, which is not finished.
            init_from: stage.init_from before it was resolved to `none` or a path.
            rebuilt: earlier stages that this command builds.

        Returns:
            The checkpoint that a new run starts from. None if the run continues, starts from random weights, or starts
                from a stage that this command builds.

        Raises:
            ConfigError: a task, a file or the schedule of a branch does not fit, or there is no sandbox for programs of
                a task.
            ArtefactError: a checkpoint, a corpus or a file is missing or does not fit.
            UserError: a package that is needed to read `hf:SOURCE`, or for a base in four bits, is not installed.
            OSError: a file cannot be read.
        """
        if config.stage.eval_tasks:
            from dist_lm.evaluation.tasks import check_tasks

            check_tasks(list(config.stage.eval_tasks), config.eval.files, config.sandbox == TRUST_ME)

        if config.stage.lora.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(NEEDS_BITSANDBYTES)

        if on_disk.latest:
            # A run continues only on the content that it began with.
            require_content(on_disk.run, config.corpus_names, config.corpus.folders)
            on_disk.run.require_files(config.noted_files)
            if config.stage.lora.rank:
                from dist_lm.training.adapters import adapted_model

                # Refuses a base that is gone or has changed.
                adapted_model(on_disk.latest)
            return None
        if config.stage.branch_from:
            return check_branch(self, config)
        return check_init(self, config, init_from, rebuilt)

    def describe(
        self, on_disk: "RunState", config: Config, start: Path | None, init_from: str, rebuilt: Collection[str]
    ) -> Look:
        """Returns the line of the plan: finished, to continue, or to build; see `verify` for the arguments.

        Args:
            start: as `verify` returns it.
        """
        if on_disk.finished:
            return Look(config, Action.READY, f"{on_disk.steps:,} steps, {shown_path(on_disk.run.path, config)}")
        steps, epochs = config.stage.steps, self.epochs_in_words(config, rebuilt)
        if on_disk.latest:
            return Look(config, Action.RESUME, f"from {on_disk.latest.name} to step {steps:,}{epochs}")
        if start and config.stage.branch_from:
            return Look(config, Action.BUILD, f"to step {steps:,}{epochs}, from {shown_path(start, config)}")

        origin = ""
        if start:
            origin = f" from {shown_path(start, config)}"
        elif init_from.startswith(HF) and IMPORT in rebuilt:
            origin = f" from {init_from}"
        elif (name := started_stage(self, init_from)) in rebuilt:
            origin = f" from the {name} checkpoint"
        # Without the corpus, the steps that follow from epochs are not known.
        amount = f"{steps:,} steps{epochs}" if steps else f"{config.stage.epochs:g} epochs of {config.stage.corpus}"
        return Look(config, Action.BUILD, f"{amount}{origin}")

    def output(self, config: Config) -> Path:
        return run_of(config).path

    def progress(self, config: Config) -> str:
        latest = checkpoint_files.read_pointer(run_of(config).checkpoints, checkpoint_files.LATEST)
        return latest.name if latest else "the start of the stage, it has no checkpoint yet"

    def summarize(self, config: Config, console: "Console") -> None:
        run = run_of(config)
        result = self.read_result(run)
        self.print_figures(config, result, console)
        self.print_samples(run, console)
        console.summary(f"stage={self.name} is done", dict(self.entries(config, run, result)))

    def print_figures(self, config: Config, result: Mapping[str, Any], console: "Console") -> None:
        """Prints the tables of the summary."""
        print_before_and_after(result, console)

    def print_samples(self, run: RunDirectory, console: "Console") -> None:
        """Prints the first sample of each language of the last file of samples, at most 12 lines of each; nothing
        without samples.
        """
        verdict_of = {None: "", True: ", parses", False: ", does not parse"}
        printed_languages: set[str] = set()
        for sample in last_samples(run):
            if sample["language"] in printed_languages:
                continue
            printed_languages.add(sample["language"])
            console.line(f"--- {sample['language']}{verdict_of[sample.get('parses')]}")
            for line in (sample["prompt"] + sample["completion"]).splitlines()[:SAMPLE_LINES]:
                console.line(f"    {line}")

    def entries(self, config: Config, run: RunDirectory, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yields (what, value) of the summary's last box: size, steps, val, tasks and where the files are."""
        metrics = result["metrics"]
        adapters = ""
        if config.stage.lora.rank:
            # Results of old releases do not have the number of trained parameters.
            trained = result.get("trained_parameters", result["parameters"])
            adapters = f", {trained:,} of them trained"
        yield "parameters", f"{result['parameters']:,}{adapters}"

        steps, amount = f"{result['steps']:,} steps", f"{result['tokens']:,} {self.unit}"
        yield "trained", f"{steps}, {amount} on {counted(result['ranks'], 'rank')}"
        if epochs := result.get("epochs"):
            own_epochs, *mixed = epochs.items()
            words = [f"{passes_in_words(own_epochs[1])} of {own_epochs[0]}"]
            words += [f"{passes_in_words(number)} of {corpus}" for corpus, number in mixed]
            yield "epochs", listed(words, MOST_CORPORA)
        if "val/loss" in metrics:
            bits = f", {metrics['val/bits_per_byte']:.3f} bits per byte" if "val/bits_per_byte" in metrics else ""
            yield "val", f"loss {three_decimals(metrics['val/loss'])}{bits}"
        if packing := result.get("packing"):
            yield "packed", self.packing_text(packing)
        yield from task_entries(result)
        yield from self.own_entries(result)

        yield "checkpoint", str(run.checkpoints / str(result["checkpoint"]))
        # Not every stage writes samples, or asks questions.
        if any(run.samples.rglob("*.jsonl")):
            yield "samples", str(run.samples)
        yield "metrics", str(run.metrics)
        yield "rank logs", str(run.logs)
        if config.tracking.name == "wandb":
            yield "wandb", str(run.wandb)
        if config.stage.corpus:
            yield "corpus", f"dist-lm data inspect {run.corpus(config.stage.corpus)}"

    def own_entries(self, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Returns the stage's own lines of the summary's last box."""
        return iter(())

    packed: ClassVar[str] = "conversations"  # kind of documents that are packed whole

    def packing_text(self, packing: Mapping[str, Any]) -> str:
        """Returns a sentence on how documents that are packed whole fill their sequences.

        Args:
            packing: as `Packing.report` returns it: numbers of documents and sequences, and the share of padding in
                [0, 1].
        """
        left_out = ""
        n_documents = packing["documents"] + packing["left_out"]
        if packing["left_out"]:
            left_out = f", {packing['left_out']:,} of {n_documents:,} too long for one"
        for fate in ("truncated", "split"):
            if n_too_long := packing.get(fate):
                left_out = f", {n_too_long:,} of {n_documents:,} too long for one and {fate}"
        return (
            f"{packing['documents']:,} {self.packed} into {packing['sequences']:,} sequences, "
            f"{percent(packing['padding'])} padding{left_out}"
        )


@dataclass(frozen=True)
class RunState:
    """The run that a command is about, as it is on disk."""

    run: RunDirectory
    steps: int  # steps by its result; 0: it has no result
    finished: bool  # nothing is left to train for this command
    latest: Path | None  # its newest checkpoint


def find_run(config: Config, *, is_target: bool) -> RunState:
    """Returns the state of the run of `config` on disk.

    A run of an earlier stage counts as finished if it has a result, even with fewer steps than configured.

    Raises:
        ArtefactError: `result.json` is damaged.
        OSError: a file cannot be read.
    """
    run = run_of(config)
    steps = durable.read_json(run.result, {"steps": (int, NoneType)}).get("steps") or 0
    # Steps that follow from epochs may not be known yet.
    has_all = 0 < config.stage.steps <= steps
    finished = steps > 0 and (not is_target or has_all)
    latest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
    return RunState(run, steps, finished, latest)


def training_stage(name: str) -> TrainingStage:
    """Returns the training stage of that name.

    Raises:
        ConfigError: the name is unknown, or the entry point of another package does not name a stage with its defaults.
    """
    stage = stage_named(name)
    assert isinstance(stage, TrainingStage), f"stage {name} does not train"
    return stage


def print_before_and_after(result: Mapping[str, Any], console: "Console") -> None:
    """Prints the loss on held-out documents before the first and after the last step; nothing unless both were
    measured."""
    before, after = result.get("before", {}), result["metrics"]
    names = [name for name in after if name.startswith("val/loss") and name in before]
    if not names:
        return

    rows = []
    for name in names:
        # The loss of one language or source has its name as suffix.
        documents = name.removeprefix("val/loss").removeprefix("_") or "all"
        ratio = change(after[name] / before[name])
        rows.append((documents, three_decimals(before[name]), three_decimals(after[name]), ratio))
    console.table("loss on held-out documents", ("documents", "before", "after", "change"), rows)


def before_and_after(
    name: str, before: Mapping[str, float], after: Mapping[str, float], form: Callable[[float], str]
) -> str:
    """`0.51 -> 0.73`: a metric before the first and after the last step; empty if it was not measured at the end."""
    if after.get(name) is None:
        return ""
    if before.get(name) is None:
        return form(after[name])
    return f"{form(before[name])} -> {form(after[name])}"


def task_entries(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields a line with pass@1 of stage.eval_tasks, before and after; nothing without tasks."""
    before, after = result.get("before", {}), result["metrics"]
    figure_of = {
        name.split("/")[1]: before_and_after(name, before, after, three_decimals)
        for name in sorted(after)
        if name.startswith("eval/") and name.endswith("/pass@1")
    }
    if figure_of:
        yield "tasks", ", ".join(f"{task} {figure}" for task, figure in figure_of.items())


def last_samples(run: RunDirectory) -> list[dict[str, Any]]:
    """Returns the lines of the newest file of samples."""
    newest = sorted(run.samples.glob("step_*.jsonl"))[-1:]
    return [sample for file in newest for sample in durable.json_lines(file)]


def batch_options(arguments: DataArguments) -> dict[str, Any]:
    """Returns the arguments that all streams and evaluation batches take: sequence length, micro-batch size, the number
    of this rank among those that read different data, the padding token and the first token of documents."""
    return {
        "seq_len": arguments.config.stage.seq_len,
        "micro_batch": arguments.config.stage.micro_batch,
        # Tensor-parallel ranks of a group have one dp_rank: they read the same sequences.
        "dp_rank": arguments.dp_rank,
        "dp_size": arguments.dp_size,
        "pad_id": arguments.tokenizer.pad_id,
        "first_token": arguments.tokenizer.first_token,
    }


def sequence_limit(config: Config, everything: bool) -> int:
    """Returns the largest number of held-out sequences that an evaluation reads; 0: `everything`."""
    return 0 if everything else config.stage.eval_sequences
