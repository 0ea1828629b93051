"""A guessing game in process: an environment of several turns that takes no time, and failures on demand."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from dist_lm.chat.messages import Message, Tool
from dist_lm.chat.template import stop_tokens
from dist_lm.config.model import ModelConfig
from dist_lm.environments.protocol import Action, Limits, Observation, Step, Task, Verdict
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.grammar import Grammars
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.config import RewardPartConfig, RlhfConfig
from dist_lm.rlhf.conversation_loop import ConversationLoop
from dist_lm.rlhf.conversing import ConstraintOf, EpisodeHost
from dist_lm.rlhf.environment_rollouts import EnvironmentJudge, EnvironmentSupply, VersionedSource
from dist_lm.rlhf.rollouts import EngineRollouts, ShuffledPrompts
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.rlhf.toy import MODEL, Toy, supply_in, toy, with_supply

TASKS = [Task.of(str(number), {"letter": "abcdefgh"[number % 8]}) for number in range(40)]
LIMITS = Limits(turns=3, tokens=160)
GUESS = Tool("guess", "Guesses.", {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}})


class KilledError(Exception):
    """Stands for the end of the process: it passes through everything."""


@dataclass
class Game:
    """One conversation: the share of bytes of the answers that are the task's letter or come after it."""

    task: Task
    host: "GameHost"
    texts: list[str] = field(default_factory=list)

    async def reset(self) -> Step:
        self.host.resets.append(self.task.key)
        await asyncio.sleep(self.host.delay_s(self.task))
        if failure := self.host.failure_of(self.task):
            return Step(Observation(), True, Verdict.failed(failure, "on demand"))  # type: ignore[arg-type]
        request = Message("user", f"Guess {self.task.data['letter']}")
        return Step(Observation((request,), self.host.tools), False)

    async def step(self, action: Action) -> Step:
        self.host.steps += 1
        if self.host.steps == self.host.dies_at:
            raise KilledError
        await asyncio.sleep(self.host.delay_s(self.task))
        self.texts.append(action.text)
        hits = sum(character >= self.task.data["letter"] for character in action.text)
        reward = hits / (1 + len(action.text))
        if action.cut or len(self.texts) == 3:
            return Step(Observation(), True, Verdict.of(reward), turn_reward=0.25)
        if action.calls:
            answer = Message("tool", results=tuple({"error": "no"} for _ in action.calls))
        else:
            answer = Message("user", f"Again: {len(action.text)}, {reward:.3f}")
        return Step(Observation((answer,)), False, turn_reward=reward)

    async def close(self) -> None:
        self.host.closed += 1


@dataclass
class GameHost:
    """An `EpisodeHost` of games in this process."""

    failure_of: Callable[[Task], str] = lambda task: ""
    delay_s: Callable[[Task], float] = lambda task: 0.0
    tools: tuple[Tool, ...] = ()
    dies_at: int = 0  # number of the step that kills the run
    resets: list[str] = field(default_factory=list)
    steps: int = 0
    closed: int = 0

    def episode(self, task: Task) -> Game:
        return Game(task, self)


def model_of(tokenizer: Tokenizer) -> ModelConfig:
    return replace(MODEL, vocab_size=tokenizer.vocab_size, max_seq_len=192)


def config_of(algorithm: str = "grpo", **others: Any) -> RlhfConfig:
    rewards = {"environment": RewardPartConfig(kind="environment")}
    shared = {"prompts": 3, "samples": 3, "max_new_tokens": 12, "epochs": 2, "lr": 1e-3, "kl_coefficient": 0.05}
    return RlhfConfig(algorithm=algorithm, rewards=rewards, **(shared | others))


def game(
    config: RlhfConfig,
    iterations: int,
    tokenizer: Tokenizer,
    stack: Any,
    *,
    host: GameHost | None = None,
    open_host: Callable[[], AbstractAsyncContextManager[EpisodeHost]] | None = None,
    folder: Path | None = None,
    constraint_of: ConstraintOf | None = None,
    limits: Limits = LIMITS,
    model: ModelConfig | None = None,
    at_once: int = 16,
    **options: Any,
) -> Toy:
    """Returns a toy that learns the game. `stack` closes its event loop.

    Args:
        open_host: opens other environments than the game; their tasks are `TASKS`.
        at_once: conversations, and sequences of the engine.
    """
    model, host = model or model_of(tokenizer), host or GameHost()

    @asynccontextmanager
    async def open_game():
        yield host

    def source() -> EngineRollouts:
        weights = {name: value for name, value in Transformer(model).state_dict().items()}
        engine_options = EngineOptions(
            cache_tokens=4 * at_once * 64, page_tokens=64, max_sequences=at_once, prefix_cache=True
        )
        grammars = Grammars(lambda: tokenizer) if constraint_of else None
        return EngineRollouts(
            Engine(model, weights, eot_id=tokenizer.eot_id, options=engine_options, grammars=grammars)
        )

    run = toy(config, iterations, model=model, source=source, **options)
    if run.learner.controller:
        supply = EnvironmentSupply(
            VersionedSource(supply_in(run).source),
            ShuffledPrompts(TASKS, 0),
            EnvironmentJudge("game", "environment", config.max_failed_fraction),
            tokenizer,
            stack.enter_context(ConversationLoop(open_host or open_game)),
            limits,
            model.max_seq_len,
            at_once=at_once,
            constraint_of=constraint_of,
            folder=folder,
        )
        with_supply(run, supply)
    return run


def fail_after_an_answer(run: Toy) -> None:
    """Lets the engines of a game raise RuntimeError("no engine") after their first answer."""
    source: Any = supply_in(run).source

    def results(requests: Any) -> Iterator[Any]:
        yield next(r for r in source._source.results(requests))
        raise RuntimeError("no engine")

    source.results = results


def end_turns_early(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a model without training end its turns: one token in six does."""
    ends = (*stop_tokens(tokenizer), *range(5, tokenizer.vocab_size, 6))
    for module in ("environment_rollouts", "transcript"):
        monkeypatch.setattr(f"dist_lm.rlhf.{module}.stop_tokens", lambda tokenizer: ends)
