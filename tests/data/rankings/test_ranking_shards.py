"""Rankings come out of the shards as they went in, and any webdataset reader reads them."""

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy
from webdataset.compat import WebDataset

from dist_lm.data.index import build_index
from dist_lm.data.manifest import Split, index_path, read_manifest, write_manifest
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.shard_writer import shard_of
from dist_lm.errors import ArtefactError
from tests.data.rankings.made_rankings import corpus_of, random_rankings
from tests.data.synthetic_corpus import documents, write

FIELDS = ("branch", "ranks", "judgements", "margins")


def test_what_was_written_is_read_across_tars(tmp_path: Path) -> None:
    made = random_rankings(60)
    opened = corpus_of(tmp_path, made)
    assert len(list(tmp_path.glob("*.tar"))) > 1
    assert opened.corpus.n_documents == len(made)
    for number, document in enumerate(made):
        assert document.ranking is not None
        found = opened.arrays(number)
        assert np.array_equal(opened.tokens(number), document.tokens)
        assert opened.source(number) == document.language
        for name in FIELDS:
            written, read = getattr(document.ranking, name), getattr(found, name)
            assert read.dtype == written.dtype
            assert np.array_equal(read, written), (number, name)


def test_any_webdataset_reader_reads_them(tmp_path: Path) -> None:
    made = random_rankings(20)
    corpus_of(tmp_path, made)
    reader: Any = WebDataset([str(path) for path in sorted(tmp_path.glob("*.tar"))], shardshuffle=False)
    first = next(iter(reader.decode()))
    branch = np.split(first["branch.npy"], np.cumsum(first["lengths.npy"])[:-1])
    ranks = np.split(first["ranks.npy"], np.cumsum(first["completions.npy"])[:-1])
    for document, own_branch, own_ranks, judged in zip(made, branch, ranks, first["judged.npy"], strict=False):
        assert document.ranking is not None
        assert np.array_equal(own_branch, document.ranking.branch)
        assert judged == len(document.ranking.judgements)
        assert judged or np.array_equal(own_ranks, document.ranking.ranks)


def test_a_corpus_of_something_else_is_refused(tmp_path: Path) -> None:
    write(tmp_path, documents([5, 6, 7]))
    with pytest.raises(ArtefactError, match=r"has no branch.npy: it holds no rankings"):
        RankingCorpus.open(tmp_path, "train")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("completions.npy", lambda array: array[:-1]),
        ("ranks.npy", lambda array: array[:-1]),
        ("judged.npy", lambda array: array + 1),
        ("judgements.npy", lambda array: array[:, :1]),
        ("margins.npy", lambda array: array[1:]),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(
    tmp_path: Path, part: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Finds a tar of another tool, right by its checksum, whose documents would get ranks or pairs of others."""
    tar = tmp_path / "train-000000.tar"
    corpus_of(tmp_path, random_rankings(5))
    with tarfile.open(tar) as archive:
        parts = {info.name: archive.extractfile(info).read() for info in archive}  # pyright: ignore
    with tarfile.open(tar, "w") as archive:
        for name, content in parts.items():
            if name.endswith(f".{part}"):
                buffer = io.BytesIO()
                npy.write_array(buffer, change(npy.read_array(io.BytesIO(content))))
                content = buffer.getvalue()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    index_path(tar).unlink(missing_ok=True)
    manifest = read_manifest(tmp_path)
    write_manifest(tmp_path, replace(manifest, splits={"train": Split((shard_of(tar, build_index(tar), 0),))}))
    with pytest.raises(ArtefactError, match=r"train-000000\.tar: the arrays of its rankings have different lengths"):
        RankingCorpus.open(tmp_path, "train")
