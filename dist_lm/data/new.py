"""`dist-lm data new PATH... --out DIR/corpus/NAME.yaml`: looks at data and writes a corpus file for it."""

import io
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_lm.config.corpus import CorpusConfig
from dist_lm.data.corpus_file import CONVERSATIONS, check_name, corpus_file, next_commands, one_line
from dist_lm.data.ingest import BYTES_PER_TOKEN, Texts
from dist_lm.data.propose import Proposal, check_text, is_prose, propose
from dist_lm.data.screening import IngestReport, source_name
from dist_lm.data.sources.opening import brief
from dist_lm.errors import ConfigError
from dist_lm.storage import durable
from dist_lm.tracking.readable import gib

GLANCE_BYTES = 16 << 20  # of text, to tell prose from code
SHARD_BYTES = 2  # a token, for vocabularies up to 65,536
SHOWN = 8  # licences of a corpus
NO_TEXT = (
    "conversations train no tokenizer: add a place with text, or tokenizer=PATH to the command (tokenizer=keep: that "
    "of the work directory)"
)
READABLE = 0.99  # share of broken rows up to which they are counted; a launch refuses fewer


@dataclass
class Survey:
    """What a corpus holds, as far as it was read."""

    report: IngestReport = field(default_factory=IngestReport)
    documents: Counter[str] = field(default_factory=Counter)  # by language
    bytes: Counter[str] = field(default_factory=Counter)  # UTF-8, by language
    licences: Counter[str] = field(default_factory=Counter)  # documents
    sources: Counter[str] = field(default_factory=Counter)  # documents
    broken: list[dict[str, str]] = field(default_factory=list)  # lines of rejected.jsonl
    is_whole: bool = True

    def worst_source(self) -> tuple[str, float]:
        """The source with the largest share of broken rows, and that share."""
        reasons = {one["reason"] for one in self.broken}
        shares = [("", 0.0)]
        for name, tally in self.report.sources.items():
            bad = sum(count for reason, count in tally.dropped.items() if reason in reasons)
            shares.append((name, bad / max(1, self.sources[name] + tally.seen)))
        return max(shares, key=lambda one: one[1])


def new_corpus(
    places: Sequence[str],
    out: Path,
    console: Console,
    *,
    sample_bytes: int,
    force: bool = False,
    taken: Sequence[str] = (),
) -> None:
    """Write the corpus file `out` for the data at `places`, and print what is there.

    Args:
        sample_bytes: text that is read of each corpus.
        force: replace an existing file.
        taken: the corpus files of dist_lm, whose names no other file may have.

    Raises:
        ConfigError: `out` is no place for a corpus file, there is no data, or its columns do not make documents.
    """
    _check_place(out, force, taken)
    for place in places:
        check_text("PATH", place)
    proposals = [proposal for place in places for proposal in propose(_absolute(place))]
    by_corpus = _by_corpus(proposals)
    config = CorpusConfig(
        name=out.stem,
        corpora={name: [one.typed() for one in ones] for name, ones in by_corpus.items()},
        max_bad_fraction=READABLE,
    )
    surveys = {name: survey(config, name, sample_bytes) for name in by_corpus}
    remarks = [line for found in surveys.values() if (line := _too_broken(found))]
    if list(by_corpus) == [CONVERSATIONS]:
        remarks.append(NO_TEXT)
    documents = {name: dict(found.documents.most_common()) for name, found in surveys.items()}
    command = ["dist-lm", "data", "new", *places, "--out", str(out)]
    durable.write_text(out, corpus_file(command, out, by_corpus, documents, remarks))
    for name, found in surveys.items():
        _print(name, found, by_corpus[name], console)
    console.print(Text(one_line(f"written: {out}"), style="bold"))
    for line in (*remarks, *next_commands(out, list(by_corpus))):
        console.print(Text(one_line(line)), soft_wrap=True)


