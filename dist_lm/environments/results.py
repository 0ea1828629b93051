"""Makes results of calls fit into an observation, whatever the model has made them.

No model may end its conversation without a reward by a result that is too long or that JSON cannot hold.
"""

import json
from collections.abc import Awaitable, Callable, Sequence

from dist_lm.chat import json_text
from dist_lm.chat.messages import Call, ChatError, Json, Tool
from dist_lm.chat.schema import problems
from dist_lm.environments.protocol import Limits, Observation

MOST_CALLS = 16  # calls of a turn that are executed; further ones have the result null
LONGEST_PROBLEM = 500  # characters
_BYTES_OF_CHARACTER = 6  # at most, in JSON


async def executed(
    calls: Sequence[Call], tools: Sequence[Tool], run: Callable[[Call, int], Awaitable[Json]], limits: Limits
) -> Observation:
    """Executes the calls of a turn one after another and returns their results, one for each call.

    The first `MOST_CALLS` share half of `limits.observation_bytes`. A result that is longer is replaced by an error.
    Further calls are not executed and have the result null. A call that does not fit its tool is not executed either:
    its result says what is wrong.

    Args:
        calls: at least one.
        run: (call, most bytes of its result as JSON) -> result; what it raises passes.
    """
    most_bytes = limits.observation_bytes // (2 * min(len(calls), MOST_CALLS))
    results: list[Json] = []
    for number, call in enumerate(calls):
        # Every call needs a result: a conversation has as many results as calls.
        if number >= MOST_CALLS:
            results.append(None)
            continue

        try:
            call_problems = problems(call, tools)
        except ChatError as error:
            call_problems = [str(error)]
        if call_problems:
            text = clipped("; ".join(call_problems), LONGEST_PROBLEM * _BYTES_OF_CHARACTER)
            results.append({"error": clipped(text, most_bytes - 20)})
        else:
            results.append(fitting(await run(call, most_bytes), most_bytes))
    return Observation.results(*results)


def fitting(result: Json, most_bytes: int) -> Json:
    """Returns a result unchanged, or `{"error": why}` in its place if it has more than `most_bytes` as JSON or JSON
    cannot hold it.
    """
    try:
        size = len(json_text.write(result, "the result").encode())
    except ChatError as error:
        return {"error": clipped(str(error), most_bytes - 20)}
    if size > most_bytes:
        return {"error": "the result is too long"}
    return result


def clipped(text: str, most_bytes: int) -> str:
    """Returns a text of at most `most_bytes` as JSON: all of it, or its begin and end around a note of what was cut."""
    if len(json.dumps(text)) <= most_bytes:
        return text
    # A character may take six bytes, and the note in the middle takes up to 40 characters.
    num_shown = max(0, most_bytes // _BYTES_OF_CHARACTER - 40)
    head, tail = num_shown - num_shown // 2, num_shown // 2
    return f"{text[:head]}\n... ({len(text) - num_shown:,} characters cut) ...\n{text[len(text) - tail :]}"
