"""Files of a repository lie next to each other in the shards and in every epoch."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from dist_lm.data.index import build_index
from dist_lm.data.manifest import index_path
from dist_lm.data.sequences import CorpusSequences
from dist_lm.data.token_corpus import TokenCorpus
from tests.data.synthetic_corpus import documents, write

NAMES = ["", "", *["a"] * 5, *["b"] * 7, "", *["c"] * 30, "", ""]
T = 16


def test_files_of_a_repository_are_read_one_after_the_other(tmp_path: Path) -> None:
    made = [replace(one, repository=name) for one, name in zip(documents([9] * len(NAMES)), NAMES, strict=True)]
    corpus = TokenCorpus.open(write(tmp_path, made), "train")
    follows = [bool(name) and name == before for before, name in zip(["", *NAMES], NAMES, strict=False)]
    tars = sorted(tmp_path.glob("train-*.tar"))
    assert len(tars) > 1
    firsts = np.cumsum([0, *(len(build_index(tar).documents) for tar in tars)])[:-1]
    expected = [follow and n not in firsts for n, follow in enumerate(follows)]  # a tar depends on no other tar
    assert corpus.continues.tolist() == expected
    sequences = CorpusSequences(corpus, 3, T)
    for epoch in range(3):
        numbers = range(epoch * sequences.n_sequences, (epoch + 1) * sequences.n_sequences)
        before: dict[int, int] = {}
        for number in numbers:
            seen = [part.document for part in sequences.content(number).slices]
            before |= {after: one for one, after in pairwise(seen)}
        followed = [n for n, follow in enumerate(expected) if follow and n in before]
        assert len(followed) > 10
        assert all(before[n] == n - 1 for n in followed)
    # the index is a cache of the tars
    index_path(tars[0]).unlink()
    assert TokenCorpus.open(tmp_path, "train").continues.tolist() == expected


def test_other_neighbours_are_other_content_and_no_neighbours_change_nothing(tmp_path: Path) -> None:
    made = documents([9] * 20)
    plain = TokenCorpus.open(write(tmp_path / "plain", made), "train")
    assert not plain.continues.any()
    alone = [replace(one, repository=str(n)) for n, one in enumerate(made)]
    together = [replace(one, repository="a") for one in made]
    for name, part in (("alone", alone), ("together", together)):
        write(tmp_path / name, part)
    content = {name: (tmp_path / name / "train-000000.tar").read_bytes() for name in ("plain", "alone", "together")}
    assert content["plain"] == content["alone"] != content["together"]
