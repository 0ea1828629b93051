"""Hostile inputs: each one ends in documents, in a counted skip, or in one line that names file and place."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.inputs import inputs_of
from dist_lm.data.screening import IngestReport
from dist_lm.errors import UserError
from tests.data.reading import read_corpus

ROWS = [
    {"text": f"def f{i}(x):\n    return x + {i}\n\n\n" + f"print(f{i}({i}), 'row {i}')\n" * 3, "license": "MIT"}
    for i in range(200)
]
LINES = [json.dumps(row) for row in ROWS]
EMOJI_HALF = '{"text": "bad \\ud800 tail"}'


def put(folder: Path, lines: list[str], name: str = "a.jsonl", end: str = "\n") -> None:
    (folder / name).write_bytes(("\n".join(lines) + end).encode())


def put_bytes(content: bytes, name: str = "a.jsonl") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def lines(*more: str, name: str = "a.jsonl", end: str = "\n") -> Callable[[Path], None]:
    return lambda folder: put(folder, list(more), name, end)


def all_of(*writes: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for one in writes:
            one(folder)

    return write


def table(rows: list[dict], name: str = "a.parquet", damage: Callable[[bytearray], bytes] = bytes):
    def write(folder: Path) -> None:
        pq.write_table(pa.Table.from_pylist(rows), folder / name, write_page_checksum=True)
        (folder / name).write_bytes(damage(bytearray((folder / name).read_bytes())))

    return write


def flipped(content: bytearray) -> bytes:
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def zipped(folder: Path) -> None:
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(LINES[100:]) + "\n")


def hidden(folder: Path) -> None:
    (folder / ".trash").mkdir()
    put(folder / ".trash", LINES[100:], "deleted.jsonl")
    (folder / "stats.json").write_text(json.dumps({"text": "STATS, NOT DATA", "license": "none"}))


def linked(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    other = folder.parent / "elsewhere"
    other.mkdir()
    put(other, LINES[100:], "b.jsonl")
    (folder / "more").symlink_to(other)
    (folder / "more2").symlink_to(other)


@dataclass(frozen=True)
class Case:
    """An input, and what becomes of it."""

    write: Callable[[Path], None]
    kept: int = 200
    dropped: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # name -> reason
    error: str = ""
    keys: dict[str, Any] = field(default_factory=dict)
    max_bad_fraction: float = 0.001


MANY = r"corpus.max_bad_fraction=0.001: mend them, or set that key to 0\.[0-9]+, and they are skipped"
CASES = {
    "i01_invalid_utf8": Case(
        all_of(put_bytes("\n".join(LINES[:100]).encode() + b'\n{"text": "caf\xe9 latin1"}\n' + LINES[100].encode())),
        error=rf"1 of 102 rows are broken, .*{MANY}. .*a.jsonl:101: byte 13 of the line is not UTF-8",
    ),
    "i01_counted": Case(
        put_bytes("\n".join(LINES).encode() + b'\n{"text": "caf\xe9 latin1"}\n'),
        dropped={"invalid_utf8": 1},
        max_bad_fraction=0.01,
    ),
    "i02_long_line": Case(
        lines(*LINES, json.dumps({"text": "x = 1 ; " * 1_000_000}), LINES[0]), dropped={"too_long": 1, "duplicate": 1}
    ),
    "i03_column_missing_some": Case(
        lines(*LINES[:100], *['{"license": "MIT"}'] * 50, *LINES[100:]),
        error=rf"50 of 250 rows .*{MANY}.*a.jsonl:101: no column text; the columns there are license",
    ),
    "i03b_column_missing_first": Case(
        all_of(lines(*['{"license": "MIT"}'] * 50), lines(*LINES, name="b.jsonl")),
        error=r"50 of 250 rows .*a.jsonl:1: no column text",
    ),
    "i04_text_int_in_line": Case(
        lines(*LINES[:100], '{"text": 5}', *LINES[100:]),
        error=r"1 of 201 rows .*a.jsonl:101: text holds a value of type int, expected text",
    ),
    "i04b_text_dict_file": Case(
        all_of(lines(*LINES), lines(*['{"text": {"a": 1}}'] * 3, name="b.jsonl")),
        error=r"3 of 203 rows .*b.jsonl:1: text holds a value of type dict",
    ),
    "i05_schema_drift": Case(
        all_of(
            lines(*[json.dumps({**row, "meta": "x"}) for row in ROWS[:100]]),
            lines(*[json.dumps({**row, "meta": {"stars": 3}}) for row in ROWS[100:]], name="b.jsonl"),
        )
    ),
    "i05b_extra_column_later": Case(
        all_of(lines(*LINES[:100]), lines(*[json.dumps({**row, "stars": 3}) for row in ROWS[100:]], name="b.jsonl"))
    ),
    "i05_parquet_drift": Case(
        all_of(table(ROWS[:100]), table([{"stars": 3, **row} for row in ROWS[100:]], "b.parquet")),
        keys={"reader": "parquet"},
    ),
    "i06_null_text": Case(lines(*LINES[:100], *['{"text": null}'] * 5, *LINES[100:]), dropped={"empty": 5}),
    "i07_folder_with_gz_beside": Case(all_of(lines(*LINES[:100]), zipped)),
    "i07b_uppercase_suffix": Case(all_of(lines(*LINES[:100]), lines(*LINES[100:], name="B.JSONL"))),
    "i08_hidden_and_sidecar": Case(
        all_of(lines(*LINES[:100]), hidden), 100, left_out={".trash/": "hidden", "stats.json": "suffix .json"}
    ),
    "i09_symlink_loop_and_dir": Case(
        all_of(lines(*LINES[:100]), linked),
        left_out={name: "read already (linked or named twice)" for name in ("loop/", "more2/")},
    ),
    "i10_truncated_last_line": Case(
        lines(*LINES[:100], LINES[100][:100], end=""),
        error=r"1 of 101 rows .*a.jsonl:101: broken JSON \(Unterminated string",
    ),
    "i10b_broken_line_middle": Case(
        lines(*LINES[:100], '{"text": "abc', *LINES[100:]), error=r"1 of 201 rows .*a.jsonl:101: broken JSON"
    ),
    "i11_bom": Case(put_bytes(b"\xef\xbb\xbf" + "\n".join(LINES).encode())),
    "i11b_utf16": Case(put_bytes("\n".join(LINES).encode("utf-16")), error="a.jsonl: the text is UTF-16: convert it"),
    "i12_empty_file": Case(put_bytes(b""), error="reader=jsonl gave no document of path="),
    "i13_empty_among_good": Case(all_of(lines(*LINES), put_bytes(b"", "b.jsonl"))),
    "i14_doc_over_1MB": Case(
        lines(*LINES, json.dumps({"text": "".join(f"x{i} = {i}\n" for i in range(120000))})), dropped={"too_long": 1}
    ),
    "i16_nul_u2581": Case(lines(*LINES, json.dumps({"text": "a\x00b \u2581 c\r\nd\re \u2028 f" * 20})), 201),
    "i17_truncated_parquet": Case(
        table(ROWS, damage=lambda content: bytes(content[: len(content) // 2])),
        error=r"a.parquet: cannot be read after row or line 0: ArrowInvalid: .*truncated, damaged or",
        keys={"reader": "parquet"},
    ),
    "i17b_flipped_parquet": Case(
        table(ROWS, damage=flipped), error=r"a.parquet: cannot be read after row .*CRC", keys={"reader": "parquet"}
    ),
    "i18_json_array_pretty": Case(
        all_of(put_bytes(json.dumps(ROWS, indent=1).encode(), "a.json")),
        error=r"nothing to read there: expected .jsonl, .ndjson .*suffix .json: 1\). A file that is named .*is read",
    ),
    "i18_named": Case(put_bytes(json.dumps(ROWS, indent=1).encode(), "a.json"), keys={"path": "a.json"}),
    "i19_lone_surrogate": Case(
        lines(*LINES, EMOJI_HALF), error=r"1 of 201 rows .*a.jsonl:201: text, character 4: the lone surrogate U\+D800"
    ),
    "i22_licence_column_typo": Case(
        lines(*LINES),
        error=r"licence_column=licence: none of the first 200 rows has it; the columns there are text, license",
        keys={"licence_column": "licence", "licence": "MIT"},
    ),
    "i23_unknown_language": Case(lines(*LINES), keys={"language": "C++ / weird name!"}),
    "i24_mixed_parquet_jsonl": Case(
        all_of(lines(*LINES[:100]), table(ROWS[100:], "b.parquet")), 100, left_out={"b.parquet": "suffix .parquet"}
    ),
    "i25_empty_text_only": Case(lines(*['{"text": "  \\n"}'] * 20), error="reader=jsonl gave no document of path="),
    "i26_tiny_5_docs": Case(lines(*LINES[:5]), error=r"none of its 5 documents is held out: .* expected above 0\.\d+"),
    "i27_one_doc": Case(lines(LINES[0]), error="none of its 1 documents is held out: they are one text"),
    "i28_special_tokens": Case(lines(*LINES, json.dumps({"text": "<|endoftext|> hi <|user|> x" * 5})), 201),
    "i29_txt_folder": Case(
        lambda folder: [(folder / f"{i}.txt").write_text(row["text"]) for i, row in enumerate(ROWS[:40])] and None,
        40,
        keys={"reader": "files"},
    ),
    "i30_single_txt": Case(
        put_bytes(ROWS[0]["text"].encode(), "a.txt"),
        error="none of its 1 documents is held out: they are one text",
        keys={"reader": "files", "path": "a.txt"},
    ),
    "i30_txt_as_rows": Case(
        put_bytes(ROWS[0]["text"].encode(), "a.txt"),
        error=r"none of the first 5 rows can be read, .*a.txt:1: broken JSON",
        keys={"path": "a.txt"},
    ),
    "i31_dup_rows": Case(lines(*LINES, *LINES), dropped={"duplicate": 200}),
    "i32_secret": Case(lines(*LINES, json.dumps({"text": "password = 'hunter2' # bob@example.com\n" * 4})), 201),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_input_is_read_counted_or_refused_in_one_line(tmp_path, name):
    case = CASES[name]
    folder = tmp_path / "data"
    folder.mkdir()
    case.write(folder)
    keys = {"reader": "jsonl", "language": "python", **case.keys}
    source = SourceConfig(**{**keys, "path": str(folder / keys.get("path", ""))})
    config = CorpusConfig("h", {"code": [source]}, 0.1, max_bad_fraction=case.max_bad_fraction)
    report = IngestReport()
    if case.error:
        with pytest.raises(UserError, match=case.error) as refused:
            list(read_corpus(config, "code", 0, report))
        assert "\n" not in str(refused.value)
        assert "network" not in str(refused.value)
        return
    documents = [document for _, document in read_corpus(config, "code", 0, report)]
    assert len(documents) == case.kept
    dropped: dict[str, int] = {}
    for counts in report.languages.values():
        for reason, count in counts.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    assert dropped == case.dropped
    assert {one.name.removeprefix(f"{folder}/"): one.left_out for one in inputs_of(source).left_out} == case.left_out
