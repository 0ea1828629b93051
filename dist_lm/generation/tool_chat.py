"""A conversation with a model that may call a person's own functions (`dist_lm.tools.use`)."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_lm.chat.messages import Call, Conversation, Json, Message
from dist_lm.chat.template import CALL, END, parse_turn, prompt
from dist_lm.errors import UserError, require
from dist_lm.generation.session import ENDINGS as FINISHES
from dist_lm.generation.session import Outcome, Session, Settings
from dist_lm.tools.use.loop import Ending, Exchange, converse
from dist_lm.tools.use.toolbox import Limits, Toolbox

LONGEST = 300  # characters of a call or a result that are shown
UNTAUGHT = ("language", "code")  # stages before the one that teaches calls
CUT_OFF = ("length", "context")  # how a turn of the model finishes that it did not close itself
ENDINGS: dict[Ending, str] = {
    "answered": "answered",
    "rounds": "no answer after --max-rounds",
    "refused": "no answer: it repeats calls that are refused",
    "no turn": "it wrote no turn of a conversation",
    "stopped": "stopped",
}


@dataclass(frozen=True)
class ToolOptions:
    """What --tools and its companions say."""

    file: Path
    max_rounds: int = 8  # turns with calls that are run for one request
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        require(self.max_rounds > 0, "--max-rounds", self.max_rounds, "a positive integer")


@dataclass(frozen=True)
class ChatOutcome:
    """What came of one thing that a person said."""

    exchange: Exchange
    outcomes: tuple[Outcome, ...]  # of each turn of the model
    seconds: float

    @property
    def stopped(self) -> bool:
        return self.exchange.ending == "stopped"

    def __str__(self) -> str:
        """`2 turns, 48 tokens, 1.2 s, answered, seed 7`."""
        turns, tokens = len(self.outcomes), sum(len(one.answers[0].tokens) for one in self.outcomes)
        ending = ENDINGS[self.exchange.ending] + (f" ({self.exchange.note})" if self.exchange.note else "")
        finish = self.outcomes[-1].answers[0].finish
        if finish in CUT_OFF and self.exchange.ending in ("answered", "no turn"):
            ending += f", cut off: {FINISHES[finish]}"
        return (
            f"{turns} turn{'' if turns == 1 else 's'}, {tokens:,} token{'' if tokens == 1 else 's'}, "
            f"{self.seconds:.1f} s, {ending}, seed {self.outcomes[0].seed}"
        )


class ToolChat:
    """What was said so far. A request that comes to no answer is taken back, so that the next one can be made."""

    def __init__(self, session: Session, toolbox: Toolbox, max_rounds: int) -> None:
        self._session, self._toolbox, self._max_rounds = session, toolbox, max_rounds
        self._said = self._before = Conversation((), toolbox.tools)

    def forget(self) -> None:
        """Begin anew."""
        self._said = self._before = Conversation((), self._toolbox.tools)

    def take_back(self) -> None:
        """Forget the last request and all that came of it."""
        self._said = self._before

    def answer(
        self,
        text: str,
        settings: Settings,
        on_text: Callable[[str], None],
        on_note: Callable[[str], None],
        interrupted: Callable[[], bool] = lambda: False,
    ) -> ChatOutcome:
        """Say `text`, and let the model call and answer.

        Args:
            on_text: called with the model's words as they come.
            on_note: called with a line for each call and each result.

        Raises:
            UserError: the request is empty or no Unicode, or leaves no room in the context; nothing of it is kept.
        """
        if not text.strip():
            raise UserError("the request is empty: say what the model is to do")
        outcomes: list[Outcome] = []
        asked = replace(self._said, messages=(*self._said.messages, Message("user", text)))
        prompt(asked, self._session.tokenizer)  # what is wrong with the request is not the model's turn

        def ask(conversation: Conversation) -> Message | None:
            outcomes.append(self._turn(conversation, settings, on_text, interrupted))
            if outcomes[-1].stopped:
                return None
            tokens = [token for token in outcomes[-1].answers[0].tokens if token != self._session.tokenizer.eot_id]
            return parse_turn(tokens, self._session.tokenizer, conversation.tools)

        started = time.perf_counter()
        self._before = self._said
        exchange = converse(
            asked,
            ask,
            lambda call: self._toolbox.run(call, interrupted),
            self._max_rounds,
            on_call=lambda call: on_note(f"-> {shown_call(call)}"),
            on_result=lambda call, result: on_note(f"<- {shown_result(result)}"),
        )
        if exchange.ending == "answered":
            self._said = exchange.conversation
        return ChatOutcome(exchange, tuple(outcomes), time.perf_counter() - started)

    def _turn(
        self,
        conversation: Conversation,
        settings: Settings,
        on_text: Callable[[str], None],
        interrupted: Callable[[], bool],
    ) -> Outcome:
        session, special = self._session, self._session.tokenizer.special_ids
        tokens, context = prompt(conversation, session.tokenizer), session.config.max_seq_len
        if len(tokens) >= context:
            if len(conversation.messages) > 1:
                what, way_out = "conversation has", "/new begins another, --tool-characters cuts results"
            else:
                what, way_out = "request and the tools have", "offer fewer functions, or say less"
            raise UserError(
                f"the {what} {len(tokens):,} tokens, and the model's context is {context:,} (model.max_seq_len): "
                f"{way_out}"
            )
        calling = False

        def look(token: int) -> None:
            nonlocal calling
            calling = calling or token == special[CALL]

        def show(index: int, text: str) -> None:
            if not calling:
                on_text(text)

        params = replace(settings.params, stop_tokens=(*settings.params.stop_tokens, special[END]))
        own = replace(settings, params=params)
        return session.answer(tokens, own, 1, show, interrupted=interrupted, on_token=look)


def warning_of(stage: str | None) -> str | None:
    """What to say of a model that was trained by `stage`."""
    if stage not in UNTAUGHT:
        return None
    return f"this is a model of stage {stage}, which teaches no calls: expect nonsense until stage=tools"


def shown_call(call: Call) -> str:
    """`weather(city="Oslo", days=3)`."""
    return _short(f"{call.name}({', '.join(f'{name}={_json(value)}' for name, value in call.arguments.items())})")


def shown_result(result: Json) -> str:
    """A result in one line."""
    return _short(_json(result))


def _json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
