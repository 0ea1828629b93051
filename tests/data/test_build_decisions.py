"""A build by tasks keeps the same documents in the same splits as a build in one process."""

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from dist_lm.config.corpus import CleaningConfig, CorpusConfig, SourceConfig
from dist_lm.data.build_decisions import decide, documents_of, kept_documents
from dist_lm.data.build_plan import BuildTask, plan_source
from dist_lm.data.ingest import split_documents
from dist_lm.data.inputs import inputs_of
from dist_lm.data.screening import IngestReport
from dist_lm.data.sources.files import by_repository

PLACES = set[tuple[str, str, str]]  # (corpus, split, place of a document)
SECRET = "ghp_0123456789abcdefghijABCDEFGHIJ012345"


def random_text(generator: random.Random, earlier: Sequence[str]) -> str:
    """Returns a text of its own, or an earlier one: whole, with other line ends, or as a part of a longer one."""
    text = "\n".join(" ".join(f"w{generator.randrange(10**6)}" for _ in range(8)) for _ in range(5))
    kind = generator.random()
    if not earlier or kind < 0.5:
        return text
    copied = generator.choice(earlier)
    if kind < 0.65:
        return copied
    if kind < 0.75:
        return copied.replace("\n", "\r\n")
    if kind < 0.9:
        return f"{copied}\n{text}"
    return generator.choice(["", "x" * 2000, f"{text} me@example.org {SECRET}", "one two", f"{text} one two {text}"])


def write_corpora(folder: Path, generator: random.Random, held_out: bool) -> CorpusConfig:
    """Returns two corpora of rows and files: with copies in one corpus and across both, licences, and broken rows."""
    earlier: list[str] = []
    corpora: dict[str, list[SourceConfig]] = {}
    for corpus in ("first", "second"):
        for number in range(3):
            lines = []
            for _ in range(15):
                earlier.append(random_text(generator, earlier))
                row = {"text": earlier[-1], "licence": generator.choice(["mit", "gpl-3.0"])}
                lines.append("broken" if generator.random() < 0.05 else json.dumps(row))
            path = folder / corpus / "rows" / f"{number}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines))
        for number in range(20):
            earlier.append(random_text(generator, earlier))
            path = folder / corpus / "code" / f"project{number % 4}" / f"{number}.py"
            (path.parent / ".git").mkdir(parents=True, exist_ok=True)
            path.write_text(earlier[-1], newline="")

        corpora[corpus] = [
            SourceConfig("jsonl", "english", path=[f"{folder / corpus / 'rows'}/*.jsonl"], licence_column="licence"),
            SourceConfig("files", "", licence="mit", path=[str(folder / corpus / "code")]),
        ]
    if held_out:
        (folder / "val.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in earlier[::9] if text.strip())
        )
        corpora["second"].append(
            SourceConfig("jsonl", "english", path=[str(folder / "val.jsonl")], licence="mit", held_out=True)
        )

    cleaning = CleaningConfig(licences=["mit"]) if generator.random() < 0.5 else CleaningConfig()
    return CorpusConfig(
        "test",
        corpora,
        val_fraction=0.3,
        val_tokens=4000 if held_out else 700,
        max_document_bytes=1500,
        max_bad_fraction=0.5,
        cleaning=cleaning,
    )


def plan(config: CorpusConfig, task_bytes: int) -> tuple[list[BuildTask], dict]:
    tasks, listings = [], {}
    for corpus, sources in config.corpora.items():
        for number, source in enumerate(sources):
            listing = listings[corpus, number] = inputs_of(source)
            files = [(file, "") for file in listing.taken]
            if source.reader == "files":
                files = by_repository(listing, source.path or [])
            tasks += plan_source(corpus, number, files, task_bytes)
    return tasks, listings


def in_random_order(generator: random.Random, function: Callable, tasks: Sequence[BuildTask]) -> list:
    results = {}
    for number in generator.sample(range(len(tasks)), len(tasks)):
        results[number] = function(tasks[number])
    return [results[number] for number in range(len(tasks))]


def kept_by_tasks(config: CorpusConfig, task_bytes: int, generator: random.Random) -> PLACES:
    tasks, listings = plan(config, task_bytes)
    read = partial(documents_of, config, 0, listings)
    rule, dropped = decide(config, tasks, read, partial(in_random_order, generator))
    return {
        (task.corpus, split, record.document.source)
        for task, task_dropped in zip(tasks, dropped, strict=True)
        for split, record in kept_documents(read(task), task.corpus, rule, task_dropped)
    }


def kept_in_one_process(config: CorpusConfig) -> PLACES:
    return {
        (corpus, split, document.source)
        for corpus in config.corpora
        for split, document, _ in split_documents(config, corpus, 0, IngestReport())
    }


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_tasks_keep_what_one_process_keeps(tmp_path, seed, held_out):
    """Would find another winner of equal texts, another share of val, and val text that stays in train."""
    generator = random.Random(seed)
    config = write_corpora(tmp_path, generator, held_out)
    expected = kept_in_one_process(config)
    assert {split for _, split, _ in expected} == {"train", "val"}
    for task_bytes in (1, 3000, 1 << 30):
        assert kept_by_tasks(config, task_bytes, generator) == expected
