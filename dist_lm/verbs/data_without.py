"""The verb `data without`: trains a run again as if some documents had never been learned from.

    language  step 0 ---- c ---- u ------------> end       u: first step that reads one of the documents
    new run               c -------------------> end       c: newest kept checkpoint before u
    code                             0 --------> end       its start has changed, so it begins anew

A new run continues the checkpoint c of the old one as a branch, with the documents in `stage.without`: their tokens
stay where they are, and their loss does not count. Documents do not see one another, so nothing else can come from
them, and the result has the bits of a run that left them out from its first step, at the same layout. Old runs stay as
they are.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dist_lm.config.root import Config
from dist_lm.data.manifest import read_manifest
from dist_lm.data.without import DocumentIds, count_of, digest_of, merged, read_ids, text_of
from dist_lm.errors import ArtefactError, ConfigError, UserError
from dist_lm.stages.continuing import first_reading, require_documents_left
from dist_lm.stages.registry import stage_named
from dist_lm.stages.stage import Action
from dist_lm.stages.text import TextStage
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.readable import counted
from dist_lm.training import checkpoint_files
from dist_lm.verbs.data_step import training_sequences
from dist_lm.verbs.data_where import with_ancestors

if TYPE_CHECKING:
    from dist_lm.data.token_corpus import TokenCorpus

SIMILARITY = 0.8  # least Jaccard index of five-word windows of a near-duplicate
SUFFIX = re.compile(r"-without-[0-9a-f]{8}$")  # end of the run_id of a run that this verb made
STEP = re.compile(r"(?:@|/step_)(\d+)$")  # end of a path that names a checkpoint


@dataclass(frozen=True)
class Repeat:
    """A run that is trained again."""

    old: RunDirectory
    new: RunDirectory
    config: Config  # configuration of the new run
    without: DocumentIds
    first_step: int | None  # the first step that reads one of the documents; None: only the start of the run changes
    start: Path | None  # checkpoint of the old run that the new one continues; None: it begins at step 0
    trained: int  # steps that the old run has taken
    first_changed: int  # the first step whose weights are other ones

    @property
    def begins_after(self) -> int:
        """Steps that are not taken again."""
        return checkpoint_files.step_of(self.start) if self.start else 0

    @property
    def repeated_steps(self) -> int:
        """Steps that the old run has taken and that are taken again."""
        return max(0, self.trained - self.begins_after)


@dataclass(frozen=True)
class Repeats:
    """The runs to train again, ancestors first, and what they cannot undo, in sentences."""

    runs: tuple[Repeat, ...]
    remarks: tuple[str, ...]


def repeats_of(run: RunDirectory, ids: DocumentIds) -> Repeats:
    """Returns the runs that must be trained again so that a run has not learned from documents; changes nothing.

    Looks up each document in the order of each epoch of each run, and hashes the checkpoints that new runs continue.

    Args:
        ids: as `documents_in` returns them.

    Raises:
        ArtefactError: there is no such run, a corpus has changed since or is damaged, or no document would be left.
        ConfigError: a run reads documents with stage.document_mask=false, or a stage has no loss of its own for each
            document; names the run and the key.
        UserError: the package that a tokenizer needs is not installed.
    """
    lineage = with_ancestors(run)
    repeats: list[Repeat] = []
    remarks = list(_remarks_on_tokenizer(run))
    parent: Repeat | None = None
    for old, config in reversed(lineage):
        if config is None:
            remarks.append(f"{old.path} is an imported model: what it was trained on is not known here")
            continue
        if not _is_beside(old, run):
            remarks.append(f"{old.path} lies in another work directory, whose documents have other numbers")
            continue

        start_changes = parent is not None and _start_step(config, parent) >= parent.first_changed
        if not start_changes:
            # It began before its ancestor learned from them, which then need not be trained again for this run.
            repeats, parent = [], None

        parent = _repeat_of(old, config, ids, parent, is_target=old == run)
        if parent:
            repeats.append(parent)

    folders = ", ".join(sorted(ids))
    remarks.append(f"the documents stay in the tars of {folders}: runs that begin later need stage.without, too")
    return Repeats(tuple(_with_kept_starts(repeats)), tuple(remarks))


def _own_configs(run: RunDirectory) -> list[Config]:
    """Returns the configurations of a run and its ancestors in the same work directory.

    Raises:
        ArtefactError, ConfigError: as `with_ancestors`.
    """
    return [config for ancestor, config in with_ancestors(run) if config and _is_beside(ancestor, run)]


def _is_beside(ancestor: RunDirectory, run: RunDirectory) -> bool:
    return ancestor.work.path.resolve() == run.work.path.resolve()


def documents_in(file: Path, run: RunDirectory) -> dict[str, frozenset[int]]:
    """Returns the documents that a file names.

    Raises:
        ArtefactError: a line is no id, or neither the run nor an ancestor could have read the document; names it.
        ConfigError: as `with_ancestors`.
    """
    ids = read_ids(file)
    folders = {config.corpus_in(run.work, name).name for config in _own_configs(run) for name in config.corpus_names}
    for folder, numbers in ids.items():
        if folder not in folders:
            named = ", ".join(sorted(folders)) or "none"
            raise ArtefactError(
                f"{file}: {folder}:{min(numbers)}: {run.path} and its ancestors read these corpora: {named}"
            )
        n_documents = read_manifest(run.work.corpus(folder)).splits["train"].counts.documents
        if max(numbers) >= n_documents:
            raise ArtefactError(f"{file}: {folder}:{max(numbers)}: corpus {folder} has {n_documents:,} train documents")
    return ids


def _remarks_on_tokenizer(run: RunDirectory) -> Iterator[str]:
    report = durable.read_json(run.work.tokenizer_report)
    if report.get("text"):
        yield "the tokenizer stays: its pieces were learned from texts of these corpora, perhaps from these documents"


def _repeat_of(
    old: RunDirectory, config: Config, ids: DocumentIds, parent: Repeat | None, *, is_target: bool
) -> Repeat | None:
    """Returns how a run is trained again; None if it stays as it is.

    Args:
        parent: how the run that it began with is trained again; None: its start stays.
        is_target: whether the run goes on to its last step, also where it has not been there yet.

    Raises:
        ArtefactError, ConfigError, UserError: as `repeats_of`.
    """
    trained = checkpoint_files.newest_step(old.checkpoints)
    earlier = read_ids(Path(config.stage.without)) if config.stage.without else {}
    first_step = None
    if isinstance(stage_named(config.stage.name), TextStage):
        n_steps = config.stage.steps if is_target else trained
        # Documents that the old run left out already were not learned from.
        learned = {folder: numbers - earlier.get(folder, frozenset()) for folder, numbers in ids.items()}
        first = first_reading(training_sequences(config, old), learned, n_steps * config.stage.global_batch)
        first_step = None if first is None else first // config.stage.global_batch + 1
    elif parent or set(ids) & {old.corpus(name).name for name in config.corpus_names}:
        raise ConfigError(
            f"{old.path}: stage {config.stage.name} is not trained again by this verb, which knows texts and "
            "conversations: use it on the run that this one began with, then launch this stage from the new one"
        )
    if first_step is None and parent is None:
        return None

    if first_step is not None and not config.stage.document_mask:
        raise ConfigError(
            f"{old.path}: stage.document_mask=false: other documents of a sequence have seen these, so leaving out "
            "their loss undoes nothing: train without them"
        )
    if parent and config.stage.branch_from:
        raise ConfigError(
            f"{old.path} branched from {config.stage.branch_from}, whose own start has learned from these documents: "
            "use this verb on that run, then branch from the new one with the same stage.without"
        )

    without = merged(earlier, ids)
    require_documents_left(config, old, without, "these ids")
    base_id = SUFFIX.sub("", config.run_id)
    new = RunDirectory(old.path.with_name(f"{base_id}-without-{digest_of(without)}"))
    stage = config.stage
    # Without document masks, nothing can be left out: such a run only has another start.
    if stage.document_mask:
        stage = replace(stage, without=str(new.path.resolve() / f"without-{digest_of(without)}.txt"))

    start = None
    if parent:
        stage = replace(stage, branch_from="", init_from=_new_start(config, parent))
    elif first_step is not None:
        start = _newest_before(old, config, first_step)
        # A branch may have no checkpoint of its own before that step: then it begins anew where it did.
        stage = replace(stage, branch_from=str(start.resolve()) if start else "")

    work_dir = str(old.work.path)
    new_config = replace(config, stage=stage, run_id=new.path.name, work_dir=work_dir, dry_run=False)
    first_changed = 1 if parent or first_step is None else first_step
    return Repeat(old, new, new_config, without, first_step, start, trained, first_changed)


def _newest_before(old: RunDirectory, config: Config, first_step: int) -> Path | None:
    """Returns the newest intact checkpoint before a step is taken: one of the run, else the one that it branched from;
    None: no older one is kept.

    Raises:
        ConfigError: the step was taken before the run branched from another one.
    """
    for directory in reversed(checkpoint_files.steps_in(old.checkpoints)):
        if checkpoint_files.step_of(directory) < first_step and checkpoint_files.first_damage(directory) is None:
            return directory
    if not config.stage.branch_from:
        return None

    origin = Path(config.stage.branch_from)
    named = STEP.search(str(origin))
    branch_step = int(named[1]) if named else checkpoint_files.step_of(checkpoint_files.find_checkpoint(origin))
    if branch_step < first_step:
        return checkpoint_files.find_checkpoint(origin)
    raise ConfigError(
        f"{old.path} branched from {origin} after step {branch_step:,}, and step {first_step:,} before it has read one "
        "of these documents: use this verb on that run, then branch from the new one with the same stage.without"
    )


def _start_step(config: Config, parent: Repeat) -> int:
    """Returns the steps that its ancestor had taken when a run began with it.

    Raises:
        ArtefactError: the checkpoint is gone and its path does not tell.
        ConfigError: it is an average of checkpoints.
    """
    init_from = config.stage.init_from
    if named := STEP.search(init_from):
        return int(named[1])
    checkpoint = checkpoint_files.find_checkpoint(Path(init_from))
    if checkpoint.parent.name != "checkpoints":
        raise ConfigError(f"stage.init_from={init_from}: expected a checkpoint of {parent.old.path}, not an average")
    return checkpoint_files.step_of(checkpoint)


def _new_start(config: Config, parent: Repeat) -> str:
    """Returns stage.init_from of a run whose ancestor is trained again.

    Raises:
        ArtefactError, ConfigError: as `_start_step`; or the new ancestor writes no checkpoint of that step.
    """
    step, stage = _start_step(config, parent), parent.config.stage
    if step == stage.steps:
        return str(parent.new.path.resolve())
    if not stage.checkpoint_every or step % stage.checkpoint_every:
        raise ConfigError(
            f"stage.init_from={config.stage.init_from}: began with step {step:,} of {parent.old.path}, of which a new "
            f"run writes no checkpoint (stage.steps={stage.steps}, checkpoint_every={stage.checkpoint_every})"
        )
    return f"{parent.new.path.resolve()}@{step}"


def _with_kept_starts(repeats: Sequence[Repeat]) -> Iterator[Repeat]:
    """Yields the runs; one from whose midst another begins keeps all its checkpoints."""
    for repeat in repeats:
        starts = [new.config.stage.init_from for new in repeats]
        stage = repeat.config.stage
        if any(start.startswith(f"{repeat.new.path.resolve()}@") for start in starts):
            n_checkpoints = stage.steps // max(1, stage.checkpoint_every) + 2
            repeat = replace(
                repeat, config=replace(repeat.config, stage=replace(stage, keep_checkpoints=n_checkpoints))
            )
        yield repeat


# --- near-duplicates ---


def near_duplicates_in(run: RunDirectory, ids: DocumentIds) -> tuple[dict[str, frozenset[int]], list[str]]:
    """Returns the train documents of a lineage that nearly equal one of `ids`, and lines about all that were found; a
    line about val says that nothing is learned from it. Reads these corpora whole.

    Raises:
        ArtefactError: a corpus is damaged, or of another tokenizer.
        UserError: the package that the tokenizer needs is not installed.
    """
    from dist_lm.data.near_duplicates import resembling
    from dist_lm.data.text_search import ByteTable
    from dist_lm.data.token_corpus import TokenCorpus
    from dist_lm.verbs.data_step import tokenizer_of

    configs = _own_configs(run)
    folders = sorted({config.corpus_in(run.work, name).name for config in configs for name in config.corpus_names})
    train = {folder: TokenCorpus.open(run.work.corpus(folder), "train") for folder in folders}
    table = ByteTable(tokenizer_of(run, [*train.values()]).vocabulary())

    def texts(corpus: "TokenCorpus") -> Iterator[str]:
        for documents, tokens in corpus.members():
            content, ends = table.text(tokens)
            begin = 0
            for end in corpus.lengths[documents.start : documents.stop].cumsum().tolist():
                stop = int(ends[end - 1]) if end else begin
                yield content[begin:stop].decode(errors="replace")
                begin = stop

    # Texts are decoded from the tars, because sources may be gone.
    sought = [(folder, number) for folder, numbers in ids.items() for number in sorted(numbers)]
    sought_texts = [
        table.text(train[folder].tokens(number, 0, int(train[folder].lengths[number])))[0].decode(errors="replace")
        for folder, number in sought
    ]
    near_duplicates: dict[str, set[int]] = {}
    lines = []
    for folder, corpus in train.items():
        for number, resembled in resembling(texts(corpus), sought_texts, SIMILARITY):
            if number not in ids.get(folder, ()):
                near_duplicates.setdefault(folder, set()).add(number)
                lines.append("{}:{} resembles {}:{}".format(folder, number, *sought[resembled]))

        val = TokenCorpus.open(corpus.directory, "val")
        for number, resembled in resembling(texts(val), sought_texts, SIMILARITY):
            likeness = "{}:{}".format(*sought[resembled])
            lines.append(f"val document {number:,} of {folder} resembles {likeness}: no step learns from val")
    return {folder: frozenset(numbers) for folder, numbers in near_duplicates.items()}, lines


# --- the verb ---


def print_cost(run: RunDirectory, ids: DocumentIds, repeats: Repeats, console: Console) -> None:
    """Prints which runs are trained again from where, the steps that this takes, and what it cannot undo."""
    rows = [
        (
            repeat.config.stage.name,
            f"step {repeat.first_step:,}" if repeat.first_step else "by its start",
            repeat.start.name if repeat.start else "step 0",
            f"{repeat.repeated_steps:,} of {repeat.trained:,}",
            str(repeat.new.path),
        )
        for repeat in repeats.runs
    ]
    documents = ", ".join(f"{len(numbers):,} of {folder}" for folder, numbers in ids.items())
    title = f"{run.path} without {counted(count_of(ids), 'document')} ({documents})"
    console.table(title, ("stage", "first read", "goes on from", "steps again", "new run"), rows)

    console.line(f"steps to take again: {sum(repeat.repeated_steps for repeat in repeats.runs):,}")
    for remark in repeats.remarks:
        console.line(f"not undone: {remark}")


def train_without(run: RunDirectory, documents: Path, *, with_near_duplicates: bool, is_sure: bool) -> int:
    """Prints what it costs, asks, and trains the new runs, ancestors first. Returns the exit code of the launch.

    Args:
        documents: a file of ids.
        with_near_duplicates: whether documents that nearly equal one of these are left out, too.
        is_sure: whether nobody is asked.

    Raises:
        UserError: nobody can be asked; or as `documents_in`, `repeats_of` and a launch.
    """
    console, ids = Console(), documents_in(documents, run)
    if with_near_duplicates:
        more, lines = near_duplicates_in(run, ids)
        ids = merged(ids, more)
        for line in lines:
            console.line(line)

    repeats = repeats_of(run, ids)
    print_cost(run, ids, repeats, console)
    if not repeats.runs:
        console.line("no step has learned from these documents: nothing is to do")
        return 0
    if not is_sure:
        if not sys.stdin.isatty():
            raise UserError("nothing was started, because nobody can be asked: --yes starts it")
        if not typer.confirm("Train these runs?"):
            return 1

    words = ["data", "without", str(run.path), "--documents", str(documents)]
    words += ["--near-duplicates"] * with_near_duplicates
    for repeat in repeats.runs:
        if code := train(repeat, console, [*words, "--yes"]):
            return code
    return 0


def prepare(repeat: Repeat) -> None:
    """Makes the directory of a new run, with the ids that it leaves out."""
    repeat.new.create()
    if repeat.config.stage.document_mask:
        durable.write_text(Path(repeat.config.stage.without), text_of(repeat.without))


def train(repeat: Repeat, console: Console, words: Sequence[str]) -> int:
    """Trains a new run, or continues it. Returns the exit code of the launch.

    Args:
        words: of this verb, which continue it.

    Raises:
        UserError: as a launch.
    """
    from dist_lm.launch import carry_out, check_layouts, show_plan
    from dist_lm.prepare.plan import ContinuedRun, Plan, PlannedStage
    from dist_lm.stages.registry import load_config

    prepare(repeat)
    stage = stage_named(repeat.config.stage.name)
    look = stage.look(repeat.config, is_target=True, rebuilt=())

    # A run that was stopped goes on with the configuration that it began with.
    continued = None
    if look.action is Action.RESUME:
        continued = ContinuedRun(load_config(repeat.new.config), frozenset())
    plan = Plan((PlannedStage(stage, look.config, look.action, look.detail, look.phases, continued),))
    check_layouts(plan, dry_run=False)
    show_plan(plan, console)
    return carry_out(plan, console, words) if plan.missing else 0
