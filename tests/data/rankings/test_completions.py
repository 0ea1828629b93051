"""Rankings as trees whose targets are completions: what a branch holds, and what it is paired with."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_lm.data.order import DocumentSlice
from dist_lm.data.rankings.completions import SplitReference, Trees, mismatched
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.rankings.stream import RankingStream
from tests.data.rankings.made_rankings import corpus_of, random_rankings, ranking

WIDTH = 64


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> RankingCorpus:
    return corpus_of(tmp_path_factory.mktemp("rankings"), random_rankings(300, seed=5))


def test_the_example_of_the_module(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, [ranking([9, 1, 2, 3], [[4, 5, 8], [6, 8]], ranks=[0, 1])])
    batch, placed = Trees(learns_prompts=True)(corpus, [[DocumentSlice(0, 0, 9)]], [7], 10, 0)
    assert batch.tokens_BT.tolist() == [[9, 1, 2, 3, 4, 5, 3, 6, 0, 0]]
    assert batch.targets_BT.tolist() == [[1, 2, 3, 4, 5, 8, 6, 8, 0, 0]]
    assert batch.branch_BT is not None
    assert batch.branch_BT[0, :8].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert batch.position_BT[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    assert batch.segment_BT.tolist() == [[3, 3, 3, 1, 1, 1, 2, 2, 0, 0]]
    assert batch.tokens_S.tolist() == [3, 2, 3]
    assert batch.prompt_C.tolist() == [0, 0]
    assert batch.document_BT.tolist() == [[0] * 8 + [1, 1]]
    assert batch.n_tokens == 8
    assert [one.places.tolist() for one in placed] == [[0, 1]]
    silent, _ = Trees()(corpus, [[DocumentSlice(0, 0, 9)]], [7], 10, 0)
    assert silent.segment_BT.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 0, 0]]
    assert silent.tokens_S.tolist() == [3, 2, 0]


@pytest.mark.heavy
def test_every_branch_is_its_prompt_and_its_completion(rankings: RankingCorpus) -> None:
    """A batch of more completions than a byte counts."""
    reference = SplitReference(
        np.arange(rankings.completions.sum(), dtype=np.float32), np.arange(300, dtype=np.float32)
    )
    trees = Trees(reference, mismatches=True)
    settings = {"seed": 0, "seq_len": WIDTH, "pad_id": 0, "global_batch": 60, "micro_batch": 60}
    with RankingStream(rankings, "pairs", 0.0, dp_rank=0, dp_size=1, assemble=trees, **settings) as stream:
        batch = next(stream).micro_batches[0]
    chosen = [part.document for number in range(60) for part in stream._rows.slices(number)[1]]
    assert len(batch.prompt_C) > 300
    assert batch.reference_C.tolist() == [
        value for number in chosen for value in reference.logprob[rankings.completion_slice(number)].tolist()
    ]
    assert batch.mismatched_reference_P.tolist() == chosen
    expected = [(rankings.tokens(number), rankings.arrays(number).branch) for number in chosen]
    assert seen(batch) == [alone for tokens, branch in expected for alone in separately(tokens, branch)]
    others = batch.mismatched
    by_prompt: dict[int, list] = {}
    for prompt, alone in zip(others.prompt_C.tolist(), seen(others), strict=True):
        by_prompt.setdefault(prompt, []).append(alone)
    for place, number in enumerate(chosen):
        assert by_prompt[place] == separately(*mismatched(rankings, number, WIDTH))


def test_mismatched_completions_are_those_of_the_next_ranking_as_far_as_they_fit(tmp_path: Path) -> None:
    corpus = corpus_of(
        tmp_path,
        [ranking([9, 1, 2], [[4], [5]], ranks=[0, 1]), ranking([9], [[6, 7, 8], [6], [7, 7]], ranks=[0, 1, 2])],
    )
    assert [a.tolist() for a in mismatched(corpus, 0, 9)] == [
        [9, 1, 2, 6, 7, 8, 6, 7, 7],
        [0, 0, 0, 1, 1, 1, 2, 3, 3],
    ]
    assert mismatched(corpus, 0, 6)[1].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert [a.tolist() for a in mismatched(corpus, 0, 4)] == [[9, 1, 2, 6, 7], [0, 0, 0, 1, 1]]
    assert mismatched(corpus, 1, 9)[0].tolist() == [9, 4, 5]


def separately(tokens: np.ndarray, branch: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each branch as inputs, and the targets that belong to the completion."""
    found = []
    for k in range(1, int(branch.max()) + 1):
        prompt, own = tokens[branch == 0].tolist(), tokens[branch == k].tolist()
        found.append(([*prompt, *own[:-1]], own))
    return found


def seen(batch) -> list[tuple[list[int], list[int]]]:
    """What stands in each completion's context, at its positions, and its targets."""
    found = []
    for segment in range(1, len(batch.prompt_C) + 1):
        b, places = (batch.segment_BT == segment).nonzero().unbind(1)
        row, last = int(b[0]), int(places[-1])
        own = (batch.document_BT[row] == batch.document_BT[row, last]) & (torch.arange(WIDTH) <= last)
        own &= (batch.branch_BT[row] == 0) | (batch.branch_BT[row] == batch.branch_BT[row, last])
        assert batch.position_BT[row][own].tolist() == list(range(int(own.sum())))
        assert len(places) == batch.tokens_S[segment - 1]
        found.append((batch.tokens_BT[row][own].tolist(), batch.targets_BT[row, places].tolist()))
    return found
