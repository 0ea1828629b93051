"""A ranking as tokens: the prompt once, then every completion as a branch behind it.

    <|endoftext|> ... prompt ... <|assistant|>  completion 1 <|end|>  completion 2 <|end|>  ...
    branch: 0 ............................... 0  1 ............. 1      2 ............. 2

A completion sees the prompt and itself (`model.attention.within_documents`), and its positions go on from the prompt's,
so each is scored as it would be alone behind it; its score is the one at its `<|end|>`, the last token of its branch.
"""

from dataclasses import dataclass, replace

import numpy as np

from dist_lm.chat.messages import Message
from dist_lm.chat.ranking import Ranking
from dist_lm.chat.template import prompt, render
from dist_lm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class RankingTokens:
    """T tokens of a ranking with K completions."""

    tokens: np.ndarray  # (T,) uint16
    branch: np.ndarray  # (T,) uint8: 0 in the prompt, 1 to K in the completions


def ranking_tokens(ranking: Ranking, tokenizer: Tokenizer) -> RankingTokens:
    """See above.

    Raises:
        ChatError: the prompt or a completion is not well formed.
    """
    trunk = prompt(ranking.prompt, tokenizer)
    tokens, branch = list(trunk), [0] * len(trunk)
    for number, completion in enumerate(ranking.completions, start=1):
        answered = replace(ranking.prompt, messages=(*ranking.prompt.messages, Message("assistant", completion)))
        own = render(answered, tokenizer).tokens[len(trunk) :].tolist()
        tokens += own
        branch += [number] * len(own)
    return RankingTokens(np.array(tokens, np.uint16), np.array(branch, np.uint8))


def branch_positions(branch_T: np.ndarray) -> np.ndarray:
    """For RoPE: counted through the prompt, then in every completion from the prompt's end, (T,) int64."""
    position_T = np.arange(len(branch_T))
    starts = np.flatnonzero(np.diff(branch_T, prepend=0))  # of the branches
    if len(starts):
        shift_T = np.zeros(len(branch_T), np.int64)
        shift_T[starts] = np.diff(starts, prepend=starts[0])
        position_T = position_T - np.cumsum(shift_T)
    return position_T


def branch_ends(branch_T: np.ndarray) -> np.ndarray:
    """Where each completion has its last token, (K,) int64."""
    last_T = np.diff(branch_T, append=0) != 0
    return np.flatnonzero(last_T & (branch_T > 0))
