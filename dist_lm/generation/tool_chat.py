"""A conversation in which the model may call functions of a user's file (`dist_lm.tools.use`)."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_lm.chat.messages import Call, Conversation, Json, Message
from dist_lm.chat.parse import parse_turn, require_hermes_calls
from dist_lm.chat.template import prompt, stop_tokens
from dist_lm.errors import ConfigError, UserError, require
from dist_lm.generation.call_grammar import ToolChoice, call_constraint
from dist_lm.generation.constraint import Constraint
from dist_lm.generation.session import ENDINGS as FINISHES
from dist_lm.generation.session import Outcome, Session, Settings
from dist_lm.tokenizer.symbols import CALL
from dist_lm.tools.use.loop import Ending, Exchange, converse
from dist_lm.tools.use.toolbox import Limits, Toolbox

LINE_LENGTH = 300  # most characters of a line about a call or a result
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
    choice: ToolChoice = field(default_factory=ToolChoice)  # for the first turn that answers a request

    def __post_init__(self) -> None:
        require(self.max_rounds > 0, "--max-rounds", self.max_rounds, "a positive integer")
        if self.file is None and self.choice != ToolChoice():
            raise ConfigError("--tool-choice and --no-parallel-calls: expected --tools")


@dataclass(frozen=True)
class ChatOutcome:
    """The turns of the model in answer to one request."""

    exchange: Exchange
    outcomes: tuple[Outcome, ...]  # one for each turn of the model
    seconds: float

    @property
    def stopped(self) -> bool:
        return self.exchange.ending == "stopped"

    def __str__(self) -> str:
        """Says `2 turns, 48 tokens, 1.2 s, answered, seed 7`."""
        n_turns = len(self.outcomes)
        n_tokens = sum(len(outcome.answers[0].tokens) for outcome in self.outcomes)

        ending = ENDINGS[self.exchange.ending]
        if self.exchange.note:
            ending += f" ({self.exchange.note})"
        finish = self.outcomes[-1].answers[0].finish
        if finish in CUT_OFF and self.exchange.ending in ("answered", "no turn"):
            ending += f", cut off: {FINISHES[finish]}"
        return (
            f"{n_turns} turn{'s' * (n_turns != 1)}, {n_tokens:,} token{'s' * (n_tokens != 1)}, "
            f"{self.seconds:.1f} s, {ending}, seed {self.outcomes[0].seed}"
        )


class ToolChat:
    """The conversation so far. A request without an answer is removed, so that the next request can follow."""

    def __init__(
        self, session: Session, toolbox: Toolbox | None, max_rounds: int, choice: ToolChoice | None = None
    ) -> None:
        """
        Args:
            toolbox: the functions the model may call; None: it may call nothing.
            max_rounds: turns with calls per request, at most.
            choice: which calls the first turn of an answer may have; later turns may call or answer.

        Raises:
            UserError: the chat template of an imported model writes calls in another form than ours.
            ChatError: there is no function of the chosen name.
        """
        self._session = session
        self._toolbox = toolbox
        self._max_rounds = max_rounds
        if toolbox and session.tokenizer.kept_template:
            require_hermes_calls(session.tokenizer)
        self._constraints = _turn_constraints(toolbox, choice or ToolChoice(), session)
        self.forget()

    def forget(self) -> None:
        """Starts a new conversation."""
        self._conversation = self._previous = Conversation((), self._toolbox.tools if self._toolbox else ())

    def take_back(self) -> None:
        """Removes the last request and everything that followed."""
        self._conversation = self._previous

    def answer(
        self,
        text: str,
        settings: Settings,
        on_text: Callable[[str], None],
        on_note: Callable[[str], None],
        interrupted: Callable[[], bool] = lambda: False,
    ) -> ChatOutcome:
        """Sends `text` as the user's turn, runs the model's calls, and returns after its answer.

        The conversation grows only if the exchange ends as "answered"; otherwise it stays as it was.

        Args:
            on_text: called with each piece of the model's text in all its turns, nothing from a turn's first call on.
            on_note: called with one line for each call and each result.
            interrupted: called before every step of the model and while a call runs; when it returns True, the exchange
                ends as "stopped".

        Raises:
            UserError: the request is empty, is not valid Unicode or fills the context, or the engine refused it; the
                conversation is unchanged.
            RankLostError: with several devices, another process of the model has ended.
        """
        if not text.strip():
            raise UserError("the request is empty: type what the model should do")
        request = replace(self._conversation, messages=(*self._conversation.messages, Message("user", text)))
        prompt(request, self._session.tokenizer)  # raises for a bad request before the conversation changes

        outcomes: list[Outcome] = []

        def generate_turn(conversation: Conversation) -> Message | None:
            # Forced calls in every turn would leave no turn for the answer.
            constraint = self._constraints[min(len(outcomes), 1)]
            turn_settings = replace(settings, constraint=constraint or settings.constraint)
            outcome = self._turn(conversation, turn_settings, on_text, interrupted)
            outcomes.append(outcome)
            if outcome.stopped:
                return None
            tokens = [token for token in outcome.answers[0].tokens if token != self._session.tokenizer.eot_id]
            return parse_turn(tokens, self._session.tokenizer)

        started = time.perf_counter()
        self._previous = self._conversation
        exchange = converse(
            request,
            generate_turn,
            lambda call: self._toolbox.run(call, interrupted) if self._toolbox else None,
            self._max_rounds,
            on_call=lambda call: on_note(f"-> {shown_call(call)}"),
            on_result=lambda call, result: on_note(f"<- {shown_result(result)}"),
        )
        # A request without an answer would leave two turns of the user in a row.
        if exchange.ending == "answered":
            self._conversation = exchange.conversation
        return ChatOutcome(exchange, tuple(outcomes), time.perf_counter() - started)

    def _turn(
        self,
        conversation: Conversation,
        settings: Settings,
        on_text: Callable[[str], None],
        interrupted: Callable[[], bool],
    ) -> Outcome:
        """Returns one turn of the model: one answer that also ends at the tokens that end a turn. The conversation does
        not change.

        Args:
            on_text: called with each piece of text before the first call.

        Raises:
            UserError: the conversation fills the context or is not one the template takes (ChatError), or the engine
                refused it.
            RankLostError: with several devices, another process of the model has ended.
        """
        session, tokenizer = self._session, self._session.tokenizer
        prompt_ids, context = prompt(conversation, tokenizer), session.config.max_seq_len
        if len(prompt_ids) >= context:
            # A long conversation can be left; a first request fits only if something of it is given up.
            if len(conversation.messages) > 1:
                subject, way_out = "conversation has", "/new starts another one, --tool-characters shortens results"
            else:
                subject, way_out = "request and the tools have", "offer fewer functions or shorten the request"
            raise UserError(
                f"the {subject} {len(prompt_ids):,} tokens, and the model's context is {context:,} "
                f"(model.max_seq_len): {way_out}"
            )

        # Everything from the first call on is not text for the user.
        call_id = tokenizer.special_ids.get(CALL)
        has_called = False

        def on_token(token: int) -> None:
            nonlocal has_called
            has_called = has_called or token == call_id

        def on_piece(index: int, text: str) -> None:
            if not has_called:
                on_text(text)

        params = replace(settings.params, stop_tokens=(*settings.params.stop_tokens, *stop_tokens(tokenizer)))
        turn_settings = replace(settings, params=params)
        return session.answer(prompt_ids, turn_settings, 1, on_piece, interrupted=interrupted, on_token=on_token)


def _turn_constraints(
    toolbox: Toolbox | None, choice: ToolChoice, session: Session
) -> tuple[Constraint | None, Constraint | None]:
    """Returns the constraints of the first turn of an answer and of later ones; None without functions.

    Raises:
        ChatError: there is no function of the chosen name.
    """
    if not toolbox:
        return None, None
    later = replace(choice, mode="none" if choice.mode == "none" else "auto")
    # `converse` compares calls with their schemas and tells the model what does not fit.
    first, then = (call_constraint(toolbox.tools, session.tokenizer, which, strict=False) for which in (choice, later))
    return first, then


def warning_of(stage: str | None) -> str | None:
    """Returns a warning for a model of a stage that does not teach calls; otherwise None."""
    if stage not in UNTAUGHT:
        return None
    return f"this model was trained by stage={stage}, which does not teach calls: train it with stage=tools first"


def shown_call(call: Call) -> str:
    """Returns a call in one line: `weather(city="Oslo", days=3)`."""
    arguments = ", ".join(f"{name}={_json(argument)}" for name, argument in call.arguments.items())
    return _shorten(f"{call.name}({arguments})")


def shown_result(result: Json) -> str:
    """Returns the result of a call in one line."""
    return _shorten(_json(result))


def _json(content: Json) -> str:
    return json.dumps(content, ensure_ascii=False)


def _shorten(text: str) -> str:
    if len(text) <= LINE_LENGTH:
        return text
    return f"{text[:LINE_LENGTH]} ..."
