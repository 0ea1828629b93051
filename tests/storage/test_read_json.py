"""A JSON file is an object, or it is refused by its name."""

from pathlib import Path

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.storage.durable import read_json


@pytest.mark.parametrize("content", [b"{", b"\xff{}", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"])
def test_a_file_that_is_no_json_is_refused_by_its_name(tmp_path: Path, content: bytes) -> None:
    """Deep nesting ended in the traceback of a RecursionError."""
    path = tmp_path / "small.json"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"{path}: no JSON"):
        read_json(path)
