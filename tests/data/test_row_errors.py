"""Broken rows: counted for each source, also of one that ends at its limit, and written for people."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import rich.console

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.ingest import TextSplits
from dist_lm.data.inspect import print_corpus
from dist_lm.data.journal import REJECTED
from dist_lm.data.manifest import read_manifest
from dist_lm.data.screening import HOPELESS, IngestReport, RowErrors
from dist_lm.data.sources.reader import Candidate, Rejected
from dist_lm.data.sources.rows import rows_of_files
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.document import Document
from dist_lm.errors import ArtefactError
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.shards import builds
from dist_lm.tracking.console import Console
from tests.conftest import TINY_MODEL
from tests.data.reading import read_corpus

SOURCE = SourceConfig("jsonl", "english", path="a")
GOOD = Document("text", "english", "a:1", "", "00")
BAD = Rejected("english", "a:2", "broken_json", "broken JSON")


def errors_of(candidates: list[Candidate], most: float) -> tuple[int, str]:
    """`(candidates that come through, the error)`."""
    errors = RowErrors(SOURCE, most)
    n_through = len(list(errors.counted(candidates)))
    try:
        errors.check()
    except ArtefactError as error:
        return n_through, str(error)
    return n_through, ""


def test_the_fraction_decides_at_the_end_wherever_the_broken_rows_are():
    assert errors_of([BAD] * 2 + [GOOD] * 1998, 0.001) == (2000, "")
    assert errors_of([BAD] * 3 + [GOOD] * 1997, 0.001)[1].startswith("corpus source reader=jsonl: 3 of 2,000 rows are")
    assert errors_of([BAD], 0)[1].endswith("The first: a:2: broken JSON")
    assert errors_of([Rejected("english", "a:3", "empty")] * 50, 0) == (50, "")


def test_a_row_of_a_json_list_is_not_called_a_line(tmp_path: Path) -> None:
    """Fault: `a.json:2` sent people to the second line of a file that has four for each row."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a", "id": 1}, 3], indent=1))
    rows = rows_of_files(Snapshot.of(SourceConfig("jsonl", "english", path=str(path))))
    assert [row.location for row in rows] == [f"{path}:row 1", f"{path}:row 2"]


def test_a_source_that_is_mostly_broken_ends_early():
    n_through, error = errors_of([GOOD] + [BAD] * 10 * HOPELESS, 0.5)
    assert n_through == HOPELESS
    assert "1,000 of the first 1,001 rows are broken, most of them, so reader or column do not fit" in error
    assert "max_bad_fraction" not in error


@pytest.mark.parametrize(("n_good", "words"), [(0, "none of the first 40 rows"), (30, "40 of the first 70")])
def test_a_higher_limit_is_no_advice_where_most_rows_are_broken(n_good: int, words: str) -> None:
    """Finds the advice to raise a limit that would leave nothing, or hide a wrong reader."""
    _, error = errors_of([GOOD] * n_good + [BAD] * 40, 0.01)
    assert words in error
    assert "dist-lm data new" in error
    assert "max_bad_fraction" not in error


@pytest.mark.parametrize("n_bad", [1, 7, 33, 100])
def test_the_limit_that_is_advised_is_high_enough(n_bad: int) -> None:
    rows = [GOOD] * (1000 - n_bad) + [BAD] * n_bad
    _, error = errors_of(rows, 0.0001)
    advised = re.search(r"set that key to (0[.][0-9]+),", error)
    assert advised
    assert errors_of(rows, float(advised[1])) == (1000, "")
    assert float(advised[1]) < 1.2 * n_bad / 1000
    allowed = [GOOD, BAD, BAD] * HOPELESS
    assert errors_of(allowed, 0.8) == (len(allowed), "")  # nothing of it is left unread


def test_every_broken_row_is_written_with_its_place():
    rejected = io.StringIO()
    list(RowErrors(SOURCE, 1, rejected).counted([GOOD, BAD]))
    assert json.loads(rejected.getvalue()) == {
        "place": "a:2",
        "reason": "broken_json",
        "error": "broken JSON",
        "language": "english",
    }


def test_a_corpus_has_its_broken_rows_beside_it(work, tmp_path):
    rows = [json.dumps({"text": f"a line of text, number {i}\n" * 3}) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, '{"text": 5}']) + "\n")
    (tmp_path / "notes.md").write_text("no rows")
    source = SourceConfig("jsonl", "english", path=str(tmp_path), exclude=["work/"])
    config = compose_config(["stage=shards", *TINY_MODEL, "tokenizer.workers=1", f"work_dir={work.path}"])
    corpus = replace(config.corpus, corpora={"own": [source]}, max_bad_fraction=0.01)
    builds.build_corpus(replace(config, corpus=corpus), "own", TextSplits(corpus, 0), Console())
    line = json.loads((work.corpus("own") / REJECTED).read_text())
    assert (line["place"], line["reason"]) == (f"{tmp_path}/a.jsonl:301", "no_text")
    assert read_manifest(work.corpus("own")).ingest["languages"]["english"]["dropped"] == {"no_text": 1}
    console = rich.console.Console(file=io.StringIO(), width=300)
    print_corpus(work.corpus("own"), console)
    said = console.file.getvalue()  # pyright: ignore
    assert "1 file taken (" in said
    assert "2 left out (suffix .md: 1, exclude: 1)" in said


@pytest.mark.parametrize("limit", [0, 20])
def test_a_source_with_a_limit_is_checked_too(tmp_path, limit):
    rows = [json.dumps({"text": f"a line of text, number {i}\n" * 3}) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(["{", *rows]) + "\n")
    source = SourceConfig("jsonl", "english", path=str(tmp_path), limit=limit)
    with pytest.raises(ArtefactError, match=r"1 of (21|101) rows are broken, .*a.jsonl:1: broken JSON"):
        list(read_corpus(CorpusConfig("own", {"c": [source]}, 0.2), "c", 0, IngestReport()))
