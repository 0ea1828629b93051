"""How long conversations wait for their environment, and for the model: which of the two an iteration waits for."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dist_lm.environments.protocol import Action, Step, Task
from dist_lm.generation.request import Answer, Request
from dist_lm.rlhf.conversing import EpisodeHost, HostedEpisode
from dist_lm.rlhf.request_feed import Ask


@dataclass
class WaitingTimes:
    """Adds up the waiting times of conversations. Any thread may call any method."""

    environment_s: float = 0.0
    model_s: float = 0.0
    conversations: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def host(self, host: EpisodeHost) -> EpisodeHost:
        """Returns a host whose answers are timed."""
        return _TimedHost(host, self)

    def ask(self, ask: Ask) -> Ask:
        """Returns `ask` with its answers timed, the time in the queue of the engines included."""

        async def timed(request: Request) -> Answer:
            with self.adding("model_s"):
                return await ask(request)

        return timed

    def take(self) -> dict[str, float]:
        """Returns the mean seconds of a conversation since the last call, as metrics; empty if none was held."""
        with self._lock:
            environment_s, model_s, conversations = self.environment_s, self.model_s, self.conversations
            self.environment_s, self.model_s, self.conversations = 0.0, 0.0, 0
        if not conversations:
            return {}
        return {"timing/environment_s": environment_s / conversations, "timing/model_s": model_s / conversations}

    @contextmanager
    def adding(self, name: str) -> Iterator[None]:
        """Adds the seconds until the end of the block to one of the two."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                setattr(self, name, getattr(self, name) + time.perf_counter() - started)


@dataclass(frozen=True)
class _TimedHost:
    host: EpisodeHost
    times: WaitingTimes

    def episode(self, task: Task) -> HostedEpisode:
        with self.times._lock:
            self.times.conversations += 1
        return _TimedEpisode(self.host.episode(task), self.times)


@dataclass(frozen=True)
class _TimedEpisode:
    hosted: HostedEpisode
    times: WaitingTimes

    async def reset(self) -> Step:
        with self.times.adding("environment_s"):
            return await self.hosted.reset()

    async def step(self, action: Action) -> Step:
        with self.times.adding("environment_s"):
            return await self.hosted.step(action)

    async def close(self) -> None:
        await self.hosted.close()
