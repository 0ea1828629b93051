"""xz and bz2: whole content or one line, in bounded memory, whatever the file claims."""

import bz2
import io
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.screening import SourceReader
from dist_lm.data.sources import decompression
from dist_lm.data.sources.decompression import Decompressed
from dist_lm.document import Document
from dist_lm.errors import UserError

COMPRESS = {"xz": lzma.compress, "bz2": bz2.compress}
LINES = "".join(json.dumps({"text": f"text {number} " * 20}) + "\n" for number in range(200)).encode()


def documents_of(path: Path, **keys: Any) -> list[Document]:
    source = SourceConfig(**{"reader": "jsonl", "language": "english", "path": str(path), **keys})
    return [candidate for candidate in SourceReader(0).read(source) if isinstance(candidate, Document)]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("place", ["a.jsonl.{}", ""])
def test_rows_of_a_compressed_file_are_those_of_the_plain_one(tmp_path, suffix, place):
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(COMPRESS[suffix](LINES))
    texts = [document.text for document in documents_of(tmp_path / place.format(suffix))]
    assert texts == [json.loads(line)["text"] for line in LINES.splitlines()]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_compressed_source_file_has_the_language_of_its_suffix(tmp_path, suffix):
    (tmp_path / f"a.py.{suffix}").write_bytes(COMPRESS[suffix](b"x = 1\n"))
    (document,) = documents_of(tmp_path, reader="files", language="")
    assert (document.text, document.language) == ("x = 1\n", "python")


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("seed", range(4))
def test_streams_in_one_file_are_one_content(suffix, seed, monkeypatch):
    monkeypatch.setattr(decompression, "BLOCK", 700)
    draw = random.Random(seed)
    parts = [draw.randbytes(draw.choice([0, 1, 699, 5000])) for _ in range(draw.randrange(1, 5))]
    padding = b"\0" * 4 * draw.randrange(3) if suffix == "xz" else b""
    stored = b"".join(COMPRESS[suffix](part) + padding for part in parts)
    assert io.BufferedReader(Decompressed(io.BytesIO(stored), suffix)).read() == b"".join(parts)


def damaged_files(suffix: str) -> dict[str, bytes]:
    stored = COMPRESS[suffix](LINES)
    return {
        "empty": b"",
        "cut in the header": stored[:5],
        "cut in the middle": stored[: len(stored) // 2],
        "cut at the end": stored[:-1],
        "a changed byte": stored[:200] + bytes([stored[200] ^ 0xFF]) + stored[201:],
        "text behind it": stored + b"more",
        "no such file": LINES,
    }


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", damaged_files("xz"))
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, suffix, damage):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(damaged_files(suffix)[damage])
    with pytest.raises(
        UserError, match=rf"^{path}: cannot be read after row or line \d+: .*truncated, damaged or"
    ) as e:
        documents_of(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bomb_ends_in_one_line_before_its_content_does(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(decompression, "UNSUSPICIOUS", 1 << 20)
    path = tmp_path / f"a.jsonl.{suffix}"
    # bz2 packs equal lines hundreds of thousands of times.
    path.write_bytes(COMPRESS[suffix](b"\n" * (3 << 20)))
    with pytest.raises(UserError, match=r"a.jsonl.*: its content is more than 1,000 times its size") as refused:
        documents_of(path)
    assert "damaged" not in str(refused.value)


def test_a_window_that_takes_gigabytes_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1536 << 20}]
    compressor = lzma.LZMACompressor(filters=[{**filters[0], "dict_size": 1 << 20}])
    stored = bytearray(compressor.compress(LINES) + compressor.flush())
    # Byte 16 of a file with one filter is the size of its window; the CRC of the header follows at 20.
    assert stored[14:16] == b"\x21\x01"
    stored[16] = 37  # 1.5 GiB
    import zlib

    stored[20:24] = zlib.crc32(stored[12:20]).to_bytes(4, "little")
    path.write_bytes(stored)
    with pytest.raises(UserError, match=r"a.jsonl.xz: .*needs more than 128 MiB: compress it again with xz -9 or less"):
        documents_of(path)
