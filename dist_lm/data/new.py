"""`dist-lm data new PATH... --out DIR/corpus/NAME.yaml` looks at data and writes a corpus file for it."""

import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_lm.config.corpus import CorpusConfig
from dist_lm.data.corpus_file import (
    CONVERSATIONS,
    RANKINGS,
    are_labelled,
    check_name,
    corpus_file,
    next_commands,
    one_line,
    stage_overrides,
)
from dist_lm.data.ingest import BYTES_PER_TOKEN, TextSplits
from dist_lm.data.propose import PairColumns, Proposal, check_text, is_prose, propose
from dist_lm.data.screening import IngestReport, source_name
from dist_lm.data.sources.failures import brief
from dist_lm.data.sources.rows import MISSING_COLUMN
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.storage import durable, outputs
from dist_lm.tracking.readable import gib

GLANCE_BYTES = 16 << 20  # text that is read to tell prose from code
SHARD_BYTES = 2  # a token, for vocabularies up to 65,536
LISTED = 8  # licences and dropped items of a corpus that are printed
NO_TEXT = (
    "conversations alone: the tokenizer learns from them, and the model begins from nothing. With an open model, add "
    "stage.init_from=hf:FOLDER to the command"
)
MODEL_NEEDED = (
    "preferences alone: they need a model. FOLDER is that of an open model (docs/in_and_out.md), and a run may "
    "stand in place of hf:FOLDER"
)
LABELLED = "single answers, wanted or not: stage preference learns from them by KTO, and stage reward cannot"
MOST_REMEDIES = 4  # settings that are tried before a file is refused
READABLE = 0.99  # share of broken rows up to which they are counted; a launch refuses fewer


@dataclass
class Survey:
    """Counts of a corpus, as far as it was read."""

    report: IngestReport = field(default_factory=IngestReport)
    documents: Counter[str] = field(default_factory=Counter)  # language -> documents
    bytes: Counter[str] = field(default_factory=Counter)  # language -> bytes in UTF-8
    licences: Counter[str] = field(default_factory=Counter)  # licence -> documents
    sources: Counter[str] = field(default_factory=Counter)  # source -> documents
    broken: list[dict[str, str]] = field(default_factory=list)  # lines of rejected.jsonl
    is_whole: bool = True

    def worst_source(self) -> tuple[str, float]:
        """Returns the source with the largest share of broken rows among those read, and that share in [0, 1]; ("", 0)
        if no row is broken. The first of equal ones."""
        reasons = {row["reason"] for row in self.broken}
        shares = [("", 0.0)]
        for name, tally in self.report.sources.items():
            # No document is counted as kept here, so `seen` has only the dropped ones.
            n_broken = sum(count for reason, count in tally.dropped.items() if reason in reasons)
            shares.append((name, n_broken / max(1, self.sources[name] + tally.seen)))
        return max(shares, key=lambda name_and_share: name_and_share[1])


@dataclass(frozen=True)
class Remedy:
    """Settings that make the first command of a corpus file run."""

    reason: str  # a line for people
    settings: Mapping[str, Any] = field(default_factory=dict)  # keys of the group `corpus`, for the file
    overrides: Sequence[str] = ()  # words for the commands


@dataclass(frozen=True)
class Origin:
    """The command that writes a corpus file together with an experiment, which trains on it."""

    written_by: Sequence[str]  # words of the command line that was typed
    launch: str  # the command line of the experiment


Trial = Callable[[Path, Sequence[str]], Remedy | None]  # takes a configuration folder and overrides; raises UserError


