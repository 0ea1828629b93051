"""Which of equal texts stays in a build by one process, and what the columns that decide may hold."""

import csv
import json
import math
import random
import tarfile
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import feather, parquet

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.ingest import TextSplits
from dist_lm.data.screening import IngestReport
from dist_lm.data.sources.reader import Rejected, reader_of
from dist_lm.data.sources.stars_and_time import CellError, stars_of, time_of
from dist_lm.document import NO_STARS, NO_TIME, Document
from dist_lm.errors import ConfigError

MARCH = 1427155200.0  # 2015-03-24
COLUMNS = {"stars_column": "stars", "time_column": "created"}


@pytest.mark.parametrize(
    ("cell", "stars"),
    [
        (0, 0),
        (12.0, 12),
        ("12", 12),
        (b" 12 ", 12),
        (Decimal(3), 3),
        (None, NO_STARS),
        (math.nan, NO_STARS),
        ("", NO_STARS),
        ("NaN", NO_STARS),
        (-1, None),
        (math.inf, None),
        ("many", None),
        (True, None),
        ([3], None),
        (10**400, None),
        ("9" * 99_999, 0),
    ],
)
def test_stars_are_numbers(cell: object, stars: float | None) -> None:
    """Would find a cell that passes for a number, and a problem that is told in megabytes."""
    if stars is None or (isinstance(cell, str) and len(cell) > 99):
        with pytest.raises(CellError, match=r"^stars holds .*, expected a number of stars, 0 or more$") as error:
            stars_of(cell, "stars")
        assert error.value.reason == "bad_stars"
        assert len(str(error.value)) < 200
    else:
        assert stars_of(cell, "stars") == stars


@pytest.mark.parametrize(
    ("cell", "time"),
    [
        ("2015-03-24", MARCH),
        ("2015-03-24T02:00:00+02:00", MARCH),
        (b"2015-03-24T00:00:00Z", MARCH),
        ("1427155200", MARCH),
        (int(MARCH), MARCH),
        (-5.5, -5.5),
        (date(2015, 3, 24), MARCH),
        (datetime(2015, 3, 24), MARCH),
        (datetime(2015, 3, 24, 2, tzinfo=timezone(timedelta(hours=2))), MARCH),
        (None, NO_TIME),
        (math.nan, NO_TIME),
        (" ", NO_TIME),
        (-math.inf, None),
        ("yesterday", None),
        (False, None),
        ({}, None),
    ],
)
def test_times_are_dates_or_seconds(cell: object, time: float | None) -> None:
    """Would find a zone that is passed over, and a cell that passes for a time."""
    if time is None:
        with pytest.raises(CellError, match=r"^created holds .*, expected a date of ISO 8601 or seconds since 1970$"):
            time_of(cell, "created")
    else:
        assert time_of(cell, "created") == time


ROWS: list[dict[str, Any]] = [
    {"txt": "a text of stars", "stars": 3, "created": datetime(2015, 3, 24, tzinfo=UTC)},
    {"txt": "a text without", "stars": None, "created": None},
]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row, default=str) + "\n" for row in ROWS))


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(ROWS):
            for extension, content in (("txt", row["txt"]), ("json", json.dumps(row, default=str))):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content.encode()))


WRITERS = {
    "jsonl": (write_jsonl, "jsonl"),
    "csv": (write_csv, "csv"),
    "tars": (write_tar, "tar"),
    "parquet": (lambda path: parquet.write_table(pyarrow.Table.from_pylist(ROWS), path), "parquet"),
    "arrow": (lambda path: feather.write_feather(pyarrow.Table.from_pylist(ROWS), path), "feather"),
}


@pytest.mark.parametrize("reader", WRITERS)
def test_rows_of_any_format_give_stars_and_times(tmp_path: Path, reader: str) -> None:
    """Would find a format whose columns are not fetched, or whose types are not understood."""
    write, suffix = WRITERS[reader]
    path = tmp_path / f"rows.{suffix}"
    write(path)
    source = SourceConfig(reader, "english", path=[str(path)], column="txt", **COLUMNS)
    documents = [*reader_of(source)(source, 0)]
    assert all(isinstance(document, Document) for document in documents), documents
    assert [(d.stars, d.time) for d in documents] == [(3, MARCH), (NO_STARS, NO_TIME)]


