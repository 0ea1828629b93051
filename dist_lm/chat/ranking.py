"""Defines a ranking, a prompt with judged completions, checks it, and lays it out as a tree of tokens. One completion
with a label, wanted or not, is a ranking too, from which only KTO learns.

    <|endoftext|> ... prompt ... assistant  completion 1 <|im_end|>  completion 2 <|im_end|>  ...
    branch: 0 ................. 0  1 ................ 1  2 ................ 2

A completion sees the prompt and itself (`model.attention.within_documents`), and its positions continue those of the
prompt, so each completion is scored as if it alone followed the prompt. Its score is the one at its `<|im_end|>`, the
last token of its branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_lm.chat.messages import ChatError, Conversation, Message, check_conversation
from dist_lm.chat.template import answer_tokens, prompt
from dist_lm.tokenizer.tokenizer import Tokenizer

FEWEST, MOST = 2, 16  # completions


@dataclass(frozen=True)
class Judgement:
    """States that one completion is better than another one."""

    better: int  # index of a completion
    worse: int  # index of a completion
    margin: float | None = None  # how much better it is, on the judge's own scale


@dataclass(frozen=True)
class Ranking:
    """Completions of a prompt, with a rank for each or with judgements of pairs; or one with a label."""

    prompt: Conversation  # ends where the assistant answers
    completions: tuple[str, ...]
    ranks: tuple[int, ...] = ()  # one for each completion; the smallest is the best, equal ranks are ties
    judgements: tuple[Judgement, ...] = ()  # instead of ranks
    label: bool | None = None  # instead of ranks, for one completion: whether it is wanted


@dataclass(frozen=True)
class RankingTokens:
    """T tokens of a ranking with K completions."""

    tokens: np.ndarray  # (T,) of the tokenizer's dtype
    branch: np.ndarray  # (T,) uint8: 0 in the prompt, 1 to K in the completions


def check_ranking(ranking: Ranking) -> None:
    """Refuses a ranking that orders nothing or contradicts itself; returns nothing.

    The number of completions (`FEWEST` to `MOST`, none empty) and the conversation of the prompt, which must end where
    the assistant answers, are checked too. Judgements may form a cycle.

    Raises:
        ChatError: the message names the field and its value.
    """
    num_completions = len(ranking.completions)
    if ranking.label is not None:
        if num_completions != 1 or ranking.ranks or ranking.judgements:
            raise ChatError(f"label: {num_completions} completions; expected one, without ranks or judgements")
    elif not FEWEST <= num_completions <= MOST:
        raise ChatError(f"{num_completions} completions; expected {FEWEST} to {MOST}")
    if not ranking.prompt.messages or ranking.prompt.messages[-1].role not in ("user", "tool"):
        raise ChatError("prompt: expected a last turn of user or tool, which the assistant answers")
    try:
        check_conversation(ranking.prompt)
    except ChatError as error:
        raise ChatError(f"prompt: {error}") from None
    if empty := [index for index, text in enumerate(ranking.completions) if not text]:
        raise ChatError(f"completion {empty[0]}: empty")

    if ranking.ranks and ranking.judgements:
        raise ChatError("ranks and judgements: expected one of the two, found both: remove one")
    if not ranking.ranks and not ranking.judgements and ranking.label is None:
        raise ChatError("ranks and judgements: expected one of the two, found none")

    # Ranks order all completions, judgements some pairs; both must leave something to learn.
    if ranking.ranks and len(ranking.ranks) != num_completions:
        raise ChatError(f"{len(ranking.ranks)} ranks of {num_completions} completions; expected as many")
    if len(set(ranking.ranks)) == 1:
        raise ChatError("all completions are tied: nothing to learn")
    rank_of: dict[str, int] = {}
    for index, (text, rank) in enumerate(zip(ranking.completions, ranking.ranks, strict=False)):
        if rank_of.setdefault(text, rank) != rank:
            raise ChatError(f"completion {index}: the same text as an earlier one with another rank; remove one")

    for number, judgement in enumerate(ranking.judgements):
        pair = {judgement.better, judgement.worse}
        if len(pair) == 1 or not pair <= set(range(num_completions)):
            raise ChatError(
                f"judgement {number}: better={judgement.better} worse={judgement.worse}; "
                f"expected two different indices from 0 to {num_completions - 1}"
            )
        if ranking.completions[judgement.better] == ranking.completions[judgement.worse]:
            raise ChatError(
                f"judgement {number}: completions {judgement.better} and {judgement.worse} are the same text; remove it"
            )
        if judgement.margin is not None and not 0 <= judgement.margin < float("inf"):
            raise ChatError(f"judgement {number}: margin={judgement.margin}; expected a number of at least 0")


def ranks_of_scores(scores: Sequence[float]) -> tuple[int, ...]:
    """Returns a rank for each score, 0 for the largest; equal scores share a rank, and no rank is left out."""
    levels = sorted(set(scores), reverse=True)
    return tuple(levels.index(score) for score in scores)


def ranking_tokens(ranking: Ranking, tokenizer: Tokenizer) -> RankingTokens:
    """Returns the tokens of the prompt once, then those of every completion as a branch, with the end of its turn.

    Raises:
        ChatError: the prompt or a completion is not well formed, or the template of an imported model refuses it.
    """
    # A completion is encoded as a turn of its own, so its tokens do not depend on the other ones.
    tokens = prompt(ranking.prompt, tokenizer)
    branch = [0] * len(tokens)
    for number, completion in enumerate(ranking.completions, start=1):
        tokens += answer_tokens(Message("assistant", completion), tokenizer, ranking.prompt)
        branch += [number] * (len(tokens) - len(branch))
    return RankingTokens(np.array(tokens, tokenizer.dtype), np.array(branch, np.uint8))


def branch_positions(branch_T: np.ndarray) -> np.ndarray:
    """Returns positions for RoPE, (T,) int64: through the prompt, then in every completion from the prompt's end.

    Args:
        branch_T: (T,) integers: 0 in the prompt, which comes first, then 1 to K, rising.
    """
    position_T = np.arange(len(branch_T))
    starts = np.flatnonzero(np.diff(branch_T, prepend=0))  # first token of each branch
    if not len(starts):
        return position_T

    # At each further branch the count goes back by the length of the branch before it.
    shift_T = np.zeros(len(branch_T), np.int64)
    shift_T[starts] = np.diff(starts, prepend=starts[0])
    return position_T - np.cumsum(shift_T)


def branch_ends(branch_T: np.ndarray) -> np.ndarray:
    """Returns the index of the last token of each completion, (K,) int64."""
    last_T = np.diff(branch_T, append=0) != 0
    return np.flatnonzero(last_T & (branch_T > 0))