def new_corpus(
    paths: Sequence[str],
    out: Path,
    console: Console,
    *,
    sample_bytes: int,
    force: bool = False,
    reserved_names: Sequence[str] = (),
    trial: Trial | None = None,
    origin: Origin | None = None,
    question: str = "",
    answer: str = "",
    pair: PairColumns | None = None,
) -> dict[str, Survey]:
    """Writes the corpus file `out` for data, and prints what the data holds. Returns the counts by corpus.

    The data is read, perhaps from URLs, and counted before the file is written. Nothing is left after an error.

    Args:
        paths: files, folders, globs or URLs of the data.
        sample_bytes: text that is read of each corpus, in bytes.
        force: replace an existing file.
        reserved_names: the corpus files of dist_lm, whose names no other file may have.
        trial: tries the first command of the file on a copy elsewhere, and returns what would make it run; None: the
            command is not tried.
        origin: of a file that comes with an experiment: nothing but its launch trains on the file, and the caller
            prints what was written; None: the file is that of `dist-lm data new`.
        question, answer: columns of a question and of its answer in all data; empty: what the rows hold is recognised.
        pair: columns of preferences in all data; None or false: they are recognised.

    Raises:
        ConfigError: `out` is no path for a corpus file, there is no data, its columns do not make documents, or it has
            too many languages.
        ArtefactError: data cannot be listed or read, gives no document, or nearly all of its rows are broken (fewer
            broken rows are printed and noted in the file); or no settings make the first command run.
        UserError: the first command of the file must fail; the file is not written.
        OSError: a file cannot be read.
    """
    _check_out(out, force, reserved_names)
    for path in paths:
        check_text("PATH", path)
    require_pair(question, answer)
    pair = pair or PairColumns()
    pair.check()
    if question and pair:
        raise ConfigError("--question and --chosen-column: rows are conversations or preferences: give each in a call")
    proposals = [proposal for path in paths for proposal in propose(_absolute(path), question, answer, pair)]
    by_corpus = _by_corpus(proposals)

    # Broken rows are counted and reported here, so that nearly any share of them is accepted.
    config = CorpusConfig(
        name=out.stem,
        corpora={name: [source.typed() for source in sources] for name, sources in by_corpus.items()},
        max_bad_fraction=READABLE,
    )
    surveys = {name: survey(config, name, sample_bytes) for name in by_corpus}
    for name, corpus_survey in surveys.items():
        _refuse_other_columns(corpus_survey, [path for source in config.corpora[name] for path in source.path or []])
    remarks = [line for corpus_survey in surveys.values() if (line := _too_broken(corpus_survey))]
    settings: dict[str, Any] = {}
    if remarks:
        settings["max_bad_fraction"] = max(_accepted_fraction(corpus_survey) for corpus_survey in surveys.values())
    if not origin and list(by_corpus) == [CONVERSATIONS]:
        remarks.append(NO_TEXT)
    if list(by_corpus) == [RANKINGS]:
        remarks.append(MODEL_NEEDED)

    documents = {name: dict(corpus_survey.documents.most_common()) for name, corpus_survey in surveys.items()}
    written_by = ["dist-lm", "data", "new", *paths, *pair_words(question, answer), *pair.words(), "--out", str(out)]
    overrides: list[str] = []
    labelled = are_labelled(by_corpus)
    if labelled:
        remarks.append(LABELLED)
    first_command = next(stage_overrides(out.stem, [*by_corpus], labelled))
    for _ in range(MOST_REMEDIES):
        launches = [*next_commands(out, list(by_corpus), overrides, labelled)]
        if origin:
            written_by, launches = [*origin.written_by], [origin.launch]
        text = corpus_file(written_by, launches, out, by_corpus, documents, remarks, settings)
        remedy = trial and _tried(trial, text, out.stem, [*first_command, *overrides])
        if not remedy:
            break
        remarks.append(remedy.reason)
        settings |= remedy.settings
        overrides += remedy.overrides
    else:
        raise ArtefactError(f"no settings were found with which a launch runs; the last that was tried: {remarks[-1]}")
    _write(out, text, force)

    for name, corpus_survey in surveys.items():
        _print(name, corpus_survey, by_corpus[name], settings.get("val_fraction", CorpusConfig.val_fraction), console)
    if not origin:
        console.print(Text(one_line(f"written: {out}"), style="bold"))
        remarks += launches
    for line in remarks:
        console.print(Text(one_line(line)), soft_wrap=True)
    return surveys


def require_pair(question: str, answer: str) -> None:
    """Refuses a column of questions without one of answers, and the reverse; returns nothing.

    Raises:
        ConfigError: names the option that is missing.
    """
    if bool(question) != bool(answer):
        missing = "--answer" if question else "--question"
        raise ConfigError(f"{missing}: missing; expected --question COLUMN and --answer COLUMN together")


def pair_words(question: str, answer: str) -> list[str]:
    """Returns the words of a command that name the columns of questions and answers; none without them."""
    return ["--question", question, "--answer", answer] if question else []


