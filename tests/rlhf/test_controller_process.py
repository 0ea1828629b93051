"""The controller apart from the first rank: same numbers, deaths, errors. A thread serves in place of a process."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from dist_lm.config.pool import RolloutPoolConfig
from dist_lm.errors import ConfigError
from dist_lm.generation.decoder import WeightStream
from dist_lm.generation.request import Request, SamplingParams
from dist_lm.parallel.node_memory import HAS_SHARED_MEMORY
from dist_lm.rlhf import controller_process
from dist_lm.rlhf.config import RlhfConfig
from dist_lm.rlhf.controller import Controller, ControllerState, Records, RolloutController, on_every_rank
from dist_lm.rlhf.controller_process import ControllerLostError, ControllerProcess, OpenController, serve_controller
from dist_lm.rlhf.learner import Learner
from dist_lm.rlhf.models import sent_weights
from dist_lm.rlhf.rollouts import EngineRollouts, ScoredRollouts
from dist_lm.rlhf.rules import RewardError
from dist_lm.rlhf.schedule import Drawn, draws_rollouts
from dist_lm.stages.rlhf.config import RlhfRunGroup
from tests.rlhf.toy import LENGTH, TOKENS, WORLD, Saved, Toy, engine_of, rollouts_with, run_from, saving, supply_of, toy

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(not HAS_SHARED_MEMORY, reason="needs Linux"),
]

ITERATIONS = 3
CONFIG = replace(LENGTH, prompts=4, max_new_tokens=6, minibatches=1)


class ServingThread:
    """Stands for a child process."""

    pid = 1
    returncode = -9

    def __init__(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    @classmethod
    def serving(cls, open_controller: OpenController) -> tuple[Any, socket.socket]:
        """Starts a thread that serves a controller; returns it with the parent's end of the socket."""
        connection, child_connection = socket.socketpair()

        def serve() -> None:
            # A death of the child: it closes its end without a reply.
            with suppress(SystemExit):
                serve_controller(child_connection, open_controller)

        return cls(serve), connection

    def kill(self) -> None:
        pass

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout or 30)
        assert not self._thread.is_alive()
        return self.returncode


class Served:
    """Starts controllers, whose calls of `take` first call `before_take`."""

    def __init__(
        self, before_take: Callable[[int], None], config: RlhfConfig = CONFIG, iterations: int = ITERATIONS
    ) -> None:
        self.before_take, self.config, self.iterations = before_take, config, iterations
        self.starts = 0
        self.deaths_at_start = 0
        self.drawn: Drawn | None = None  # in place of rollouts of an engine

    @contextmanager
    def opened(self, weights: WeightStream, alive: Callable[[], None]) -> Iterator[Controller]:
        if self.starts <= self.deaths_at_start:
            raise SystemExit
        source = EngineRollouts(engine_of())
        source.load_weights(weights, -1)
        before_take, drawn, config = self.before_take, self.drawn, self.config

        class Breaking(Controller):
            def take(self, iteration: int):
                alive()
                before_take(iteration)
                return drawn or super().take(iteration)

        supply = supply_of(config, source, 0, ())
        controller = Breaking(supply, config, 0, self.iterations, answer_tasks=partial(answered, source))
        try:
            yield controller
        finally:
            controller.end()

    def start(self) -> Any:
        self.starts += 1
        return ServingThread.serving(self.opened)


def run_of(
    before_take: Callable[[int], None],
    signs: list[int] | None = None,
    config: RlhfConfig = CONFIG,
    iterations: int = ITERATIONS,
    start: Saved | None = None,
    saves: bool = False,
    **options: Any,
) -> tuple[Toy, Served, dict[int, Saved]]:
    """Trains the toy with a controller that a thread serves, from its beginning or from where another was saved."""
    served, trained = Served(before_take, config, iterations), toy(config, iterations, **options)
    if isinstance(asked := options.get("tasks"), Evaluating):
        asked.learner = trained.learner
    saved = saving(trained) if saves else {}
    weights = trained.learner.models.policy.model.state_dict().items()
    alive = lambda: signs.append(1) if signs is not None else None  # noqa: E731
    with ControllerProcess(served.start, weights, (RewardError,), alive, config.drawing_staleness) as controller:
        trained.learner = replace(trained.learner, controller=controller)
        run_from(trained, start) if start else trained.run()
    return trained, served, saved


