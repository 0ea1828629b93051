"""The project's own environments, by name, and the sandboxes that they share."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from dist_lm.environments.code_repair import CodeRepair
from dist_lm.environments.protocol import Environment, Limits
from dist_lm.environments.sandboxes import SharedSandboxes
from dist_lm.environments.sessions import BashSession, PythonSession, SandboxSession
from dist_lm.environments.source import Environments
from dist_lm.environments.sql import HiddenDatabase
from dist_lm.environments.tools import GeneratedTools
from dist_lm.storage.process import cores

OWN: Mapping[str, Callable[[SharedSandboxes, Limits], Environment]] = {
    "bash": BashSession,
    "code_repair": CodeRepair,
    "python": PythonSession,
    "sql": HiddenDatabase,
    "tools": GeneratedTools,
}
STEPS_A_CORE = 4  # steps that run at once: many wait for a program that sleeps


def own_names() -> list[str]:
    """Returns the names of the project's own environments."""
    return [*OWN]


class OwnEnvironments(Environments):
    """Makes the environments of one name. They run in this process; the code of the model runs in sandboxes."""

    def __init__(self, name: str, limits: Limits, workers: int, trust_me: bool) -> None:
        self._make, self._limits = OWN[name], limits
        # Generated tools are code of the project, and the model only calls them.
        self._needs_sandbox = name != "tools"
        workers = workers or STEPS_A_CORE * cores()
        self._sandboxes = SharedSandboxes(workers, trust_me)
        self._steps = asyncio.Semaphore(workers)

    def slot(self) -> AbstractAsyncContextManager[Any]:
        """Returns the block in which a step runs. `workers` blocks run at once; the time that a step waits for its
        block is not its own."""
        return self._steps

    @property
    def sandboxes_again(self) -> int:
        return self._sandboxes.sessions_again

    def seconds_again(self, environment: Environment | None) -> float:
        return environment.seconds_again if isinstance(environment, SandboxSession) else 0.0

    async def open(self) -> None:
        """Raises SandboxError if no sandbox can be made here."""
        if self._needs_sandbox:
            await asyncio.to_thread(self._sandboxes.open)

    async def take(self) -> Environment:
        return self._make(self._sandboxes, self._limits)

    async def give_back(self, environment: Environment, is_usable: bool) -> None:
        await environment.close()

    async def close(self) -> None:
        await asyncio.to_thread(self._sandboxes.close)
