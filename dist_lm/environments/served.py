"""The process of a user's environment: `python -m dist_lm.environments.served SOCKET CLASS MEMORY BYTES`.

CLASS is FILE:NAME or PACKAGE.MODULE:NAME. The process limits its memory, imports the class, says `loaded`, and then
executes one conversation after another, each with an object of its own. Every answer repeats the number of its request.
`dist_lm.environments.user_process` starts it and reads the answers; it believes none of them.
"""

import asyncio
import importlib
import inspect
import os
import resource
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_lm.chat.messages import Json
from dist_lm.environments.protocol import BadRewardError, EnvironmentFailedError, RefusedTaskError, Task
from dist_lm.environments.values import (
    action_of,
    checked_observation,
    checked_step,
    observation_value,
    step_value,
)
from dist_lm.errors import UserError
from dist_lm.storage.json_process import serve_requests
from dist_lm.storage.python_file import load_python_file

MODULE = "registered_environment"  # name of the loaded module
METHODS = ("reset", "step", "close")


def main() -> None:
    """Limits the memory of the process, imports the class and executes conversations until the parent ends.

    The arguments are those of the command in `sys.argv`: MEMORY is in bytes, and BYTES is the most bytes of an
    observation as JSON. If the class cannot be imported, the process sends `{"refused": reason}` and ends.
    """
    name, memory_bytes, most_bytes = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    with serve_requests() as (requests, send):
        # The parent sets no limits, because a process that is about to be replaced by another one may not fail.
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, hard))
        try:
            environment_class = class_named(name)
        # The user's module may raise anything when it is imported, SystemExit included.
        except BaseException as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            send({"refused": reason})
            return

        send({"loaded": name})
        asyncio.run(_serve(environment_class, requests, send, most_bytes))


def class_named(name: str) -> type:
    """Returns the class FILE:NAME or PACKAGE.MODULE:NAME.

    Raises:
        UserError: there is no such class, or it lacks a method. Errors of its module reach the caller as they are.
    """
    place, _, class_name = name.rpartition(":")
    module = load_python_file(Path(place), MODULE) if place.endswith(".py") else importlib.import_module(place)
    environment_class = getattr(module, class_name, None)
    if not inspect.isclass(environment_class):
        raise UserError(f"there is no class {class_name} in {place}")
    if missing := [method for method in METHODS if not callable(getattr(environment_class, method, None))]:
        raise UserError(f"class {class_name} has no {', '.join(missing)}; an environment has {', '.join(METHODS)}")
    return environment_class


async def _serve(environment_class: type, requests: Any, send: Any, most_bytes: int) -> None:
    """Answers requests; a process that the environment forks ends when it comes back here, and answers nothing."""
    own_pid = os.getpid()
    environment: Any = None
    while True:
        # In a thread, so that tasks of the environment go on meanwhile.
        request = await asyncio.to_thread(requests.get)
        try:
            if "task" in request:
                environment = environment_class()
            answer = await _answer(environment, request, most_bytes)
        except BaseException as error:
            failure = failure_in(error)
            answer = {"failure": [failure.reason, failure.detail]}
        if os.getpid() != own_pid:
            os._exit(0)
        send({"number": request["number"], **answer})


async def _answer(environment: Any, request: Mapping[str, Any], most_bytes: int) -> dict[str, Json]:
    """Calls the method that the request is for and returns the message about what it returned: `{"observation": ...}`,
    `{"step": ...}` or `{"closed": True}`. Methods may be plain functions, too.

    Args:
        most_bytes: most bytes of an observation as JSON.

    Raises:
        EnvironmentFailedError: the value that the method returned is not well formed. What the method raises passes.
    """
    if "task" in request:
        observation = await _awaited(environment.reset(Task(**request["task"])))
        return {"observation": observation_value(checked_observation(observation, most_bytes))}
    if "action" in request:
        action = action_of(request["action"])
        step = await _awaited(environment.step(action))
        return {"step": step_value(checked_step(step, action, most_bytes))}
    await _awaited(environment.close())
    return {"closed": True}


async def _awaited(returned: Any) -> Any:
    return await returned if inspect.isawaitable(returned) else returned


def failure_in(error: BaseException) -> EnvironmentFailedError:
    """Returns the failure that an exception of an environment stands for; for a crash its detail names the line."""
    if isinstance(error, EnvironmentFailedError):
        return error
    if isinstance(error, RefusedTaskError):
        return EnvironmentFailedError("refused", str(error))
    if isinstance(error, BadRewardError):
        return EnvironmentFailedError("bad_reward", str(error))
    if isinstance(error, MemoryError):
        return EnvironmentFailedError("memory", "more memory than allowed")

    place = ""
    if frames := [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]:
        place = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})"
    return EnvironmentFailedError("crashed", f"{type(error).__name__}: {str(error)[:300]}{place}")


if __name__ == "__main__":
    main()