def _write(out: Path, text: str, force: bool) -> None:
    """Writes the corpus file, and the folders above it.

    Raises:
        ConfigError: without `force`, there is such a file by now; or a folder cannot be made.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            one_line(f"--out {out}: cannot be written ({brief(error)}): choose a folder of your own")
        ) from error
    if force:
        durable.write_text(out, text)
        return
    try:
        durable.write_new_text(out, text)
    except FileExistsError:
        raise ConfigError(
            one_line(f"--out {out}: another process has written this file meanwhile; it is left as it is")
        ) from None


def survey(config: CorpusConfig, corpus_name: str, sample_bytes: int) -> Survey:
    """Returns the counts of a corpus, read, cleaned and without duplicates.

    Reading ends with the document that reaches `sample_bytes` of text in UTF-8; then `is_whole` is False.

    Raises:
        ConfigError, ArtefactError: as `screening.screened`.
    """
    counts = Survey()
    rejected = io.StringIO()
    for record in TextSplits(config, seed=0).screened(corpus_name, counts.report, rejected):
        document = record.document
        counts.documents[document.language] += 1
        counts.bytes[document.language] += record.n_bytes
        counts.licences[document.licence or "not given"] += 1
        counts.sources[source_name(record.source_config)] += 1
        if counts.bytes.total() >= sample_bytes:
            counts.is_whole = False
            break
    counts.broken = [json.loads(line) for line in rejected.getvalue().splitlines()]
    return counts


def _tried(trial: Trial, text: str, name: str, overrides: Sequence[str]) -> Remedy | None:
    """Returns what `trial` returns for a corpus file in a temporary folder.

    Args:
        text: that of the file.
        name: that of the file, without its suffix.
        overrides: those of its first command.

    Raises:
        UserError: the command must fail; OSError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="dist_lm_new_") as folder:
        path = Path(folder) / "corpus" / f"{name}.yaml"
        path.parent.mkdir()
        path.write_text(text, encoding="utf-8")
        return trial(Path(folder), overrides)


def _accepted_fraction(counts: Survey) -> float:
    """Returns a value of `corpus.max_bad_fraction` that accepts the broken rows of a corpus."""
    return max(CorpusConfig.max_bad_fraction, float(f"{min(0.99, 1.5 * counts.worst_source()[1]):.2g}"))


def _refuse_other_columns(counts: Survey, paths: Sequence[str]) -> None:
    """Refuses files of several kinds as one source. Their rows are not damaged: to skip them would lose data.

    Args:
        paths: those of the sources; a file among them has no others beside it.

    Raises:
        ConfigError: most rows that a launch would refuse lack a column that other files of their source have.
    """
    name, share = counts.worst_source()
    without_column = [row for row in counts.broken if row["reason"] == MISSING_COLUMN]
    files = list(dict.fromkeys(row["place"].rpartition(":")[0] for row in without_column))
    if share <= CorpusConfig.max_bad_fraction or 2 * len(without_column) <= len(counts.broken):
        return
    if not set(files).isdisjoint(paths):
        return

    rest = f" and {len(files) - LISTED} more" if len(files) > LISTED else ""
    raise ConfigError(
        f"{share:.1%} of the rows of {name} have other columns, in {', '.join(files[:LISTED])}{rest}. "
        "Give each kind of file separately, as in `dist-lm data new FILE FILE`: each gets a source of its own. "
        f"The first: {without_column[0]['place']}: {without_column[0]['error']}"
    )


def _too_broken(counts: Survey) -> str:
    """Returns advice about the source with the largest share of broken rows, if a launch would refuse it; else an empty
    text.
    """
    limit = CorpusConfig.max_bad_fraction
    name, share = counts.worst_source()
    if share <= limit:
        return ""

    accepted = _accepted_fraction(counts)
    advice = (
        f"broken rows: {share:.1%} of {name}, more than corpus.max_bad_fraction={limit:g}, so this file raises it, and "
        f"a launch skips them: mend them, or keep `max_bad_fraction: {accepted:g}`"
    )
    if share > 0.5:
        advice = (
            f"broken rows: {share:.1%} of {name}, most of them, so its reader or column may not fit these files: check "
            f"them first. With `max_bad_fraction: {accepted:g}` a launch skips these rows"
        )
    first = counts.broken[0]
    return f"{advice}. The first: {first['place']}: {first['error']}"


