"""A recorded conversation in the form of the page: turns, calls and results, cut to a bounded size.

    turns    the first and the last ones, MOST_TURNS in all, with MOST_PARTS calls or results each
    texts    both ends, LONGEST characters in all; less if the conversation has more than BYTES of HTML

Everything that model and environment wrote is untrusted: control characters become symbols here, and the page escapes
the rest. Pure.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from markupsafe import escape

from dist_lm.chat.messages import Call, Json, Message
from dist_lm.environments.protocol import EnvironmentFailedError, Observation
from dist_lm.environments.values import action_of, observation_of, step_of
from dist_lm.report.conversations import ChosenConversation
from dist_lm.tracking.readable import counted, four_digits, visible

if TYPE_CHECKING:
    from dist_lm.rlhf.episodes import Turn

MOST_TURNS = 16  # turns of a conversation, of all roles
MOST_PARTS = 4  # calls or results of a turn
LONGEST = 1600  # characters of a text
LONGEST_NAME = 50  # characters of the name of a tool
BYTES = 24_000  # most HTML for the texts of a conversation


@dataclass(frozen=True)
class Part:
    """A call of the model, or a result of one."""

    name: str  # the tool that is called; empty: a result
    text: str
    is_error: bool = False


@dataclass(frozen=True)
class ShownTurn:
    """A turn of a conversation on the page; without a role, a remark on the turns around it."""

    role: str
    text: str
    parts: tuple[Part, ...] = ()
    thinking: str = ""
    reward: float = 0.0  # reward of a model's turn alone
    tokens: int = 0  # tokens that the model drew
    notes: tuple[str, ...] = ()  # remarks on anything unusual


@dataclass(frozen=True)
class ShownConversation:
    """A conversation on the page."""

    chosen: ChosenConversation
    ending: str  # why it was cut, or has no verdict
    tools: str  # names of those that the model may call
    turns: tuple[ShownTurn, ...]

    @property
    def html_bytes(self) -> int:
        """The size of all texts as HTML, tags excluded."""
        texts = [self.ending, self.tools]
        for turn in self.turns:
            texts += [turn.role, turn.text, turn.thinking, *turn.notes]
            texts += [text for part in turn.parts for text in (part.name, part.text)]
        return sum(len(escape(text).encode()) for text in texts)


def shown_conversation(chosen: ChosenConversation) -> ShownConversation:
    """Returns a conversation in the form of the page; the more text it has, the shorter is each piece of it."""
    try:
        for longest in (LONGEST, 800, 400, 200, 100):
            conversation = _shown_conversation(chosen, longest)
            if conversation.html_bytes <= BYTES:
                return conversation
        return _shown_conversation(chosen, 50)
    # A checksum says that a line is whole, not that it holds what this version writes.
    except (EnvironmentFailedError, KeyError, TypeError, ValueError, AttributeError) as error:
        problem = _fitted(f"the record cannot be read: {type(error).__name__}: {error}", LONGEST)
        return ShownConversation(chosen, problem, "", ())


def _shown_conversation(chosen: ChosenConversation, longest: int) -> ShownConversation:
    episode = chosen.episode
    # Without an opening, the environment failed before the first turn.
    opening = Observation() if episode.opening is None else observation_of(episode.opening)

    both_sides: list[Message | ShownTurn | tuple[Turn, str]] = [*opening.messages]
    for number, turn in enumerate(episode.turns):
        both_sides.append((turn, chosen.thinking[number] if number < len(chosen.thinking) else ""))
        if turn.step is None:
            continue

        observation = step_of(turn.step).observation
        if observation.begins_anew:
            both_sides.append(ShownTurn("", "the conversation begins anew with:"))
        both_sides += observation.messages

    half, num_left_out = MOST_TURNS // 2, len(both_sides) - MOST_TURNS
    if num_left_out > 0:
        del both_sides[half : half + num_left_out]
    turns = [_shown_turn(turn, longest) for turn in both_sides]
    if num_left_out > 0:
        turns.insert(half, ShownTurn("", f"{counted(num_left_out, 'turn')} left out"))

    ending = ""
    if not episode.verdict.valid:
        reason, detail = str(episode.verdict.failure_reason), episode.verdict.detail
        ending = _fitted(f"{reason}: {detail}" if detail else reason, longest)
    elif episode.cut:
        ending = f"cut by the limit of {episode.cut}"
        if chosen.penalty:
            ending += f", penalty {four_digits(chosen.penalty)}"
    tools = _fitted(", ".join(tool.name for tool in opening.tools), longest)
    return ShownConversation(chosen, ending, tools, tuple(turns))


def _shown_turn(turn: "Message | ShownTurn | tuple[Turn, str]", longest: int) -> ShownTurn:
    if isinstance(turn, ShownTurn):
        return turn
    if isinstance(turn, Message):
        return _read_turn(turn, longest)
    return _model_turn(*turn, longest)


def _model_turn(turn: "Turn", thinking: str, longest: int) -> ShownTurn:
    action = action_of(cast(Any, turn.action))

    notes = []
    if action.cut:
        notes.append(f"the last one ({action.cut})")
    if not turn.is_readable:
        notes.append("unreadable calls")
    if turn.tool_errors:
        notes.append(counted(turn.tool_errors, "error"))
    if turn.step is None:
        notes.append("no step followed")

    return ShownTurn(
        role="model",
        text=_fitted(action.text, longest),
        parts=_parts(action.calls, (), longest),
        thinking=_fitted(thinking, longest),
        reward=turn.reward,
        tokens=turn.new_tokens,
        notes=tuple(notes),
    )


def _read_turn(message: Message, longest: int) -> ShownTurn:
    """Returns a turn that the model read: of the environment, or of the opening."""
    return ShownTurn(
        role=message.role,
        text=_fitted(message.content, longest),
        parts=_parts(message.calls, message.results, longest),
        thinking=_fitted(message.thinking, longest),
    )


def _parts(calls: Sequence[Call], results: Sequence[Json], longest: int) -> tuple[Part, ...]:
    """Returns the first calls and results of a turn, and how many more there are."""
    parts = [
        Part(_fitted(call.name, LONGEST_NAME), _fitted(readable_json(call.arguments), longest))
        for call in calls[:MOST_PARTS]
    ]
    for result in results[: MOST_PARTS - len(parts)]:
        is_error = isinstance(result, dict) and bool(result.get("error"))
        parts.append(Part("", _fitted(readable_json(result), longest), is_error))

    num_left_out = len(calls) + len(results) - len(parts)
    if num_left_out:
        parts.append(Part("", f"[{num_left_out:,} more]"))
    return tuple(parts)


def readable_json(value: Json) -> str:
    """Returns a JSON value for people: a text as it is, the fields of an object one below the other, else JSON."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)

    lines = []
    for name, content in value.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        # Code and output have several lines, which read best from the left edge.
        lines.append(f"{name}:\n{text}" if "\n" in text.rstrip("\n") else f"{name}: {text}")
    return "\n".join(line.rstrip("\n") for line in lines)


def _fitted(text: str, longest: int) -> str:
    """Returns a text whose control characters are symbols; of one of more than `longest` characters both ends."""
    if len(text) <= longest:
        return visible(text)
    half = longest // 2
    return f"{visible(text[:half])}\n[{len(text) - 2 * half:,} characters left out]\n{visible(text[-half:])}"
