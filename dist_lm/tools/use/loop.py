"""Alternates between a model's calls and their results until the model answers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from dist_lm.chat.messages import Call, ChatError, Conversation, Json, Message
from dist_lm.chat.schema import problems

Ask = Callable[[Conversation], Message | None]
"""Returns the assistant's next turn; None: generation was stopped. Raises ChatError if the output is no turn."""

Run = Callable[[Call], Json]
"""Returns the result of a call that fits its tool. An error is returned as a result."""

Ending = Literal["answered", "rounds", "refused", "no turn", "stopped"]


@dataclass(frozen=True)
class Exchange:
    """The outcome of a request to the model."""

    conversation: Conversation  # up to the last complete turn
    ending: Ending
    rounds: int  # number of turns with calls that were run
    note: str = ""  # for ending "no turn": the error

    @property
    def answer(self) -> str:
        """Returns the model's answer; empty if there is none."""
        if self.ending == "answered":
            return self.conversation.messages[-1].content
        return ""


def converse(
    conversation: Conversation,
    ask: Ask,
    run: Run,
    max_rounds: int,
    on_call: Callable[[Call], None] = lambda call: None,
    on_result: Callable[[Call, Json], None] = lambda call, result: None,
) -> Exchange:
    """Lets the model continue `conversation` and runs its calls until it answers; returns how that ended.

    A call that does not fit its tool is not run; its result is `{"error": problems}`. Endings: `answered`; `stopped`
    (`ask` returned None); `no turn` (`ask` raised ChatError); `refused` (two turns in a row make the same calls and
    none of them fits); `rounds` (`max_rounds` turns of calls, and the next one has calls too: it is left out). Other
    errors of `ask` and `run` reach the caller.

    Args:
        max_rounds: largest number of turns with calls that are run.
        on_call: called before a call is run or refused.
        on_result: called with the result of a call.
    """
    # A model that repeats a refused call would do so for ever.
    refused: tuple[Call, ...] = ()  # calls of the previous turn, if all were refused

    for rounds in range(max_rounds + 1):
        try:
            turn = ask(conversation)
        except ChatError as error:
            return Exchange(conversation, "no turn", rounds, str(error))

        if turn is None:
            return Exchange(conversation, "stopped", rounds)
        # The limit is reached: these calls are not run, and their turn is not part of the conversation.
        if turn.calls and rounds == max_rounds:
            break

        conversation = _with(conversation, turn)
        if not turn.calls:
            return Exchange(conversation, "answered", rounds)

        # A call that does not fit gets its problems as the result, so the model can correct it.
        results = []
        any_fits = False
        for call in turn.calls:
            on_call(call)
            call_problems = problems(call, conversation.tools)
            any_fits = any_fits or not call_problems
            if call_problems:
                results.append({"error": "; ".join(call_problems)})
            else:
                results.append(run(call))
            on_result(call, results[-1])

        conversation = _with(conversation, Message("tool", results=tuple(results)))
        if turn.calls == refused:
            return Exchange(conversation, "refused", rounds + 1)
        refused = () if any_fits else turn.calls

    return Exchange(conversation, "rounds", max_rounds)


def _with(conversation: Conversation, turn: Message) -> Conversation:
    return replace(conversation, messages=(*conversation.messages, turn))
