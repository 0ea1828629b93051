"""Prints the content of a corpus: `python -m dist_lm data inspect CORPUS`."""

import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from zstandard import ZstdError

from dist_lm.data.exclusions import read_exclusions
from dist_lm.data.index import open_index
from dist_lm.data.inputs import Inputs
from dist_lm.data.journal import entries, journal_path, rows_state
from dist_lm.data.kept_decisions import decisions_state
from dist_lm.data.manifest import (
    Manifest,
    Shard,
    decisions_path,
    is_attached,
    manifest_path,
    read_manifest,
    shard_state,
)
from dist_lm.data.shard_writer import read_origins
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.readable import gib

SAMPLE_TOKENS = 160  # longest part shown of a document
LISTED_ORIGINS = 12
STATES = ("ok", "missing")  # states of a tar that a table shows; longer ones name files and get lines of their own
SEQ_LENS = (512, 768, 1024, 2048, 4096)  # the table shows the share of longer conversations for each of these


def inspect_corpus(directory: Path) -> dict[str, Any]:
    """Returns counts, integrity and origins of a corpus for JSON. Reads and hashes every tar.

    Damage of a tar or its origins is no error: it is the `state` of a shard (`ok` or what is wrong) or a line of
    `problems`, as is a file that the manifest does not name. A missing index is saved.

    Raises:
        ArtefactError: `directory` is not a corpus, its manifest or journal is damaged, or it has another format.
        OSError: a tar cannot be read, or an index cannot be written.
    """
    manifest = _manifest(directory)
    states = verify(directory, manifest)
    _, foreign_files = entries(directory)
    problems = [f"{name}: not in the manifest" for name in foreign_files]

    try:
        read_exclusions(directory, manifest)
    except ArtefactError as error:
        problems.append(str(error))
    # The tars of an attached corpus stay behind its URL, and so do the decisions.
    if manifest.decisions and not is_attached(directory):
        if (state := decisions_state(directory, manifest.decisions)) != "ok":
            problems.append(f"{decisions_path(directory).name}, which corpus.extends needs: {state}")

    licences: Counter[tuple[str, str]] = Counter()  # (language, licence) -> documents
    origins: Counter[str] = Counter()
    # A damaged tar cannot be trusted about its documents.
    for shard in (shard for split in manifest.splits.values() for shard in split.shards if states[shard.name] == "ok"):
        if (state := rows_state(directory / shard.name, shard)) != "ok":
            problems.append(f"rows of {shard.name}: {state}")
        try:
            _count_origins(directory / shard.name, shard, licences, origins)
        except (OSError, ValueError, KeyError, ZstdError) as error:
            problems.append(f"licences and sources of {shard.name} cannot be read: {error}")

    return {
        "directory": str(directory),
        "tokenizer_sha256": manifest.recipe.tokenizer_sha256,
        "corpus_fingerprint": manifest.recipe.corpus_fingerprint,
        "splits": {
            name: {
                "total": asdict(split.counts),
                "languages": {language: asdict(amounts) for language, amounts in split.languages.items()},
            }
            for name, split in manifest.splits.items()
        },
        "shards": [
            {**asdict(shard), "members": shard.n_members, "split": name, "state": states[shard.name]}
            for name, split in manifest.splits.items()
            for shard in split.shards
        ],
        "licences": [
            {"language": language, "licence": licence, "documents": documents}
            for (language, licence), documents in sorted(licences.items())
        ],
        "origins": [{"origin": origin, "documents": documents} for origin, documents in origins.most_common()],
        "ingest": manifest.ingest,
        "excluded": manifest.excluded.get("reasons", {}),
        "content": manifest.content,
        "inputs": manifest.inputs,
        "problems": problems,
    }


def licences_of(directory: Path, manifest: Manifest) -> Counter[str]:
    """Counts the documents of a corpus by licence, from the files beside its tars. No tar is read.

    Raises:
        ArtefactError: such a file cannot be read.
    """
    licences: Counter[str] = Counter()
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        try:
            licences.update(origin.licence for origin in read_origins(directory / shard.name))
        except (OSError, ValueError, KeyError, ZstdError) as error:
            raise ArtefactError(f"{directory / shard.name}: licences cannot be read ({error})") from error
    return licences


def verify(directory: Path, manifest: Manifest) -> dict[str, str]:
    """Compares every byte of every tar with the manifest: tar name -> `ok` or the difference. A missing index is saved.

    Raises:
        OSError: a tar cannot be read, or an index cannot be written.
    """
    return {
        shard.name: _state(directory, name, shard, manifest.recipe.vocab_size)
        for name, split in manifest.splits.items()
        for shard in split.shards
    }


