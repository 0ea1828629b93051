"""What a host takes environments from: the project's own ones, a user's class, or a program."""

from typing import Any, Protocol

from dist_lm.environments.protocol import Environment


class Environments(Protocol):
    """Source of the environments of conversations. Its defaults are those of sources without sandboxes of ours."""

    @property
    def sandboxes_again(self) -> int:
        """Conversations whose sandbox ended and has executed their code again."""
        return 0

    def seconds_again(self, environment: Any) -> float:
        """Returns how long the sandbox of a conversation has executed its code again."""
        return 0.0

    async def open(self) -> None: ...

    async def take(self) -> Environment: ...

    async def give_back(self, environment: Any, is_usable: bool) -> None: ...

    async def close(self) -> None: ...