def survey(config: CorpusConfig, corpus_name: str, sample_bytes: int) -> Survey:
    """Read a corpus, cleaned and without duplicates, up to `sample_bytes` of text."""
    found = Survey()
    broken = io.StringIO()
    for item in Texts(config, seed=0).screened(corpus_name, found.report, broken):
        document = item.document
        found.documents[document.language] += 1
        found.bytes[document.language] += item.n_bytes
        found.licences[document.licence or "not given"] += 1
        found.sources[source_name(item.source)] += 1
        if found.bytes.total() >= sample_bytes:
            found.is_whole = False
            break
    found.broken = [json.loads(line) for line in broken.getvalue().splitlines()]
    return found


def _too_broken(found: Survey) -> str:
    """What to do about a source of whose rows a launch would refuse so many broken ones; else empty."""
    most = CorpusConfig.max_bad_fraction
    name, share = found.worst_source()
    if share <= most:
        return ""
    first = found.broken[0]
    return (
        f"broken rows: {share:.1%} of {name}, more than corpus.max_bad_fraction={most:g}, so a launch refuses them: "
        f"mend them, or add a line `max_bad_fraction: {min(0.99, 1.5 * share):.2g}` to this file. "
        f"The first: {first['place']}: {first['error']}"
    )


def _check_place(out: Path, force: bool, taken: Sequence[str]) -> None:
    """Refuse a place where no launch would find the file, or where it cannot be written; the folder is created."""
    shown = one_line(f"--out {out}")
    if out.suffix != ".yaml" or out.parent.name != "corpus":
        raise ConfigError(f"{shown}: expected DIR/corpus/NAME.yaml, which `--config-dir DIR corpus=NAME` reads")
    check_name(out.stem, taken)
    if out.is_dir():
        raise ConfigError(f"{shown}: this is a folder: choose another name")
    if out.exists() and not force:
        raise ConfigError(f"{shown}: there is such a file: choose another name, or give --force to replace it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be written ({brief(error)}): choose a folder of your own") from error


def _absolute(place: str) -> str:
    """The place as the corpus file names it: it may be read from another folder."""
    return place if "://" in place else str(Path(place).expanduser().absolute())


def _by_corpus(proposals: Sequence[Proposal]) -> dict[str, list[Proposal]]:
    """The proposals by the corpora that the stages read: language, code and tools."""
    found: dict[str, list[Proposal]] = {}
    for one in proposals:
        config = CorpusConfig(name="new", corpora={"text": [one.typed()]}, max_bad_fraction=READABLE)
        prose = not one.conversations and is_prose(survey(config, "text", GLANCE_BYTES).bytes, one.is_code)
        found.setdefault(CONVERSATIONS if one.conversations else "language" if prose else "code", []).append(one)
    return {name: found[name] for name in ("language", "code", CONVERSATIONS) if name in found}


def _print(name: str, found: Survey, proposals: Sequence[Proposal], console: Console) -> None:
    read = "" if found.is_whole else f", the first {gib(found.bytes.total())} of text"
    table = Table("language", title=f"corpus {name}{read}", title_justify="left")
    table.add_column("documents", justify="right")
    table.add_column("bytes", justify="right")
    for language, documents in found.documents.most_common():
        table.add_row(Text(one_line(language)), f"{documents:,}", f"{found.bytes[language]:,}")
    table.add_row("all", f"{found.documents.total():,}", f"{found.bytes.total():,}")
    console.print(table)
    for proposal in proposals:
        console.print(Text(one_line(f"{proposal.source['path']}: {proposal.inputs.summary()}")), soft_wrap=True)
        for note in proposal.notes:
            console.print(Text(one_line(f"  {note}")), soft_wrap=True)
    licences = ", ".join(f"{licence} {count:,}" for licence, count in found.licences.most_common(SHOWN))
    console.print(Text(one_line(f"licences: {licences or 'none'}")), soft_wrap=True)
    dropped = sum((Counter(tally.dropped) for tally in found.report.languages.values()), Counter())
    counts = ", ".join(f"{reason} {count:,}" for reason, count in dropped.most_common()) or "nothing"
    console.print(Text(f"would be dropped: {counts}"), soft_wrap=True)
    for example in found.report.rejected[:SHOWN]:
        console.print(Text(one_line(f"  {example}")), soft_wrap=True)
    size = found.bytes.total() * SHARD_BYTES / BYTES_PER_TOKEN
    console.print(Text(f"shards: about {gib(int(size))} for what was read ({BYTES_PER_TOKEN} bytes a token)"))
