"""Of equal and of nearly equal documents, the one with most stars stays, of these the earliest, of these the first."""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.data.journal import REJECTED
from dist_lm.data.manifest import read_manifest
from dist_lm.storage.run_directory import WorkDirectory
from tests.data.mixed_corpora import write_corpora
from tests.stages.test_builds_by_tasks import add_near_copies, build, by_tasks, in_random_order, new_work

__all__ = ["new_work"]  # a fixture

NewWork = Callable[[str], WorkDirectory]


def digest_of(folders: dict[str, Path], root: Path) -> str:
    """Returns a hash of what training sees of corpora, and of the reasons why documents were dropped."""
    content = {
        name: [read_manifest(folder).content, (folder / REJECTED).read_text().replace(str(root), "")]
        for name, folder in folders.items()
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, "80ce12de4f67b07a070e3c19a0a7de52c7d29e3f5be5fd046716c89473acfdaf"),
        (1, "47dfb5b2ca52076620b2a28329bc167f97bd0b163c1a2a65613930b5a1323d1d"),
    ],
)
def test_without_columns_every_byte_stays(
    monkeypatch: pytest.MonkeyPatch, new_work: NewWork, tmp_path: Path, seed: int, expected: str
) -> None:
    """Would find another winner where no source names a column. The hashes are of the release before the columns."""
    generator = random.Random(seed)
    corpus = write_corpora(tmp_path, generator, held_out=bool(seed))
    add_near_copies(tmp_path / "second" / "rows" / "copies.jsonl", tmp_path / "first" / "rows" / "0.jsonl", generator)
    cleaning = replace(corpus.cleaning, across_corpora=True, near_duplicates=0.7)
    corpus = replace(corpus, cleaning=cleaning, max_bad_fraction=0.9)
    assert digest_of(build(new_work("serial"), corpus), tmp_path) == expected
    run_pass = in_random_order(generator)
    assert digest_of(by_tasks(monkeypatch, new_work("tasks"), corpus, 3000, run_pass), tmp_path) == expected
