"""Asynchronous sampling with the controller apart from the first rank: deaths, and the same numbers by either one."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dist_lm.generation.decoder import WeightStream
from dist_lm.parallel.node_memory import HAS_SHARED_MEMORY
from dist_lm.rlhf.controller import Controller
from dist_lm.rlhf.controller_process import ControllerProcess
from dist_lm.rlhf.episodes import read_episodes
from dist_lm.rlhf.learner import IterationReport
from tests.rlhf.guessing import GameHost
from tests.rlhf.test_asynchronous import ITERATIONS, assignments_in, asynchronous, late
from tests.rlhf.test_controller_process import ServingThread, dying_at, figures
from tests.rlhf.test_environment_rollouts import deadline, short_turns, tokenizer
from tests.rlhf.toy import Saved, Toy, run_from, saving, supply_in

__all__ = ["short_turns", "tokenizer"]  # fixtures
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(not HAS_SHARED_MEMORY, reason="needs Linux"),
]


def run_apart(
    tokenizer: Any,
    folder: Path,
    host: GameHost,
    before_take: Callable[[int], None] = lambda iteration: None,
    start: Saved | None = None,
    reported: Callable[[IterationReport], None] = lambda report: None,
) -> tuple[Toy, dict[int, Saved]]:
    """Trains on the game; a thread serves the controller."""

    @contextmanager
    def opened(weights: WeightStream, alive: Callable[[], None]) -> Iterator[Controller]:
        with ExitStack() as stack:
            supply = supply_in(asynchronous(tokenizer, stack, folder, host))
            supply.source.load_weights(weights, -1)
            supply = replace(supply, alive=replace(supply.alive, sign=alive))

            class Breaking(Controller):
                def take(self, iteration: int):
                    before_take(iteration)
                    return super().take(iteration)

            controller = Breaking(supply, config, 0, ITERATIONS)
            stack.callback(controller.end)
            yield controller

    with ExitStack() as stack:
        trained = asynchronous(tokenizer, stack, None)
        config = trained.learner.config
        report = trained.learner.report
        trained.learner = replace(trained.learner, report=lambda done: (report(done), reported(done)))
        saved = saving(trained)
        weights = trained.learner.models.policy.model.state_dict().items()
        start_child = partial(ServingThread.serving, opened)
        with deadline(120), ControllerProcess(start_child, weights, (), staleness=config.drawing_staleness) as apart:
            trained.learner = replace(trained.learner, controller=apart)
            run_from(trained, start) if start else trained.run()
    return trained, saved


def copied(folder: Path, name: str) -> Path:
    copy = folder / name
    copy.mkdir()
    for path in folder.glob("*.jsonl"):
        shutil.copy(path, copy)
    return copy


def test_a_schedule_gives_the_same_numbers_by_either_controller_wherever_it_died(tokenizer, tmp_path):
    """Finds a controller that stops between two calls, a restart that forgets what was taken or holds a conversation
    twice, and bits that depend on where the controller is."""
    host = GameHost(delay_s=late)

    def sampling_goes_on(report: IterationReport) -> None:
        if report.iteration == 1:
            n_steps, until = host.steps, time.monotonic() + 30
            while host.steps == n_steps:
                assert time.monotonic() < until, "conversations wait for the learner"
                time.sleep(0.01)

    run, _ = run_apart(tokenizer, tmp_path, host, dying_at(0, 2, 3), reported=sampling_goes_on)
    assert run.reports[-1].metrics["perf/controller_restarts"] == 3
    assert host.closed == len(host.resets)
    taken = [position for assignment in assignments_in(tmp_path) for position in assignment.groups]
    assert len(taken) == len({*taken}) == 3 * ITERATIONS
    recorded = [e for path in tmp_path.glob("tasks_*.jsonl") for e in read_episodes(path)]
    assert len({(e.position, e.sample) for e in recorded}) == len(recorded)
    assert max(run.metric("rollout/token_staleness_max")) >= 1

    with ExitStack() as stack:
        again = asynchronous(tokenizer, stack, copied(tmp_path, "first_rank"), host := GameHost())
        again.run()
    assert figures(again) == figures(run)
    assert not host.resets


def test_a_controller_apart_goes_on_from_a_record_of_the_first_rank(tokenizer, tmp_path):
    """Finds a process that samples anew what a run has recorded before it changed `rlhf.controller`."""
    with ExitStack() as stack:
        run = asynchronous(tokenizer, stack, tmp_path, GameHost(delay_s=late))
        saved = saving(run)
        with deadline(120):
            run.run()

    host = GameHost()
    again, saved_again = run_apart(tokenizer, copied(tmp_path, "apart"), host, dying_at(3, 4), start=saved[2])
    assert figures(again) == figures(run)[2:]
    assert saved_again[ITERATIONS].values == saved[ITERATIONS].values
    assert not host.resets
