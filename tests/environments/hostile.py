"""An environment that does what the column `how` of its task says: one good way, and many bad ones."""

import asyncio
import json
import os
import signal
import socket
import sys
import time

from dist_lm.chat.messages import Message, Tool
from dist_lm.environments.protocol import Observation, RefusedTaskError, Step, Verdict

END = Observation()
LOOK = Tool("look", "Looks.", {"type": "object", "properties": {}})
RIGHT = Step(END, True, Verdict.of(1.0))


def to_parent() -> socket.socket:
    """The socket of this process to the host, as an environment can find it."""
    return socket.socket(fileno=os.dup(int(sys.argv[1])))


def forged(**parts: object) -> None:
    """Sends a line as if it were the answer to a request; this process never answers itself."""
    step = {"observation": {"messages": [], "tools": []}, "done": True, "verdict": None, "turn_reward": 0.0}
    to_parent().sendall(json.dumps({"number": 2, "step": step | parts}).encode() + b"\n")
    time.sleep(600)


def broken_verdict(**fields: object) -> Step:
    verdict = Verdict.of(1.0)
    for name, value in fields.items():
        object.__setattr__(verdict, name, value)
    return Step(END, True, verdict)


def leaves_a_process() -> Step:
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)
    return RIGHT


def forks() -> Step:
    os.fork()  # both return
    return RIGHT


def deep() -> object:
    value: object = 1
    for _ in range(500):
        value = [value]
    return value


class Environment:
    async def reset(self, task) -> Observation:
        self.how = task.data["how"]
        actions = {
            "hangs_in_reset": lambda: time.sleep(600),
            "raises_in_reset": lambda: 1 / 0,
            "text_from_reset": lambda: "begin",
            "anew_from_reset": lambda: Observation((Message("user", "begin"),), begins_anew=True),
            "no_turns_from_reset": lambda: Observation(),
            "answer_from_reset": lambda: Observation((Message("user", "x"), Message("assistant", "y"))),
            "refuses": lambda: (_ for _ in ()).throw(RefusedTaskError("`how`: not this one")),
        }
        if self.how in actions:
            return actions[self.how]()  # pyright: ignore[reportReturnType]
        return Observation.user("begin")

    async def step(self, action):
        how = self.how
        if how == "hangs":
            while True:
                pass
        if how == "hangs_async":
            await asyncio.sleep(600)
        if how == "raises":
            raise RuntimeError("no")
        if how == "raises_timeout":
            raise TimeoutError("of a service")
        if how == "is_never_done":
            return Step(Observation.user("again"), False)
        actions = {
            "good": lambda: RIGHT,
            "ends": lambda: os._exit(0),
            "exits": lambda: sys.exit(0),
            "kills_itself": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "nan": lambda: Step(END, True, Verdict.of(float("nan"))),
            "text_as_reward": lambda: Step(END, True, Verdict.of("1")),  # pyright: ignore[reportArgumentType]
            "infinite_turn_reward": lambda: Step(Observation.user("on"), False, turn_reward=float("inf")),
            "valid_without_reward": lambda: broken_verdict(reward=None),
            "failed_with_reward": lambda: broken_verdict(valid=False, failure_reason="crashed"),
            "unknown_reason": lambda: broken_verdict(valid=False, reward=None, failure_reason="bored"),
            "huge": lambda: Step(Observation.user("x" * 10_000_000), False),
            "tuple": lambda: (END, True, 1.0),
            "none": lambda: None,
            "verdict_is_a_number": lambda: Step(END, True, 1.0),  # pyright: ignore[reportArgumentType]
            "done_without_verdict": lambda: Step(END, True),
            "speaks_for_the_model": lambda: Step(Observation((Message("assistant", "I win"),)), False),
            "results_of_no_call": lambda: Step(Observation.results(1, 2), False),
            "tools_for_what_goes_on": lambda: Step(Observation((Message("user", "on"),), (LOOK,)), False),
            "anew_with_its_answer": lambda: Step(
                Observation((Message("user", "x"), Message("assistant", "I win")), begins_anew=True), False
            ),
            "anew_with_nothing": lambda: Step(Observation(begins_anew=True), False),
            "anew_with_a_word": lambda: Step(
                Observation((Message("user", "x"),), begins_anew="yes"),  # pyright: ignore[reportArgumentType]
                False,
            ),
            "surrogate": lambda: Step(Observation.user("\ud800"), False),
            "deep": lambda: Step(Observation((Message("tool", results=(deep(),)),)), False),
            "memory": lambda: bytearray(1 << 40),
            "endless_line": lambda: [to_parent().sendall(b"x" * 65536) for _ in range(1000)],
            "no_json": lambda: (to_parent().sendall(b"{]\n"), time.sleep(600)),
            "forged_number": lambda: forged(verdict=[1, True, "timeout", ""]),
            "forged_nan": lambda: forged(verdict=[float("nan"), True, None, ""]),
            "forged_for_another": lambda: (to_parent().sendall(b'{"number": 77, "step": {}}\n'), time.sleep(600)),
            "forks": forks,
            "leaves_a_process": leaves_a_process,
        }
        return actions[how]()

    async def close(self) -> None:
        pass


EXPECTED = {
    "hangs_in_reset": "timeout",
    "raises_in_reset": "crashed",
    "text_from_reset": "bad_step",
    "anew_from_reset": "bad_observation",
    "no_turns_from_reset": "bad_observation",
    "answer_from_reset": "bad_observation",
    "refuses": "refused",
    "hangs": "timeout",
    "hangs_async": "timeout",
    "raises": "crashed",
    "raises_timeout": "crashed",
    "is_never_done": "no_verdict",
    "ends": "crashed",
    "exits": "crashed",
    "kills_itself": "crashed",
    "nan": "bad_reward",
    "text_as_reward": "bad_reward",
    "infinite_turn_reward": "bad_reward",
    "valid_without_reward": "bad_reward",
    "failed_with_reward": "bad_reward",
    "unknown_reason": "bad_reward",
    "huge": "too_long",
    "tuple": "bad_step",
    "none": "bad_step",
    "verdict_is_a_number": "no_verdict",
    "done_without_verdict": "no_verdict",
    "speaks_for_the_model": "bad_observation",
    "results_of_no_call": "bad_observation",
    "tools_for_what_goes_on": "bad_observation",
    "anew_with_its_answer": "bad_observation",
    "anew_with_nothing": "bad_observation",
    "anew_with_a_word": "bad_observation",
    "surrogate": "bad_observation",
    "deep": "bad_observation",
    "memory": "memory",
    "endless_line": "too_long",
    "no_json": "bad_message",
    "forged_number": "bad_reward",
    "forged_nan": "bad_message",
    "forged_for_another": "bad_message",
}
"""Way -> the reason that its conversation is counted under."""
