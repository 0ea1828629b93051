"""Scores tool use: compares one turn with the expected one, then computes shares over many turns.

Calls are compared as the Berkeley Function Calling Leaderboard compares them (`chat.compare`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dist_lm.chat.compare import most_matched, same_call, same_calls
from dist_lm.chat.messages import Call, ChatError, Message, Tool
from dist_lm.chat.parse import parse_turn
from dist_lm.chat.schema import problems
from dist_lm.tokenizer.tokenizer import Tokenizer

Wanted = TypeVar("Wanted")


@dataclass(frozen=True)
class Verdict:
    """The score of one turn."""

    wanted: int  # number of expected calls
    is_turn: bool  # the tokens parse as a turn, and the model ended it
    called: bool  # the turn contains a call
    valid: bool  # it contains calls, and all of them name an offered tool and fit its schema
    names: bool  # it calls the expected tools, each as often as expected
    right: int  # number of expected calls that were made with the expected arguments
    exact: bool  # the calls equal the expected ones; if none is expected, there is none

    @property
    def parses(self) -> bool:
        """Whether it is a turn, with a call if one was expected."""
        return self.is_turn and (self.called or not self.wanted)

    @property
    def refused(self) -> bool:
        """Whether it is an answer in words although a call was expected."""
        return self.is_turn and not self.called and self.wanted > 0


def read_answer(tokens: Sequence[int], ended: bool, tokenizer: Tokenizer) -> Message | None:
    """Parses the turn that a model wrote.

    Args:
        ended: whether the model wrote the end of its turn, so that the turn was not cut off.

    Returns:
        The turn, or None if it was cut off or does not parse.

    Raises:
        UserError: the tokenizer lacks the mark that ends a turn, see `stop_tokens`.
    """
    if not ended:
        return None
    try:
        return parse_turn(tokens, tokenizer)
    except ChatError:
        return None


def judge(turn: Message | None, expected: Message, tools: Sequence[Tool]) -> Verdict:
    """Compares a turn with the expected one, given the offered tools; a call of a tool that is not offered fits none.

    Args:
        turn: None: it was cut off or does not parse.
        tools: among them those that `expected` calls.

    Raises:
        ChatError: a call of `expected` names a tool that is not in `tools`.
    """
    calls = turn.calls if turn else ()
    expected_calls = expected.calls
    names = sorted(call.name for call in calls)
    return Verdict(
        wanted=len(expected_calls),
        is_turn=turn is not None,
        called=bool(calls),
        valid=bool(calls) and all(_fits(call, tools) for call in calls),
        names=turn is not None and names == sorted(call.name for call in expected_calls),
        right=calls_made(calls, expected_calls, tools),
        exact=turn is not None and same_calls(calls, expected_calls, tools),
    )


def calls_made(calls: Sequence[Call], expected: Sequence[Call], tools: Sequence[Tool]) -> int:
    """Returns the number of expected calls that were made, the largest possible; a call matches at most one expected
    call.

    Args:
        tools: among them those that `expected` calls.
    """
    tool_of = {tool.name: tool for tool in tools}
    return most_matched([[same_call(call, target, tool_of[target.name]) for call in calls] for target in expected])


def matched(calls: Sequence[Call], expected: Iterable[Wanted], same: Callable[[Call, Wanted], bool]) -> int:
    """Returns how many of `expected` are the same as a call, in any order and each call once: each takes the first call
    left that is the same, as on the leaderboard. `calls_made` counts the largest matching."""
    unmatched = list(calls)
    for target in expected:
        index = next((index for index, call in enumerate(unmatched) if same(call, target)), None)
        if index is not None:
            unmatched.pop(index)
    return len(calls) - len(unmatched)


def figures(verdicts: Iterable[tuple[str, Verdict]]) -> dict[str, float]:
    """Returns metrics of (kind, verdict) pairs: `tools/NAME` over all, `tools/NAME_KIND` for each kind.

    Over turns with an expected call: parses, valid_call, name_exact, call_exact, false_refusals (shares of turns),
    args_exact (share of expected calls), and parallel_exact over turns with several expected calls.
    Over the other turns: irrelevance, the share answered in words. A share of nothing is left out.
    """
    by_kind: dict[str, list[Verdict]] = {}
    for kind, verdict in verdicts:
        by_kind.setdefault(kind, []).append(verdict)

    all_verdicts = [verdict for of_kind in by_kind.values() for verdict in of_kind]
    metrics = {f"tools/{name}": share for name, share in _shares(all_verdicts).items()}
    for kind, of_kind in sorted(by_kind.items()):
        for name, share in _shares(of_kind).items():
            if name != "parallel_exact":
                metrics[f"tools/{name}_{kind}"] = share
    return metrics


def _shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Returns the figures of `figures` by name, without prefix, as fractions; a share of nothing is left out."""
    with_calls = [verdict for verdict in verdicts if verdict.wanted]
    with_several = [verdict for verdict in with_calls if verdict.wanted > 1]
    in_words = [verdict for verdict in verdicts if not verdict.wanted]

    shares = {}
    if with_calls:
        num_expected = sum(verdict.wanted for verdict in with_calls)
        shares["parses"] = _share(verdict.parses for verdict in with_calls)
        shares["valid_call"] = _share(verdict.valid for verdict in with_calls)
        shares["name_exact"] = _share(verdict.names for verdict in with_calls)
        shares["args_exact"] = sum(verdict.right for verdict in with_calls) / num_expected
        shares["call_exact"] = _share(verdict.exact for verdict in with_calls)
        shares["false_refusals"] = _share(verdict.refused for verdict in with_calls)
    if with_several:
        shares["parallel_exact"] = _share(verdict.exact for verdict in with_several)
    if in_words:
        shares["irrelevance"] = _share(verdict.exact for verdict in in_words)
    return shares


def _share(outcomes: Iterable[bool]) -> float:
    counts = list(outcomes)
    return sum(counts) / len(counts)


def _fits(call: Call, tools: Sequence[Tool]) -> bool:
    try:
        return not problems(call, tools)
    except ChatError:
        return False