def _check_out(out: Path, force: bool, reserved_names: Sequence[str]) -> None:
    """Refuses a path where no launch would find the file, or where it cannot be written; returns nothing.

    Args:
        force: whether an existing file may be replaced.
        reserved_names: the corpus files of dist_lm.

    Raises:
        ConfigError: says what is wrong with the path.
    """
    outputs.new_file("--out", out, force=force)
    option = one_line(f"--out {out}")
    if out.suffix != ".yaml" or out.parent.name != "corpus":
        raise ConfigError(f"{option}: expected DIR/corpus/NAME.yaml, which `--config-dir DIR corpus=NAME` reads")
    check_name(out.stem, reserved_names)


def _absolute(path: str) -> str:
    """Returns the path or URL as the corpus file names it: absolute, because a launch may start in another folder."""
    if "://" in path:
        return path
    return str(Path(path).expanduser().absolute())


def _by_corpus(proposals: Sequence[Proposal]) -> dict[str, list[Proposal]]:
    """Groups the proposals by the corpora that the stages read: language, code, tools and rankings, in this order.

    Reads about `GLANCE_BYTES` of each source of texts to tell prose from code. Corpora without a source are left out.

    Raises:
        ConfigError, ArtefactError: as `survey`.
    """
    by_corpus: dict[str, list[Proposal]] = {"language": [], "code": [], CONVERSATIONS: [], RANKINGS: []}
    for proposal in proposals:
        # The readers give the languages, so a part of the text is read for the decision.
        config = CorpusConfig(name="new", corpora={"text": [proposal.typed()]}, max_bad_fraction=READABLE)
        if proposal.preferences:
            by_corpus[RANKINGS].append(proposal)
        elif proposal.conversations:
            by_corpus[CONVERSATIONS].append(proposal)
        elif is_prose(survey(config, "text", GLANCE_BYTES).bytes, proposal.is_code):
            by_corpus["language"].append(proposal)
        else:
            by_corpus["code"].append(proposal)
    return {name: sources for name, sources in by_corpus.items() if sources}


def _print(name: str, counts: Survey, proposals: Sequence[Proposal], val_fraction: float, console: Console) -> None:
    """Prints the counts of a corpus, its sources and licences, what a build would drop and hold out, and the size of
    shards.

    Args:
        val_fraction: that of the corpus file.
    """
    part = "" if counts.is_whole else f", the first {gib(counts.bytes.total())} of text"
    table = Table("language", title=f"corpus {name}{part}", title_justify="left")
    table.add_column("documents", justify="right")
    table.add_column("bytes", justify="right")
    for language, n_documents in counts.documents.most_common():
        table.add_row(Text(one_line(language)), f"{n_documents:,}", f"{counts.bytes[language]:,}")
    table.add_row("all", f"{counts.documents.total():,}", f"{counts.bytes.total():,}")
    console.print(table)

    # Names of files and licences are data: `one_line` keeps control characters away from the terminal.
    for proposal in proposals:
        console.print(Text(one_line(f"{proposal.source['path']}: {proposal.inputs.summary()}")), soft_wrap=True)
        for note in proposal.notes:
            console.print(Text(one_line(f"  {note}")), soft_wrap=True)

    licences = ", ".join(f"{licence} {count:,}" for licence, count in counts.licences.most_common(LISTED))
    console.print(Text(one_line(f"licences: {licences or 'none'}")), soft_wrap=True)
    dropped = sum((Counter(tally.dropped) for tally in counts.report.languages.values()), Counter())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.most_common()) or "nothing"
    console.print(Text(f"would be dropped: {reasons}"), soft_wrap=True)
    for example in counts.report.rejected[:LISTED]:
        console.print(Text(one_line(f"  {example}")), soft_wrap=True)

    n_documents = counts.documents.total()
    val = f"about {max(1, round(val_fraction * n_documents)):,} of {n_documents:,} documents"
    console.print(Text(f"val: {val} (corpus.val_fraction={val_fraction:g})"), soft_wrap=True)
    size = counts.bytes.total() * SHARD_BYTES / BYTES_PER_TOKEN
    console.print(Text(f"shards: about {gib(int(size))} for what was read ({BYTES_PER_TOKEN} bytes a token)"))
