"""An environment in which each turn of the model is a word that a Bash session of the sandbox writes to a file."""

import asyncio

from dist_lm.environments.protocol import Observation, Step, Verdict
from dist_lm.sandbox.session import SessionPool

TURNS = 4
POOL = SessionPool(workers=1).__enter__()


class BashAgent:
    """Wants letters of the second half of the alphabet. Column of a task: `go`, how slow a turn is."""

    async def reset(self, task):
        self.turn, self.slowness = 0, 1 + task.data["go"] % 3
        self.session = POOL.begin("bash")
        return Observation.user(f"Go {task.data['go']}")

    async def step(self, action):
        self.turn += 1
        word = "".join(letter for letter in action.text if letter.islower())
        # So that processes are killed in the middle of conversations.
        await asyncio.sleep(0.1 * self.slowness)
        output = (await asyncio.wrap_future(self.session.run(f"echo {word} >> said; cat said"))).output
        share = sum(letter > "m" for letter in output) / max(1, len(output))
        if action.cut or self.turn == TURNS:
            return Step(Observation(), True, Verdict.of(share))
        return Step(Observation.user(output), False, turn_reward=share)

    async def close(self):
        self.session.close()