def answered(source: EngineRollouts, names: Sequence[str]) -> Records:
    """Returns answers to a question of each task, whose log-probabilities tell the weights."""
    params = SamplingParams(max_new_tokens=4)
    answers = source.generate([Request(name, [1, 2, 3], params, 0) for name in names])
    return {answer.request: [{"tokens": list(answer.tokens), "logprobs": list(answer.logprobs)}] for answer in answers}


@dataclass
class Evaluating:
    """Evaluates a task after each iteration, as `TasksOfIterations` does."""

    learner: Learner | None = None
    open: dict[int, Callable[[], Records]] = field(default_factory=dict)
    records: dict[int, Records] = field(default_factory=dict)

    def reached(self, iteration: int, controller: RolloutController | None) -> None:
        learner = self.learner
        assert learner is not None
        assert controller is not None
        has_weights = draws_rollouts(iteration, learner.config.max_staleness, learner.iterations)
        # The receiver keeps what it gets, and the parameters of the policy go on changing.
        weights = None if has_weights else sent_weights(learner.models.policy.model, learner.parallel, learner.world)
        self.open[iteration] = controller.evaluate(["task"], iteration, weights)
        if not learner.config.max_staleness:
            self.before_checkpoint()

    def before_checkpoint(self) -> None:
        self.records |= {iteration: records() for iteration, records in self.open.items()}
        self.open.clear()


def figures(trained: Toy) -> list[dict[str, float]]:
    return [
        {
            name: value
            for name, value in report.metrics.items()
            if not name.startswith(("timing/", "perf/")) and not name.endswith(("_s", "_per_s"))
        }
        for report in trained.reports
    ]


def test_numbers_are_those_of_the_first_rank_also_after_deaths():
    """Finds weights, positions or rollouts that change on their way, and a restart that draws other prompts."""
    expected = toy(CONFIG, ITERATIONS)
    expected.run()
    deaths = [0, 2]

    def dies(iteration: int) -> None:
        if deaths and deaths[0] == iteration:
            deaths.pop(0)
            raise SystemExit

    signs: list[int] = []
    trained, served, _ = run_of(dies, signs)
    assert served.starts == 3
    assert signs
    assert trained.reports[-1].metrics["perf/controller_restarts"] == 2
    assert figures(trained) == figures(expected)
    weights, expected_weights = (run.learner.models.policy.model.state_dict() for run in (trained, expected))
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


def dying_at(*iterations: int) -> Callable[[int], None]:
    """Returns what lets a controller die before it gives the rollouts of each of these iterations, once."""
    deaths = [*iterations]

    def dies(iteration: int) -> None:
        if iteration in deaths:
            deaths.remove(iteration)
            raise SystemExit

    return dies


def ahead(staleness: int, rounds: int = 0) -> RlhfConfig:
    """Returns settings of a run whose rollouts are drawn ahead; `rounds`: as of rlhf.sampling_rounds."""
    return RlhfConfig(
        algorithm="dapo" if rounds else "grpo",
        prompts=4,
        samples=2,
        sampling_rounds=rounds or None,
        max_new_tokens=6,
        max_staleness=staleness,
        lr=1e-3,
        kl_coefficient=0.0,
        # Groups whose lengths are all the same are replaced; of the other reward nearly all groups have a signal.
        rewards=LENGTH.rewards if rounds else TOKENS.rewards,
    )


@pytest.mark.heavy
@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("rounds", [0, 3])
def test_rollouts_drawn_ahead_are_those_of_the_first_rank_also_after_deaths(staleness, rounds):
    """Finds a restart whose rollouts come from newer weights than those that died with the child, at other positions,
    and a checkpoint that lacks them."""
    iterations = 6
    config = ahead(staleness, rounds)
    expected = toy(config, iterations)
    saved = saving(expected)
    expected.run()

    trained, served, saved_by_process = run_of(dying_at(0, 2, 3, 5), config=config, iterations=iterations, saves=True)
    assert served.starts == 5
    assert figures(trained) == figures(expected)
    assert {n: (s.values, s.arrays) for n, s in saved_by_process.items()} == {
        n: (s.values, s.arrays) for n, s in saved.items()
    }

    # Rollouts of a checkpoint are not drawn again, whoever dies behind it.
    resumed, served, _ = run_of(dying_at(2, 3, 5), config=config, iterations=iterations, start=saved[2])
    assert served.starts == 4
    assert figures(resumed) == figures(expected)[2:]


