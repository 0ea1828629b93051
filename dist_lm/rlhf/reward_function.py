"""The process of a user's reward function: `python -m dist_lm.rlhf.reward_function SOCKET PACKAGE.MODULE:NAME`.

The process imports the function, then judges batches: it gets all texts of a batch at once, and answers one by one.
`dist_lm.rlhf.rules.FunctionRule` starts it and reads its answers.
"""

import importlib
import math
import numbers
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_lm.storage.json_process import serve_requests

LONGEST_REASON = 300  # characters of a reason in an answer


def main() -> None:
    """Imports the function and judges batches until the parent ends; an answer goes to the parent after each
    completion.

    The first message says `loaded`, or `refused` with the reason, after which the process ends.
    """
    with serve_requests() as (requests, send):
        module, _, name = sys.argv[2].partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        # The user's module may raise anything when it is imported, SystemExit included.
        except BaseException as error:
            send({"refused": f"{type(error).__name__}: {error}"})
            return

        send({"loaded": name})
        while True:
            for prompt, completion in requests.get()["judged"]:
                send(answer(function, prompt, completion))


def answer(function: Callable[[str, str], Any], prompt: str, completion: str) -> dict[str, Any]:
    """Calls the function and returns `{"value": number}`, or `{"failure": reason}` if it raises, SystemExit included,
    or returns no finite number. The reason is cut to about LONGEST_REASON characters and names the line."""
    try:
        value = function(prompt, completion)
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return {"value": float(value)}
        return {"failure": f"returned {value!r:.{LONGEST_REASON}}; expected a finite number"}
    except (Exception, SystemExit) as error:
        return {"failure": f"{type(error).__name__}: {error}"[:LONGEST_REASON] + _place(error)}


def _place(error: BaseException) -> str:
    """Returns the deepest line of the function's own file that the error went through; empty if there is none."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without `answer`
    in_file = [frame for frame in frames if frame.filename == frames[0].filename]
    if not in_file:
        return ""
    return f" ({Path(in_file[-1].filename).name} line {in_file[-1].lineno})"


if __name__ == "__main__":
    main()
