"""What an answer is worth: one turn against the turn that was expected, then figures over many. Pure.

Calls are compared as the Berkeley Function Calling Leaderboard compares them (`chat.compare`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dist_lm.chat.compare import same_call, same_calls
from dist_lm.chat.errors import ChatError
from dist_lm.chat.messages import Call, Message, Tool
from dist_lm.chat.schema import problems
from dist_lm.chat.template import parse_turn
from dist_lm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Verdict:
    """What was found of one turn."""

    wanted: int  # calls that were expected
    is_turn: bool  # a turn by the template, ended by itself
    called: bool  # with a call
    valid: bool  # and every call is of a tool that is offered, with arguments that fit its schema
    names: bool  # as many calls as expected, of the same tools
    right: int  # expected calls that were made, with the same arguments
    exact: bool  # the calls are those expected, no more and no less; without any, where none was

    @property
    def parses(self) -> bool:
        """A turn, with a call where one was expected."""
        return self.is_turn and (self.called or not self.wanted)

    @property
    def refused(self) -> bool:
        """An answer in words although a call was expected."""
        return self.is_turn and not self.called and self.wanted > 0


def read_answer(tokens: Sequence[int], ended: bool, tokenizer: Tokenizer, tools: Sequence[Tool]) -> Message | None:
    """The turn that a model wrote who was offered `tools`; None: it is none, or was cut off (`ended` is False)."""
    if not ended:
        return None
    try:
        return parse_turn(tokens, tokenizer, tools)
    except ChatError:
        return None


def judge(found: Message | None, expected: Message, tools: Sequence[Tool]) -> Verdict:
    """Hold a turn (None: it does not parse) against the one expected; `tools`: those that were offered."""
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
    """How many of the expected calls were made; each one found stands for one expected."""
    by_name = {tool.name: tool for tool in tools}
    left = list(found)
    for call in expected:
        same = next((place for place, one in enumerate(left) if same_call(one, call, by_name[call.name])), None)
        if same is not None:
            left.pop(same)
    return len(found) - len(left)


def figures(verdicts: Iterable[tuple[str, Verdict]]) -> dict[str, float]:
    """`tools/NAME` over all (kind, verdict), and `tools/NAME_KIND` over each kind; a share of nothing is left out.

    Where a call was expected (shares of turns; `args_exact` of the calls expected):
        parses, valid_call, name_exact, args_exact, call_exact, false_refusals; parallel_exact where several were
    Where none was:
        irrelevance: answered in words
    """
    by_kind: dict[str, list[Verdict]] = {}
    for kind, verdict in verdicts:
        by_kind.setdefault(kind, []).append(verdict)
    everything = [verdict for found in by_kind.values() for verdict in found]
    found = {f"tools/{name}": share for name, share in shares(everything).items()}
    for kind, part in sorted(by_kind.items()):
        of_kind = {name: share for name, share in shares(part).items() if name != "parallel_exact"}
        found |= {f"tools/{name}_{kind}": share for name, share in of_kind.items()}
    return found


def shares(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The figures of `figures`, by their plain names."""
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
