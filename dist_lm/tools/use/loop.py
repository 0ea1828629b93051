"""A model and its tools, taking turns until the model answers. What asks and what runs are arguments."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from dist_lm.chat.messages import Call, ChatError, Conversation, Json, Message
from dist_lm.chat.schema import problems

Ask = Callable[[Conversation], Message | None]
"""The assistant's next turn; None: it was stopped. ChatError: what the model wrote is no turn."""

Run = Callable[[Call], Json]
"""The result of a call that fits its tool; what goes wrong is a result, too."""

Ending = Literal["answered", "rounds", "refused", "no turn", "stopped"]


@dataclass(frozen=True)
class Exchange:
    """What came of a request."""

    conversation: Conversation  # all that was said, up to the last turn that is whole
    ending: Ending
    rounds: int  # of calls
    note: str = ""  # why it is no turn

    @property
    def answer(self) -> str:
        """The model's last words; empty if it did not come to any."""
        return self.conversation.messages[-1].content if self.ending == "answered" else ""


def converse(
    conversation: Conversation,
    ask: Ask,
    run: Run,
    max_rounds: int,
    on_call: Callable[[Call], None] = lambda call: None,
    on_result: Callable[[Call, Json], None] = lambda call, result: None,
) -> Exchange:
    """Let the model go on with `conversation` and run what it calls, until it answers.

    A call that does not fit its tool is not run: the model gets what is wrong as the result, `{"error": ...}`. Two
    turns one after the other with the same calls, none of which fits, end it.

    Args:
        max_rounds: turns with calls that are run, at most.
        on_call: called before each call is run or refused.
        on_result: called with its result.
    """
    refused: tuple[Call, ...] = ()  # of the turn before, if nothing of it was run
    for rounds in range(max_rounds + 1):
        try:
            turn = ask(conversation)
        except ChatError as error:
            return Exchange(conversation, "no turn", rounds, str(error))
        if turn is None:
            return Exchange(conversation, "stopped", rounds)
        if turn.calls and rounds == max_rounds:
            break
        conversation = _with(conversation, turn)
        if not turn.calls:
            return Exchange(conversation, "answered", rounds)
        results = []
        fits = False
        for call in turn.calls:
            on_call(call)
            wrong = problems(call, conversation.tools)
            fits = fits or not wrong
            results.append({"error": "; ".join(wrong)} if wrong else run(call))
            on_result(call, results[-1])
        conversation = _with(conversation, Message("tool", results=tuple(results)))
        if turn.calls == refused:
            return Exchange(conversation, "refused", rounds + 1)
        refused = () if fits else turn.calls
    return Exchange(conversation, "rounds", max_rounds)


def _with(conversation: Conversation, turn: Message) -> Conversation:
    return replace(conversation, messages=(*conversation.messages, turn))