@pytest.mark.heavy
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_tasks_are_answered_by_the_weights_of_their_iteration_also_after_deaths(staleness):
    """Finds answers of other weights, evaluations that a death loses, and rollouts that an evaluation changes."""
    config, iterations = ahead(staleness), 6
    asked = Evaluating()
    expected = toy(config, iterations, tasks=asked)
    asked.learner = expected.learner
    assert isinstance(expected.learner.controller, Controller)
    source: Any = expected.learner.controller.supply.source
    with_answers = replace(expected.learner.controller, answer_tasks=partial(answered, source))
    expected.learner = replace(expected.learner, controller=with_answers)
    expected.run()
    assert len({str(records) for records in asked.records.values()}) == iterations

    asked_again = Evaluating()
    trained, served, _ = run_of(dying_at(1, 2, 4, 5), config=config, iterations=iterations, tasks=asked_again)
    assert served.starts == 5
    assert asked_again.records == asked.records
    assert figures(trained) == figures(expected)


def test_a_controller_that_dies_each_time_ends_the_run():
    """Finds a restart loop without an end."""

    def dies(iteration: int) -> None:
        raise SystemExit

    with pytest.raises(ControllerLostError, match="4 times in a row"):
        run_of(dies)


def test_a_controller_that_dies_while_it_starts_is_started_again():
    """Finds a second start that is asked of one child twice."""
    served = Served(lambda iteration: None)
    served.deaths_at_start = 2
    weights = toy(CONFIG, ITERATIONS).learner.models.policy.model.state_dict()
    with ControllerProcess(served.start, weights.items(), ()) as controller:
        controller.begin(ControllerState(0, 0, {}), weights.items())
        drawn = controller.take(0).read(Drawn)
    assert served.starts == 3
    assert drawn.scored.prompts == CONFIG.prompts


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RewardError("no rollout has a score"), RewardError("no rollout has a score")),
        (ZeroDivisionError("by zero"), RuntimeError("ZeroDivisionError: by zero\nin the controller's process")),
        (EOFError("of a file"), RuntimeError("EOFError: of a file")),
    ],
)
def test_an_error_ends_the_run_with_its_message(error, raised):
    """Finds an error that counts as a death, so that the controller starts again, or that loses its class."""

    def fails(iteration: int) -> None:
        raise error

    with pytest.raises(type(raised), match=str(raised)):
        run_of(fails)


def test_signs_of_life_that_nobody_reads_hold_up_no_engine(monkeypatch):
    """Finds engines that stop while the ranks learn, because the socket is full."""
    monkeypatch.setattr(controller_process, "SIGN_EVERY_S", 0.0)
    connection, child_connection = socket.socketpair()
    with connection, child_connection:
        sign = controller_process._signs_of_life(child_connection)
        for _ in range(10_000):
            sign()
        assert connection.recv(1) == controller_process.ALIVE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controller": "elsewhere"}, "rlhf.controller=elsewhere: expected rank or process"),
        ({"controller": "process", "pool": RolloutPoolConfig(actors=0)}, "rlhf.pool.actors=0: .*rlhf.controller=rank"),
        ({"controller": "process", "pool": RolloutPoolConfig(push="direct")}, "rlhf.pool.push=direct: expected auto"),
    ],
)
def test_what_the_process_does_not_do_is_refused(settings, message):
    """Finds a combination that is met only by a rank."""
    rewards = LENGTH.rewards
    with pytest.raises(ConfigError, match=message):
        RlhfRunGroup(rewards=rewards, **settings)


@pytest.mark.bars
def test_a_large_iteration_costs_the_first_rank_next_to_nothing(capsys):
    """Finds rollouts that the first rank copies or unpacks; prints its CPU seconds.

    256 prompts, 16 completions each, of 1,024 tokens.
    """
    rollouts = rollouts_with([128] * 4096, [1024] * 4096)
    served = Served(lambda iteration: None)
    drawn = Drawn(ScoredRollouts(rollouts, {"a": np.zeros(len(rollouts))}), 0.0, 0.0)
    served.drawn = drawn
    weights = toy(CONFIG, ITERATIONS).learner.models.policy.model.state_dict()
    with ControllerProcess(served.start, weights.items(), ()) as controller:
        controller.begin(ControllerState(0, 0, {}), weights.items())
        # The thread that serves is left out.
        began = time.thread_time()
        received = on_every_rank(controller.take(0), WORLD).scored.rollouts
        spent = time.thread_time() - began
    with capsys.disabled():
        print(f"\nCPU seconds of the first rank: {spent:.3f}")
    assert np.array_equal(received.tokens_N, rollouts.tokens_N)
    assert np.array_equal(received.logprobs_M, rollouts.logprobs_M)
