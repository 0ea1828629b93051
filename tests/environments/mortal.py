"""An environment whose process dies: how often, and in which turn, says its task."""

import os
import signal
import time
from pathlib import Path

from dist_lm.environments.protocol import Observation, Step, Verdict


class Mortal:
    """Adds up the numbers that the model writes, for three turns.

    Columns of a task: `log`, a file with one line for each call; `deaths`, turn (0: reset) -> how often it dies there;
    `shows_pid`, whether observations tell the process apart; `hangs`, whether the second `reset` does.
    """

    async def reset(self, task):
        self.data, self.turn, self.total = task.data, 0, 0
        self._note("reset")
        if self.data.get("hangs") and self._count("reset") > 1:
            time.sleep(600)
        return Observation.user(f"Numbers, please{self._sign()}.")

    async def step(self, action):
        self.turn += 1
        self.total += int(action.text)
        self._note(f"{self.turn}: {action.text}")
        if action.cut or self.turn == 3:
            return Step(Observation(), True, Verdict.of(float(self.total)))
        return Step(Observation.user(f"{self.total}{self._sign()}"), False, turn_reward=float(self.total))

    async def close(self):
        pass

    def _sign(self) -> str:
        return f" ({os.getpid()})" if self.data.get("shows_pid") else ""

    def _note(self, line: str) -> None:
        with Path(self.data["log"]).open("a") as log:
            log.write(f"{line}\n")
        if self._count(line) <= self.data["deaths"].get(str(self.turn), 0):
            os.kill(os.getpid(), signal.SIGKILL)

    def _count(self, line: str) -> int:
        return Path(self.data["log"]).read_text().splitlines().count(line)
