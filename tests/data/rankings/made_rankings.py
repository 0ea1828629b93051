"""Small corpora of rankings without a tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.document import RankingArrays, TokenizedDocument
from tests.data.synthetic_corpus import write

NONE = np.zeros((0, 2), np.uint8)


def ranking(
    prompt: Sequence[int], completions: Sequence[Sequence[int]], ranks: Sequence[int] = (), pairs: Sequence = ()
) -> TokenizedDocument:
    """`pairs`: (better, worse, margin)."""
    tokens = [*prompt, *(token for completion in completions for token in completion)]
    branch = [0] * len(prompt) + [k for k, completion in enumerate(completions, 1) for _ in completion]
    return TokenizedDocument(
        tokens=np.array(tokens, np.uint16),
        n_bytes=len(tokens),
        language="judged" if pairs else "ranked",
        source="made",
        licence="none",
        loss_mask=(np.array(branch) > 0).astype(np.uint8),
        ranking=RankingArrays(
            np.array(branch, np.uint8),
            np.array(ranks, np.uint8),
            np.array([pair[:2] for pair in pairs], np.uint8).reshape(-1, 2),
            np.array([pair[2] for pair in pairs], np.float32),
        ),
    )


def random_rankings(count: int, seed: int = 0, vocabulary: int = 50) -> list[TokenizedDocument]:
    """Prompts of 1 to 6 tokens with 2 to 6 completions of 1 to 5; every third is judged by pairs."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        k = int(draw.integers(2, 7))
        prompt, *completions = (draw.integers(1, vocabulary, draw.integers(1, 6)).tolist() for _ in range(k + 1))
        if number % 3:
            made.append(ranking(prompt, completions, ranks=draw.permutation(np.arange(k) // 2 * 2 if k > 3 else k)))
        else:
            made.append(ranking(prompt, completions, pairs=[(0, 1, 0.5), (1, 0, 0.0)][: 1 + number % 2]))
    return made


def corpus_of(directory: Path, documents: Sequence[TokenizedDocument]) -> RankingCorpus:
    """The rankings `documents`, written as train and opened."""
    write(directory, documents, documents_per_member=7, shard_tokens=500)
    return RankingCorpus.open(directory, "train")
