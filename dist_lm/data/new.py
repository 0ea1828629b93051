"""`dist-lm data new PATH... --out DIR/corpus/NAME.yaml`: looks at data and writes a corpus file for it."""

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_lm.config.corpus import CorpusConfig
from dist_lm.data.ingest import BYTES_PER_TOKEN, Texts
from dist_lm.data.propose import Proposal, is_prose, propose
from dist_lm.data.screening import IngestReport
from dist_lm.errors import ConfigError
from dist_lm.storage import durable
from dist_lm.tracking.readable import gib

GLANCE_BYTES = 16 << 20  # of text, to tell prose from code
SHARD_BYTES = 2  # a token, for vocabularies up to 65,536
SHOWN = 8  # licences of a corpus
CONVERSATIONS = "tools"  # corpus that stage=tools reads


@dataclass
class Survey:
    """What a corpus holds, as far as it was read."""

    report: IngestReport = field(default_factory=IngestReport)
    documents: Counter[str] = field(default_factory=Counter)  # by language
    bytes: Counter[str] = field(default_factory=Counter)  # UTF-8, by language
    licences: Counter[str] = field(default_factory=Counter)  # documents
    is_whole: bool = True


def new_corpus(places: Sequence[str], out: Path, console: Console, *, sample_bytes: int, force: bool = False) -> None:
    """Write the corpus file `out` for the data at `places`, and print what is there.

    Args:
        sample_bytes: text that is read of each corpus.
        force: replace an existing file.

    Raises:
        ConfigError: `out` is no place for a corpus file, or there is no data.
    """
    _check_place(out, force)
    proposals = [proposal for place in places for proposal in propose(_absolute(place))]
    by_corpus = _by_corpus(proposals)
    config = CorpusConfig(
        name=out.stem, corpora={name: [one.typed() for one in ones] for name, ones in by_corpus.items()}
    )
    surveys = {name: survey(config, name, sample_bytes) for name in by_corpus}
    out.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(out, corpus_file(places, out, by_corpus, surveys))
    for name, found in surveys.items():
        _print(name, found, by_corpus[name], console)
    console.print(Text(f"written: {out}", style="bold"))
    for command in next_commands(out, list(by_corpus)):
        console.print(Text(command), soft_wrap=True)


def survey(config: CorpusConfig, corpus_name: str, sample_bytes: int) -> Survey:
    """Read a corpus, cleaned and without duplicates, up to `sample_bytes` of text."""
    found = Survey()
    for item in Texts(config, seed=0).screened(corpus_name, found.report):
        document = item.document
        found.documents[document.language] += 1
        found.bytes[document.language] += item.n_bytes
        found.licences[document.licence or "not given"] += 1
        if found.bytes.total() >= sample_bytes:
            found.is_whole = False
            break
    return found


def corpus_file(
    places: Sequence[str], out: Path, by_corpus: Mapping[str, Sequence[Proposal]], surveys: Mapping[str, Survey]
) -> str:
    """The text of the corpus file."""
    lines = [f"# Written by: dist-lm data new {shlex.join(places)} --out {shlex.quote(str(out))}"]
    lines += [f"#   {command}" for command in next_commands(out, list(by_corpus))]
    lines += [f"name: {yaml.safe_dump(out.stem).splitlines()[0]}", "corpora:"]
    for name, proposals in by_corpus.items():
        lines += [f"  {name}:"]
        for proposal in proposals:
            lines += [f"    # {proposal.inputs.summary()}", *(f"    # {note}" for note in proposal.notes)]
            source = dict(proposal.source)
            if "licence_column" not in source:
                source["licence"] = ""
            first, *rest = yaml.safe_dump(source, sort_keys=False, width=1000, allow_unicode=True).splitlines()
            lines += [f"    - {first}", *(f"      {line}" for line in rest)]
            if "licence_column" not in source:
                lines[-1] += "  # of all documents, such as MIT; data inspect counts documents by licence"
        languages = ", ".join(f"{language} {count:,}" for language, count in surveys[name].documents.most_common())
        lines += [f"    # documents: {languages}"]
    return "\n".join([*lines, ""])


def next_commands(out: Path, corpora: Sequence[str]) -> Iterator[str]:
    """How to train on the file."""
    # in the order of the pipeline; each stage starts from the model of the one before
    stages = [name for name in ("language", "code", CONVERSATIONS) if name in corpora]
    words = ["python", "-m", "dist_lm.launch", "--config-dir", str(out.parent.parent), f"corpus={out.stem}"]
    alone = {"code": ["stage.init_from=none"], CONVERSATIONS: ["stage.init_from=none", "stage.mix=null"]}
    for place, stage in enumerate(stages):
        extra = alone.get(stage, []) if place == 0 else []
        yield shlex.join([*words, f"stage={stage}", *extra])


def _check_place(out: Path, force: bool) -> None:
    if out.suffix != ".yaml" or out.parent.name != "corpus":
        raise ConfigError(f"--out {out}: expected DIR/corpus/NAME.yaml, which `--config-dir DIR corpus=NAME` reads")
    if out.exists() and not force:
        raise ConfigError(f"--out {out}: there is such a file: choose another name, or give --force to replace it")


def _absolute(place: str) -> str:
    """The place as the corpus file names it: it may be read from another folder."""
    return place if "://" in place else str(Path(place).expanduser().absolute())


def _by_corpus(proposals: Sequence[Proposal]) -> dict[str, list[Proposal]]:
    """The proposals by the corpora that the stages read: language, code and tools."""
    found: dict[str, list[Proposal]] = {}
    for one in proposals:
        config = CorpusConfig(name="new", corpora={"text": [one.typed()]})
        prose = not one.conversations and is_prose(survey(config, "text", GLANCE_BYTES).bytes)
        found.setdefault(CONVERSATIONS if one.conversations else "language" if prose else "code", []).append(one)
    return {name: found[name] for name in ("language", "code", CONVERSATIONS) if name in found}


def _print(name: str, found: Survey, proposals: Sequence[Proposal], console: Console) -> None:
    read = "" if found.is_whole else f", the first {gib(found.bytes.total())} of text"
    table = Table("language", title=f"corpus {name}{read}", title_justify="left")
    table.add_column("documents", justify="right")
    table.add_column("bytes", justify="right")
    for language, documents in found.documents.most_common():
        table.add_row(language, f"{documents:,}", f"{found.bytes[language]:,}")
    table.add_row("all", f"{found.documents.total():,}", f"{found.bytes.total():,}")
    console.print(table)
    for proposal in proposals:
        console.print(Text(f"{proposal.source['path']}: {proposal.inputs.summary()}"), soft_wrap=True)
        for note in proposal.notes:
            console.print(Text(f"  {note}"), soft_wrap=True)
    licences = ", ".join(f"{licence} {count:,}" for licence, count in found.licences.most_common(SHOWN))
    console.print(Text(f"licences: {licences or 'none'}"), soft_wrap=True)
    dropped = sum((Counter(tally.dropped) for tally in found.report.languages.values()), Counter())
    counts = ", ".join(f"{reason} {count:,}" for reason, count in dropped.most_common()) or "nothing"
    console.print(Text(f"would be dropped: {counts}"), soft_wrap=True)
    for example in found.report.rejected[:SHOWN]:
        console.print(Text(f"  {example}"), soft_wrap=True)
    size = found.bytes.total() * SHARD_BYTES / BYTES_PER_TOKEN
    console.print(Text(f"shards: about {gib(int(size))} for what was read ({BYTES_PER_TOKEN} bytes a token)"))