def print_corpus(directory: Path, console: Console) -> bool:
    """Prints `inspect_corpus` and the beginning of a document of each language; without these if a tar is damaged.

    Reads and hashes every tar; a missing index is saved.

    Returns:
        Whether every tar is intact, the origins of its documents can be read, and the folder holds nothing else.

    Raises:
        ArtefactError: `directory` is not a corpus, its manifest or journal is damaged, or its train split is empty.
        OSError: a tar cannot be read, or an index cannot be written.
        UserError: the package `tokenizers` is needed and not installed.
    """
    summary = inspect_corpus(directory)
    console.print(Text(f"Corpus {summary['directory']}", style="bold"), soft_wrap=True)
    console.print(_language_table(summary["splits"]))
    console.print(_shard_table(summary["shards"]))
    lines = [f"{shard['name']}: {shard['state']}" for shard in summary["shards"] if shard["state"] not in STATES]
    console.print(_licence_table(summary["licences"]))
    if sources := summary["ingest"].get("sources"):
        lines += _ingest_lines(sources)
    lines += _origin_lines(summary["origins"])
    if reasons := summary["excluded"]:
        named = ", ".join(f"{reason} {times:,}" for reason, times in sorted(reasons.items()))
        lines += [
            f"Excluded, so that training leaves out their loss: {sum(reasons.values()):,} train documents ({named})"
        ]

    for inputs in map(Inputs.from_json, summary["inputs"]):
        if inputs.files:
            lines += [f"{inputs.files[0].name} ...: {inputs.summary()}"]
            lines += filter(None, [inputs.unread_archives()])
    # A table would cut a long path, and a path on two lines could not be copied.
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    for problem in summary["problems"]:
        console.print(Text(problem, style="yellow"), soft_wrap=True)

    # The samples are read from the tars, and would end in an error.
    if any(shard["state"] != "ok" for shard in summary["shards"]):
        console.print(Text("Some shards are damaged; no sample is shown.", style="red"))
        return False
    corpus = TokenCorpus.open(directory, "train")
    if corpus.has_mask:
        console.print(_longer_table(corpus))
    _print_samples(directory, summary["tokenizer_sha256"], console)
    return not summary["problems"]


def origin_of(source: str) -> str:
    """Returns the folder or data set of a document: its source without file name and row."""
    # Row numbers follow a colon or #, but the colon of a URL's scheme is followed by //.
    name = re.split(r"[:#](?!//)", source, maxsplit=1)[0]
    if name.startswith("/"):
        return str(Path(name).parent)
    return name


def _manifest(directory: Path) -> Manifest:
    """Returns the manifest of a corpus. If the folder is not a corpus, the error names corpora nearby.

    Raises:
        ArtefactError: the folder is not a corpus, or its manifest is damaged or of another format.
    """
    if manifest_path(directory).is_file():
        return read_manifest(directory)

    # Often it is the work directory, or a misspelt name beside the corpus.
    near = sorted(path.parent for folder in (directory, directory.parent) for path in folder.glob("*/manifest.json"))
    if near:
        raise ArtefactError(f"{directory} is not a corpus; these are: {', '.join(map(str, near))}")
    # A user may take the verb for one that looks at data; an unfinished build has a journal.
    if directory.exists() and not journal_path(directory).exists():
        raise ArtefactError(
            f"{directory} is not a corpus of stage=shards, such as work/corpora/code: to look at data, and write a "
            f"corpus file for it, use `dist-lm data new {directory} --out DIR/corpus/NAME.yaml`"
        )
    return read_manifest(directory)


def _state(directory: Path, split: str, shard: Shard, vocab_size: int) -> str:
    """Returns `ok`, or what is wrong with a tar. Reads it whole, but of an attached one only its members; a missing
    index is saved.

    Args:
        vocab_size: of the corpus; every token id must be below.

    Raises:
        OSError: the tar cannot be read, or the index cannot be written.
    """
    state = "ok"
    if not is_attached(directory):
        state = shard_state(directory / shard.name, shard, hashes=True)
    if state != "ok" or not shard.counts.documents:
        return state

    # The bytes are those that were written; members and ids must be right too.
    try:
        TokenCorpus(directory, split, [shard], vocab_size, is_saved=False).check()
    except ArtefactError as error:
        return str(error)
    return "ok"


def _count_origins(tar: Path, shard: Shard, licences: Counter[tuple[str, str]], origins: Counter[str]) -> None:
    """Counts the documents of a tar by (language, licence), and by origin.

    Raises:
        ArtefactError: the tar is damaged.
        OSError, ValueError, KeyError, ZstdError: the origins cannot be read, or are not those of the tar.
    """
    index = open_index(tar, shard)
    for code, document in zip(index.documents["language"].tolist(), list(read_origins(tar)), strict=True):
        licences[index.languages[code], document.licence] += 1
        origins[origin_of(document.source)] += 1


