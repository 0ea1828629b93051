"""Rankings come out of the shards as they went in, and any webdataset reader reads them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.compat import WebDataset

from dist_lm.data.rankings.shards import RankingCorpus
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
