"""A conversation in which the model may call functions of a user's file (`dist_lm.tools.use`)."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_lm.chat.messages import Call, Conversation, Json, Message
from dist_lm.chat.parse import parse_turn, require_hermes_calls
from dist_lm.chat.template import prompt, stop_tokens
from dist_lm.errors import UserError, require
from dist_lm.generation.session import ENDINGS as FINISHES
from dist_lm.generation.session import Outcome, Session, Settings
from dist_lm.tokenizer.symbols import CALL
from dist_lm.tools.use.loop import Ending, Exchange, converse
from dist_lm.tools.use.toolbox import Limits, Toolbox

LONGEST = 300  # characters shown of a call or a result
UNTAUGHT = ("language", "code")  # stages that do not teach calls
CUT_OFF = ("length", "context")  # the turn ended before the model closed it
ENDINGS: dict[Ending, str] = {
    "answered": "answered",
    "rounds": "no answer after --max-rounds",
    "refused": "no answer: the model repeats refused calls",
    "no turn": "the model's output is not a turn",
    "stopped": "stopped",
}


@dataclass(frozen=True)
class ToolOptions:
    """Values of --tools, --chat and their related options."""

    file: Path | None  # None: the model may call nothing
    max_rounds: int = 8  # turns with calls per request, at most
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        require(self.max_rounds > 0, "--max-rounds", self.max_rounds, "a positive integer")


@dataclass(frozen=True)
class ChatOutcome:
    """The result of one request."""

    exchange: Exchange
    outcomes: tuple[Outcome, ...]  # one for each turn of the model
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
    """The conversation so far. A request without an answer is removed, so that the next request can follow."""

    def __init__(self, session: Session, toolbox: Toolbox | None, max_rounds: int) -> None:
        """`toolbox`: None: the model may call nothing.

        Raises:
            UserError: the chat template of an imported model writes calls in another form than ours.
        """
        self._session, self._toolbox, self._max_rounds = session, toolbox, max_rounds
        if toolbox and session.tokenizer.kept_template:
            require_hermes_calls(session.tokenizer)
        self.forget()

    def forget(self) -> None:
        """Start a new conversation."""
        self._said = self._before = Conversation((), self._toolbox.tools if self._toolbox else ())

    def take_back(self) -> None:
        """Remove the last request and everything that followed."""
        self._said = self._before

    def answer(
        self,
        text: str,
        settings: Settings,
        on_text: Callable[[str], None],
        on_note: Callable[[str], None],
        interrupted: Callable[[], bool] = lambda: False,
    ) -> ChatOutcome:
        """Send `text` as the user's turn, run the model's calls, and return after its answer.

        Args:
            on_text: called with each piece of the model's text, calls excluded.
            on_note: called with one line for each call and each result.

        Raises:
            UserError: the request is empty, is not valid Unicode or fills the context; the conversation is unchanged.
        """
        if not text.strip():
            raise UserError("the request is empty: type what the model should do")
        outcomes: list[Outcome] = []
        asked = replace(self._said, messages=(*self._said.messages, Message("user", text)))
        prompt(asked, self._session.tokenizer)  # raises for a bad request before the model is asked

        def ask(conversation: Conversation) -> Message | None:
            outcomes.append(self._turn(conversation, settings, on_text, interrupted))
            if outcomes[-1].stopped:
                return None
            tokens = [token for token in outcomes[-1].answers[0].tokens if token != self._session.tokenizer.eot_id]
            return parse_turn(tokens, self._session.tokenizer)

        started = time.perf_counter()
        self._before = self._said
        exchange = converse(
            asked,
            ask,
            lambda call: self._toolbox.run(call, interrupted) if self._toolbox else None,
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
        session, marks = self._session, self._session.tokenizer
        tokens, context = prompt(conversation, session.tokenizer), session.config.max_seq_len
        if len(tokens) >= context:
            if len(conversation.messages) > 1:
                what, way_out = "conversation has", "/new starts another one, --tool-characters shortens results"
            else:
                what, way_out = "request and the tools have", "offer fewer functions or shorten the request"
            raise UserError(
                f"the {what} {len(tokens):,} tokens, and the model's context is {context:,} (model.max_seq_len): "
                f"{way_out}"
            )
        calling, call = False, marks.special_ids.get(CALL)

        def look(token: int) -> None:
            nonlocal calling
            calling = calling or token == call

        def show(index: int, text: str) -> None:
            if not calling:
                on_text(text)

        params = replace(settings.params, stop_tokens=(*settings.params.stop_tokens, *stop_tokens(marks)))
        own = replace(settings, params=params)
        return session.answer(tokens, own, 1, show, interrupted=interrupted, on_token=look)


def warning_of(stage: str | None) -> str | None:
    """A warning for a model of a stage that does not teach calls; otherwise None."""
    if stage not in UNTAUGHT:
        return None
    return f"this model was trained by stage={stage}, which does not teach calls: train it with stage=tools first"


def shown_call(call: Call) -> str:
    """A call in one line: `weather(city="Oslo", days=3)`."""
    return _short(f"{call.name}({', '.join(f'{name}={_json(value)}' for name, value in call.arguments.items())})")


def shown_result(result: Json) -> str:
    """A result in one line."""
    return _short(_json(result))


def _json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
