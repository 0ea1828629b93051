"""Scores of tool use: compare one turn with the expected one, then compute shares over many. Pure functions.

Calls are compared as the Berkeley Function Calling Leaderboard compares them (`chat.compare`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dist_lm.chat.compare import same_call, same_calls
from dist_lm.chat.messages import Call, ChatError, Message, Tool
from dist_lm.chat.parse import parse_turn
from dist_lm.chat.schema import problems
from dist_lm.tokenizer.tokenizer import Tokenizer

Wanted = TypeVar("Wanted")


@dataclass(frozen=True)
class Verdict:
    """The result for one turn."""

    wanted: int  # number of expected calls
    is_turn: bool  # the tokens parse as a turn, and the model ended it
    called: bool  # the turn contains a call
    valid: bool  # it contains calls, and all of them name an offered tool and fit its schema
    names: bool  # it calls the expected tools, each as often as expected
    right: int  # number of expected calls that were made with the expected arguments
    exact: bool  # the calls equal the expected ones; if none is expected, there is none

    @property
    def parses(self) -> bool:
        """A turn, with a call if one was expected."""
        return self.is_turn and (self.called or not self.wanted)

    @property
    def refused(self) -> bool:
        """An answer in words although a call was expected."""
        return self.is_turn and not self.called and self.wanted > 0


def read_answer(tokens: Sequence[int], ended: bool, tokenizer: Tokenizer) -> Message | None:
    """Parse the turn that a model wrote.

    Args:
        ended: the model wrote the end of its turn, so that the turn was not cut off.

    Returns:
        The turn, or None if it was cut off or does not parse.
    """
    if not ended:
        return None
    try:
        return parse_turn(tokens, tokenizer)
    except ChatError:
        return None


def judge(found: Message | None, expected: Message, tools: Sequence[Tool]) -> Verdict:
    """Compare a turn (None: it does not parse) with the expected one, given the offered tools."""
    calls = found.calls if found else ()
    wanted = expected.calls
    return Verdict(
        wanted=len(wanted),
        is_turn=found is not None,
        called=bool(calls),
        valid=bool(calls) and all(_fits(call, tools) for call in calls),
        names=found is not None and sorted(call.name for call in calls) == sorted(call.name for call in wanted),
        right=calls_made(calls, wanted, tools),
        exact=found is not None and same_calls(calls, wanted, tools),
    )


def calls_made(found: Sequence[Call], expected: Sequence[Call], tools: Sequence[Tool]) -> int:
    """Number of expected calls that were made; one call found matches at most one expected call."""
    by_name = {tool.name: tool for tool in tools}
    return matched(found, expected, lambda call, wanted: same_call(call, wanted, by_name[wanted.name]))


def matched(found: Sequence[Call], expected: Iterable[Wanted], same: Callable[[Call, Wanted], bool]) -> int:
    """Number of `expected` that a call found is the same as, in any order and each call once."""
    left = list(found)
    for wanted in expected:
        place = next((place for place, call in enumerate(left) if same(call, wanted)), None)
        if place is not None:
            left.pop(place)
    return len(found) - len(left)


def figures(verdicts: Iterable[tuple[str, Verdict]]) -> dict[str, float]:
    """Metrics of all (kind, verdict) pairs: `tools/NAME` over all, `tools/NAME_KIND` for each kind.

    Over turns with an expected call: parses, valid_call, name_exact, call_exact, false_refusals (shares of turns),
    args_exact (share of expected calls), and parallel_exact over turns with several expected calls.
    Over the other turns: irrelevance, the share answered in words. A share of nothing is left out.
    """
    by_kind: dict[str, list[Verdict]] = {}
    for kind, verdict in verdicts:
        by_kind.setdefault(kind, []).append(verdict)
    everything = [verdict for found in by_kind.values() for verdict in found]
    found = {f"tools/{name}": share for name, share in _shares(everything).items()}
    for kind, part in sorted(by_kind.items()):
        of_kind = {name: share for name, share in _shares(part).items() if name != "parallel_exact"}
        found |= {f"tools/{name}_{kind}": share for name, share in of_kind.items()}
    return found


def _shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    calling = [verdict for verdict in verdicts if verdict.wanted]
    several = [verdict for verdict in calling if verdict.wanted > 1]
    words = [verdict for verdict in verdicts if not verdict.wanted]
    found = {}
    if calling:
        found["parses"] = _share(verdict.parses for verdict in calling)
        found["valid_call"] = _share(verdict.valid for verdict in calling)
        found["name_exact"] = _share(verdict.names for verdict in calling)
        found["args_exact"] = sum(verdict.right for verdict in calling) / sum(verdict.wanted for verdict in calling)
        found["call_exact"] = _share(verdict.exact for verdict in calling)
        found["false_refusals"] = _share(verdict.refused for verdict in calling)
    if several:
        found["parallel_exact"] = _share(verdict.exact for verdict in several)
    if words:
        found["irrelevance"] = _share(verdict.exact for verdict in words)
    return found


def _share(values: Iterable[bool]) -> float:
    counted = list(values)
    return sum(counted) / len(counted)


def _fits(call: Call, tools: Sequence[Tool]) -> bool:
    try:
        return not problems(call, tools)
    except ChatError:
        return False