def test_broken_cells_missing_columns_and_readers_without_rows_are_named(tmp_path: Path) -> None:
    """Would find a misspelt column, after which every text is without stars, and a key that is passed over."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one", "stars": -3}\n{"text": "two", "stars": 1}\n')
    source = SourceConfig("jsonl", "english", path=[str(path)], stars_column="stars")
    broken, whole = reader_of(source)(source, 0)
    assert isinstance(broken, Rejected)
    assert (broken.source, broken.reason) == (f"{path}:1", "bad_stars")
    assert broken.error == "stars holds -3, expected a number of stars, 0 or more"
    assert isinstance(whole, Document)

    misspelt = SourceConfig("jsonl", "english", path=[str(path)], stars_column="star")
    with pytest.raises(ConfigError, match=r"stars_column=star: none of the first 2 rows has it"):
        list(reader_of(misspelt)(misspelt, 0))
    for reader in ("files", "messages"):
        with pytest.raises(ConfigError, match=r"stars_column=stars: this reader does not take stars_column"):
            reader_of(SourceConfig(reader, "english", path=[str(tmp_path)], stars_column="stars"))


def sources_of(folder: Path, generator: random.Random) -> tuple[list[SourceConfig], list[list[dict[str, Any]]]]:
    """Writes four sources of few texts with many copies, one of them held out, one with a limit."""
    sources, rows_of_sources = [], []
    for number, (limit, held_out) in enumerate([(0, False), (4, False), (0, True), (0, False)]):
        path = folder / f"{number}.jsonl"
        rows = [
            {"text": f"text {generator.randrange(12)}", "id": f"{number}-{place}", "stars": generator.randrange(3)}
            for place in range(12)
        ]
        # No source gives copies alone: that is an error.
        rows[0]["text"] = str(path)
        path.write_text("\n".join(map(json.dumps, rows)))
        columns = {"stars_column": "stars"} if number != 3 else {}
        sources.append(
            SourceConfig(
                "jsonl", "english", path=[str(path)], limit=limit, held_out=held_out, id_column="id", **columns
            )
        )
        rows_of_sources.append([row | {"stars": row["stars"] if columns else NO_STARS} for row in rows])
    return sources, rows_of_sources


def kept_by_hand(
    sources: Sequence[SourceConfig], rows_of_sources: Sequence[Sequence[dict[str, Any]]], earlier: set[str]
) -> tuple[list[str], set[str]]:
    """Returns the ids of the rows that stay, in the order of reading, and the texts that train may have."""
    best: dict[tuple[bool, str], tuple[float, int, str]] = {}
    place = 0
    for source, rows in zip(sources, rows_of_sources, strict=True):
        n_new = 0
        for row in rows:
            place += 1
            text = source.held_out, row["text"]
            if not source.held_out and row["text"] in earlier:
                continue
            n_new += text not in best
            best[text] = min(best.get(text, (math.inf, place, row["id"])), (-row["stars"], place, row["id"]))
            if source.limit and n_new == source.limit:
                break
    ids = [number for _, _, number in sorted(best.values(), key=lambda kept: kept[1])]
    return ids, {text for is_held_out, text in best if not is_held_out}


@pytest.mark.parametrize("seed", range(8))
def test_of_equal_texts_the_one_with_most_stars_stays(tmp_path: Path, seed: int) -> None:
    """Would find a copy that stays beside the best one, a held-out text that competes with train, a text of a later
    corpus that displaces one of an earlier corpus, and a limit that cuts another reading elsewhere."""
    generator = random.Random(seed)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first, rows_of_first = sources_of(tmp_path / "first", generator)
    second, rows_of_second = sources_of(tmp_path / "second", generator)
    config = CorpusConfig("t", {"first": first, "second": second}, 0.3, max_bad_fraction=0.5)
    for across in (False, True):
        config.cleaning.across_corpora = across
        splits = TextSplits(config, 0)
        earlier: set[str] = set()
        for name, sources, rows in (("first", first, rows_of_first), ("second", second, rows_of_second)):
            expected, texts = kept_by_hand(sources, rows, earlier)
            earlier = texts if across else set()
            for _ in range(2):
                kept = [record.document.source for record in splits.screened(name, IngestReport())]
                assert kept == expected
