"""The file of a reference gives back what was written, and nothing that is damaged or of another model."""

from pathlib import Path

import numpy as np
import pytest

from dist_lm.data.rankings.completions import SplitReference
from dist_lm.rlhf.reference import CHECKPOINT, _stored, _write

KEY = {CHECKPOINT: "a", "corpus": "b"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    references = {
        "train": SplitReference(np.arange(5, dtype=np.float32), np.array([1, np.nan], np.float32)),
        "val": SplitReference(np.ones(3, np.float32), np.zeros(0, np.float32)),
    }
    file = tmp_path / "reference.safetensors"
    _write(file, KEY, references)
    return file


def test_every_split_comes_back(path: Path) -> None:
    """Finds a hash that cannot be computed, or leaves an intact file out."""
    references = _stored(path, KEY, has_steps=False)
    assert references is not None
    assert list(references) == ["train", "val"]
    np.testing.assert_array_equal(references["train"].logprob, np.arange(5))
    np.testing.assert_array_equal(references["train"].mismatched, [1, np.nan])
    assert len(references["val"].mismatched) == 0


def test_a_changed_bit_of_an_array_is_found(path: Path) -> None:
    """Finds a hash that leaves out the content of arrays."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert _stored(path, KEY, has_steps=False) is None


@pytest.mark.parametrize(
    ("changes", "has_steps", "is_read"),
    [({CHECKPOINT: "c"}, False, False), ({CHECKPOINT: "c"}, True, True), ({"corpus": "c"}, True, False)],
)
def test_a_begun_run_keeps_its_reference_only_with_its_corpus(path: Path, changes, has_steps, is_read) -> None:
    """Finds a policy that goes on against another reference than it began with."""
    assert (_stored(path, {**KEY, **changes}, has_steps) is not None) is is_read
