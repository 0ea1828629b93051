"""Columns of tasks that several environments read."""

from collections.abc import Mapping

from dist_lm.chat.messages import ChatError, Json, Message
from dist_lm.data.prompt_rows import prompt_of
from dist_lm.environments.protocol import RefusedTaskError


def opening_of(data: Mapping[str, Json]) -> tuple[Message, ...]:
    """Returns the turns that open a conversation: those of the prompt of a task.

    Raises:
        RefusedTaskError: the task has no prompt that a conversation can begin with.
    """
    try:
        return prompt_of(data).messages
    except ChatError as error:
        raise RefusedTaskError(str(error)) from None
