"""One prompt with several answers that somebody has judged: in an order, or two by two."""

from collections.abc import Sequence
from dataclasses import dataclass

from dist_lm.chat.errors import ChatError
from dist_lm.chat.messages import Conversation
from dist_lm.chat.rules import check_conversation

FEWEST, MOST = 2, 16  # answers


@dataclass(frozen=True)
class Judgement:
    """One answer is better than another one."""

    better: int  # place among the completions
    worse: int
    margin: float | None = None  # by how much, on a scale of whoever judged; larger is more


@dataclass(frozen=True)
class Ranking:
    """Answers to a prompt with their ranks, or with judgements of pairs of them."""

    prompt: Conversation  # it is the assistant's turn
    completions: tuple[str, ...]
    ranks: tuple[int, ...] = ()  # one a completion; the smallest is the best, equal ones are ties. Empty: judgements
    judgements: tuple[Judgement, ...] = ()


def check_ranking(ranking: Ranking) -> None:
    """Refuse what says nothing, or contradicts its own form.

    Raises:
        ChatError: the message names what is wrong.
    """
    n = len(ranking.completions)
    if not FEWEST <= n <= MOST:
        raise ChatError(f"{n} completions; expected {FEWEST} to {MOST}")
    if not ranking.prompt.messages or ranking.prompt.messages[-1].role not in ("user", "tool"):
        raise ChatError("prompt: expected a last turn of user or tool, for the assistant to go on")
    try:
        check_conversation(ranking.prompt)
    except ChatError as error:
        raise ChatError(f"prompt: {error}") from None
    if empty := [place for place, text in enumerate(ranking.completions) if not text]:
        raise ChatError(f"completion {empty[0]}: empty")
    if ranking.ranks and ranking.judgements:
        raise ChatError("ranks and judgements: expected one of the two, found both: take one out")
    if not ranking.ranks and not ranking.judgements:
        raise ChatError("ranks and judgements: expected one of the two, found none")
    if ranking.ranks and len(ranking.ranks) != n:
        raise ChatError(f"{len(ranking.ranks)} ranks of {n} completions")
    if len(set(ranking.ranks)) == 1:
        raise ChatError("all completions are tied: nothing to learn")
    for number, judgement in enumerate(ranking.judgements):
        if judgement.better == judgement.worse or not {judgement.better, judgement.worse} <= set(range(n)):
            raise ChatError(
                f"judgement {number}: better={judgement.better} worse={judgement.worse}; "
                f"expected two different places of 0 to {n - 1}"
            )
        if judgement.margin is not None and not 0 <= judgement.margin < float("inf"):
            raise ChatError(f"judgement {number}: margin={judgement.margin}; expected a number of at least 0")


def ranks_of_scores(scores: Sequence[float]) -> tuple[int, ...]:
    """The largest score is rank 0; equal ones share a rank."""
    levels = sorted(set(scores), reverse=True)
    return tuple(levels.index(score) for score in scores)


def dense_ranks(ranks: Sequence[int]) -> tuple[int, ...]:
    """The same order, counted from 0 without gaps."""
    levels = sorted(set(ranks))
    return tuple(levels.index(rank) for rank in ranks)