def _language_table(splits: dict[str, Any]) -> Table:
    """Returns a table of documents, tokens and bytes by split and language; a line `all` ends each split."""
    table = Table("split", "language", title="Text", title_justify="left")
    for name in ("documents", "tokens", "bytes", "bytes/token"):
        table.add_column(name, justify="right")
    for split, amounts in splits.items():
        for language, row in [*amounts["languages"].items(), ("all", amounts["total"])]:
            ratio = f"{row['bytes'] / row['tokens']:.2f}" if row["tokens"] else "-"
            figures = (f"{row[name]:,}" for name in ("documents", "tokens", "bytes"))
            table.add_row(split, language, *figures, ratio, end_section=language == "all")
    return table


def _shard_table(shards: list[dict[str, Any]]) -> Table:
    """Returns a table of the tars with their counts, sizes and states."""
    table = Table("shard", title="Shards", title_justify="left")
    for name in ("documents", "tokens", "size"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for shard in shards:
        amounts, state = shard["counts"], shard["state"]
        table.add_row(
            shard["name"],
            f"{amounts['documents']:,}",
            f"{amounts['tokens']:,}",
            gib(shard["size"]),
            Text(state if state in STATES else "damaged", style="green" if state == "ok" else "red"),
        )
    return table


def _ingest_lines(sources: dict[str, Any]) -> list[str]:
    """Returns the documents of each source: a line with the numbers that were read and kept, and the source; below it
    what was dropped, by reason, and replaced."""
    lines = ["What was read", f"{'documents':>12} {'kept':>12}  source"]
    for name, tally in sources.items():
        lines += [f"{tally['seen']:>12,} {tally['kept']:>12,}  {name}"]
        for words, counts in (("dropped", tally["dropped"]), ("replaced", tally["replaced"])):
            if counts:
                reasons = ", ".join(f"{reason} {times:,}" for reason, times in sorted(counts.items()))
                lines += [f"{'':>26} {words}: {reasons}"]
    return lines


def _licence_table(licences: list[dict[str, Any]]) -> Table:
    table = Table("language", "licence", title="Licences", title_justify="left")
    table.add_column("documents", justify="right")
    for row in licences:
        table.add_row(row["language"], Text(row["licence"] or "not given"), f"{row['documents']:,}")
    return table


def _origin_lines(origins: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each folder or data set, with its number of documents; the rest in one line."""
    lines = ["Sources", f"{'documents':>12}  source"]
    lines += [f"{row['documents']:>12,}  {row['origin']}" for row in origins[:LISTED_ORIGINS]]
    if rest := origins[LISTED_ORIGINS:]:
        lines += [f"{sum(row['documents'] for row in rest):>12,}  and {len(rest):,} more"]
    return lines


def _longer_table(corpus: TokenCorpus) -> Table:
    """Returns a table of the conversations that are too long for a sequence, for several `stage.seq_len`: training
    leaves them out.
    """
    table = Table("stage.seq_len", title="Conversations left out", title_justify="left")
    for name in ("conversations", "share"):
        table.add_column(name, justify="right")
    for seq_len in SEQ_LENS:
        # A sequence holds one more token than `seq_len`: the last target.
        longer = int((corpus.lengths > seq_len + 1).sum())
        table.add_row(f"{seq_len:,}", f"{longer:,}", f"{longer / max(1, corpus.n_documents):.1%}")
    return table


def _print_samples(directory: Path, tokenizer_sha256: str, console: Console) -> None:
    """Prints the beginning of the first document of each language of train.

    Needs the tokenizer of the corpus in the work directory, two folders above; without it, prints a line that says so.

    Raises:
        ArtefactError: train is empty or damaged, or the tokenizer cannot be read.
        UserError: the package that the tokenizer needs is not installed.
    """
    model = WorkDirectory(directory.resolve().parents[1]).tokenizer_model
    if not model.is_file() or durable.sha256_of(model) != tokenizer_sha256:
        console.print(
            Text(f"No samples: the tokenizer of this corpus is not at {model}.", style="yellow"), soft_wrap=True
        )
        return
    from dist_lm.tokenizer.tokenizer import Tokenizer  # imports SentencePiece, which most calls do not need

    tokenizer = Tokenizer.load(model)
    corpus = TokenCorpus.open(directory, "train")
    for code, language in enumerate(corpus.languages):
        document = int((corpus.language_codes == code).argmax())
        length = int(corpus.lengths[document])
        tokens = corpus.tokens(document, 1, min(length, 1 + SAMPLE_TOKENS))  # without the first end-of-text
        # Conversations have special tokens, which `decode` leaves out.
        text = "".join(tokenizer.pieces(tokens)) if corpus.has_mask else tokenizer.decode(tokens.tolist())
        if length > 1 + SAMPLE_TOKENS:
            text += " ..."
        console.print(Rule(Text(f"{language}: {length:,} tokens"), align="left"))
        console.print(Text(text))
