"""The process of a user's reward function: `python -m dist_lm.rlhf.reward_function SOCKET PACKAGE.MODULE:NAME`.

The process imports the function and says how it is called (`reward_forms`). Then it judges: it gets many completions
at once, and answers one by one. A function that takes many gets all of a request in one call.
`dist_lm.rlhf.rules.FunctionRule` starts it and reads its answers.
"""

import importlib
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dist_lm.rlhf import reward_forms
from dist_lm.rlhf.reward_forms import Answer, Form, Judged, form_of, scores
from dist_lm.storage.json_process import serve_requests

LONGEST_REASON = 300  # characters of a reason in an answer


def main() -> None:
    """Imports the function and judges until the parent ends; an answer goes to the parent after each completion.

    The first message says `loaded`, and whether calls are `batched` and read `rows`; or `refused` with the reason,
    after which the process ends.
    """
    with serve_requests() as (requests, send):
        module, _, name = sys.argv[2].partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
            form = form_of(function)
        # The user's module may raise anything when it is imported, SystemExit included.
        except BaseException as error:
            send({"refused": f"{type(error).__name__}: {error}"})
            return

        send({"loaded": name, "batched": form.is_batched, "rows": form.reads_rows})
        while True:
            judged = judged_of(requests.get())
            if form.is_batched:
                for scored in answers(function, form, judged):
                    send(scored)
            else:
                for rollout in judged:
                    send(answers(function, form, [rollout])[0])


def judged_of(request: Mapping[str, Any]) -> list[Judged]:
    """Returns the completions of a request: `judged` has (number of the row, request, completion, tokens) of each,
    `rows` the (messages, columns) of each prompt, which many completions share."""
    judged = []
    for number, text, completion, tokens in request["judged"]:
        messages, columns = request["rows"][number] if request["rows"] else ((), {})
        judged.append(Judged(text, completion, tokens, messages, columns))
    return judged


def answers(function: Callable[..., Any], form: Form, judged: list[Judged]) -> list[Answer]:
    """Calls the function once and returns an answer for each completion.

    A function that raises, SystemExit included, gives a `failure` for each of them. The reason is cut to about
    LONGEST_REASON characters and names the line.
    """
    try:
        return [_answer(value) for value in scores(function, form, judged)]
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"[:LONGEST_REASON] + _place(error)
        return [{"failure": reason, "call": True} for _ in judged]


def _answer(value: Any) -> Answer:
    """Returns the answer for a value: a finite number, None (it does not apply), or a failure."""
    if value is None:
        return {"none": True}
    # A tensor or array with one element is a number too.
    if not isinstance(value, numbers.Number) and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return {"value": float(value)}
    return {"failure": f"returned {value!r:.{LONGEST_REASON}}; expected a finite number"}


def _place(error: BaseException) -> str:
    """Returns the deepest line of the function's own file that the error went through; empty if there is none."""
    ours = {__file__, reward_forms.__file__}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    frames = [frame for frame in frames if Path(frame.filename).parent.name != "asyncio"]
    in_file = [frame for frame in frames if frame.filename == frames[0].filename]
    if not in_file:
        return ""
    return f" ({Path(in_file[-1].filename).name} line {in_file[-1].lineno})"


if __name__ == "__main__":
    main()
