"""Asynchronous sampling in the learner: what is taken, refused and recorded, and what a restart repeats."""

import asyncio
import json
import random
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_lm.environments.protocol import Limits, Verdict
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.rlhf import request_feed
from dist_lm.rlhf.episodes import Episode, Turn, line_of, read_episodes
from dist_lm.rlhf.learner import IterationReport
from dist_lm.rlhf.rollouts import SignsOfLife
from dist_lm.rlhf.schedule_record import (
    SCHEDULE,
    STALE,
    Assignment,
    ScheduleRecord,
    metrics_of,
    read_assignments,
    versions_of_tokens,
)
from dist_lm.rlhf.transcript import Sample
from dist_lm.storage import durable
from tests.rlhf.guessing import GameHost, KilledError, config_of, fail_after_an_answer, game
from tests.rlhf.test_environment_rollouts import deadline, short_turns, stack, tokenizer
from tests.rlhf.toy import MODEL, Toy, run_from, saving, supply_in, with_supply

__all__ = ["short_turns", "stack", "tokenizer"]  # fixtures

ITERATIONS = 5
STALENESS = 2


def episode_of(*turns: tuple[int, tuple[tuple[int, int], ...]], position: int = 0, sample: int = 0) -> Episode:
    """Returns a conversation with turns of so many tokens by these versions."""
    count = sum(new_tokens for new_tokens, _ in turns)
    return Episode(
        position,
        sample,
        "task",
        turns[0][1][0][1],
        Verdict.of(1.0),
        turns=tuple(Turn(new_tokens, True, None, versions=versions) for new_tokens, versions in turns),
        samples=(Sample([*range(count)], [True] * count),),
        logprobs=(-1.0,) * count,
    )


def test_each_token_is_of_the_weights_that_drew_it():
    """Finds a token that is attributed to weights that came after it was drawn, or before."""
    # A version that came after n tokens were read has drawn the tokens after number n.
    episode = episode_of((4, ((0, 1), (1, 2))), (3, ((0, 2), (0, 3))), (2, ((0, 5),)))
    assert [*versions_of_tokens(episode)] == [1, 1, 2, 2, 2, 3, 3, 5, 5]
    metrics = metrics_of(Assignment(7, (0,), {4: STALE, 5: STALE, 6: STALE}, carried=2), [episode])
    assert metrics == {
        "rollout/token_staleness_mean": pytest.approx(6 - 24 / 9),
        "rollout/token_staleness_max": 5.0,
        "rollout/groups_carried": 2.0,
        "rollout/refused_stale": 0.75,
    }


def test_rewards_of_refused_groups_are_compared_with_those_of_trained_ones():
    """Finds a policy that is slow where it is bad, and whose rewards look better than they are."""
    episode = episode_of((1, ((0, 1),)))
    rewards = [replace(episode, verdict=Verdict.of(reward)) for reward in (1.0, 0.5, 0.0, 0.5)]
    failed = replace(episode, verdict=Verdict.failed("timeout", ""), samples=(), logprobs=())
    assignment = Assignment(2, (0,), {4: STALE})
    gap = metrics_of(assignment, [*rewards[:2], failed], [*rewards[2:], failed])["rollout/refused_reward_gap"]
    assert gap == -0.5
    assert "rollout/refused_reward_gap" not in metrics_of(assignment, rewards, [failed])


def test_versions_are_recorded_and_conversations_of_lock_step_look_as_before(tmp_path):
    """Finds a record that loses versions, and lines of other runs that change."""
    episode = episode_of((4, ((0, 1), (1, 2))), (3, ((0, 2),)))
    path = tmp_path / "tasks.jsonl"
    path.write_text(line_of(episode, "s"))
    assert read_episodes(path) == [episode]
    path.write_text(line_of(episode_of((4, ((0, 1), (3, 2), (1, 3)))), "s"))
    assert read_episodes(path) == [], "versions out of order"

    plain = replace(episode, turns=tuple(replace(turn, versions=()) for turn in episode.turns))
    (first, _) = json.loads(line_of(plain, "s"))["episode"]["turns"]
    assert [*first] == ["new_tokens", "is_readable", "action", "step", "reward", "tool_errors"]


def test_a_schedule_is_read_as_it_was_written_and_damage_is_named(tmp_path):
    """Finds a line that is lost, and a damaged one that is passed over: its groups would be trained on twice."""
    record = ScheduleRecord(tmp_path, "s", 2)
    for position in (3, 0, 5, 1):
        record.add(episode_of((1, ((0, 0),)), position=position))
    written = [Assignment(1, (3, 0), {}, 4), Assignment(2, (5, 1), {2: STALE}, 0)]
    for assignment in written:
        record.assign(assignment)
    assert record.assignments() == written
    assert [*record.episodes()] == [(0, 0), (1, 0), (3, 0), (5, 0)]

    # A restart after these iterations reads no conversation of theirs again, nor writes their files again.
    file_of_done = tmp_path / "tasks_00000000.jsonl"
    inode = file_of_done.stat().st_ino
    assert [*record.episodes(besides={0, 1, 3})] == [(3, 0), (5, 0)]
    assert file_of_done.stat().st_ino == inode

    path = tmp_path / SCHEDULE
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[0][:-9])  # a kill has torn it
    assert read_assignments(path, "s") == written
    assert record.assignments() == written
    assert path.read_text() == whole

    for content, message in (
        (whole.replace("[3, 0]", "[3, 1]"), "line 1 is damaged .its checksum differs.: restore"),
        (whole.replace('"s"', '"t"'), "line 1 was recorded under other settings"),
        ("".join(whole.splitlines(keepends=True)[1:]), "line 1 is of iteration 2"),
    ):
        path.write_text(content)
        with pytest.raises(ArtefactError, match=message):
            record.assignments()


def test_what_a_line_of_the_schedule_names_is_on_disk_before_it(tmp_path, monkeypatch):
    """Finds a line that outlives a failure of power while the names of new files do not: no restart would go on."""
    record = ScheduleRecord(tmp_path, "s", 2)
    record.add(episode_of((1, ((0, 0),))))
    flushed = []
    monkeypatch.setattr(durable, "fsync", lambda path: flushed.append((path.name, (tmp_path / SCHEDULE).exists())))
    record.assign(Assignment(1, (0,)))
    before = [name for name, has_line in flushed if not has_line]
    assert before == ["tasks_00000000.jsonl", tmp_path.name]
    assert [name for name, has_line in flushed if has_line] == [SCHEDULE, tmp_path.name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_staleness": 0}, "rlhf.max_staleness=0: expected 1 or more"),
        ({"sampling_rounds": 3, "algorithm": "dapo"}, "rlhf.sampling_rounds=3: expected 0 with rlhf.asynchronous"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    """Finds a key that is silently not read."""
    with pytest.raises(ConfigError, match=message):
        config_of(**({"asynchronous": True, "max_staleness": STALENESS} | settings))


# --- runs ---


def late(task: Any) -> float:
    """Seconds of a step: some tasks take longer than an iteration."""
    return 0.03 * (int(task.key) % 6)


def asynchronous(tokenizer: Any, stack: Any, folder: Path | None, host: GameHost | None = None, **more: Any) -> Toy:
    config = config_of(asynchronous=True, max_staleness=STALENESS, **more)
    return game(config, ITERATIONS, tokenizer, stack, folder=folder, host=host or GameHost(delay_s=late))


def figures(run: Toy) -> list[dict[str, float]]:
    """Returns all metrics of each iteration that are no times."""
    return [{k: v for k, v in report.metrics.items() if not k.startswith("timing/")} for report in run.reports]


def assignments_in(folder: Path) -> list[Assignment]:
    settings = json.loads((folder / SCHEDULE).read_text().splitlines()[0])["settings"]
    return read_assignments(folder / SCHEDULE, settings)


@pytest.mark.heavy
def test_an_iteration_takes_finished_groups_that_are_not_too_old(tokenizer, tmp_path, one_rank):
    """Finds a task that is trained on twice or never, a group beyond the limit, and a restart with other numbers."""
    with ExitStack() as stack:
        run = asynchronous(tokenizer, stack, tmp_path, host := GameHost(delay_s=late))
        saved = saving(run)
        with deadline(120):
            run.run()
    assert host.closed == len(host.resets)
    assignments = assignments_in(tmp_path)
    taken = [position for assignment in assignments for position in assignment.groups]
    refused = [position for assignment in assignments for position in assignment.refused]
    assert len(taken) == len({*taken, *refused}) - len(refused) == 3 * ITERATIONS
    assert sorted(taken) != taken, "groups come as they finish"
    assert run.metric("rollout/logprob_gap")[0] < 1e-5
    for version, report in enumerate(run.reports):
        assert (version - report.rollouts.version_B <= STALENESS).all()
        assert report.metrics["rollout/prompts"] == 3 + len(assignments[version].refused)
    assert max(run.metric("rollout/token_staleness_max")) >= 1
    assert max(run.metric("rollout/groups_carried")) >= 1

    # A run that is resumed follows the schedule, though its environment takes no time at all.
    for start in (0, 2):
        folder = tmp_path / f"resumed_{start}"
        folder.mkdir()
        for path in tmp_path.glob("*.jsonl"):
            shutil.copy(path, folder)
        with ExitStack() as stack:
            again = asynchronous(tokenizer, stack, folder, host := GameHost())
            again.run() if start == 0 else run_from(again, saved[start])
        assert figures(again) == figures(run)[start:]
        assert not host.resets


@pytest.mark.heavy
def test_a_killed_run_goes_on_where_its_schedule_ends(tokenizer, tmp_path, one_rank):
    """Finds finished conversations that are held again, and an iteration that is trained on other groups than before
    the kill."""
    with ExitStack() as stack:
        killed = asynchronous(tokenizer, stack, tmp_path, host := GameHost(delay_s=late))
        reported = killed.learner.report

        def dies_soon(report: IterationReport) -> None:
            reported(report)
            if report.iteration == 2:
                host.dies_at = host.steps + 5

        killed.learner = replace(killed.learner, report=dies_soon)
        with deadline(120), pytest.raises(KilledError):
            killed.run()
    n_before, recorded = len(killed.reports), len([*tmp_path.glob("tasks_*.jsonl")])
    episodes = [episode for path in tmp_path.glob("tasks_*.jsonl") for episode in read_episodes(path)]
    assert 0 < n_before < ITERATIONS
    assert recorded

    with ExitStack() as stack:
        again = asynchronous(tokenizer, stack, tmp_path, host := GameHost(delay_s=late))
        with deadline(120):
            again.run()
    assert figures(again)[:n_before] == figures(killed)
    assert len(again.reports) == ITERATIONS
    # Each conversation is recorded once, however often the run begins.
    everything = [e for path in tmp_path.glob("tasks_*.jsonl") for e in read_episodes(path)]
    assert len({(e.position, e.sample) for e in everything}) == len(everything)
    assert len(host.resets) >= len(everything) - len(episodes)
    assert all(episode in everything for episode in episodes)


@pytest.mark.heavy
def test_an_environment_that_hangs_stops_no_iteration(tokenizer, stack, tmp_path, one_rank):
    """Finds a group that the learner waits for though it is too old, or that is left behind at the end."""
    run = asynchronous(tokenizer, stack, tmp_path, host := GameHost(delay_s=lambda task: 600.0 * (task.key == "7")))
    with deadline(120):
        run.run()
    assert len(run.reports) == ITERATIONS
    assert host.closed == len(host.resets)


@pytest.mark.heavy
def test_a_first_answer_that_ends_too_late_is_refused(tokenizer, stack, tmp_path, one_rank):
    """Finds a group whose first token is too old and is trained on, because no version of it was known at the pushes:
    its first answers outlast `max_staleness` updates."""
    config, limits = config_of(asynchronous=True, max_staleness=STALENESS), Limits(turns=1, tokens=160)
    host = GameHost()
    run = game(config, ITERATIONS, tokenizer, stack, folder=tmp_path, host=host, limits=limits, at_once=64)
    source: Any = supply_in(run).source
    n_early = 3 * (STALENESS + 1)

    def results(requests: Any) -> Iterator[Any]:
        """Gives answers of tasks 1 to `n_early` at once, then those of task 0, then the others."""
        held_back = []
        for result in source._source.results(requests):
            held_back.append(result)
            if source.version > STALENESS or 1 <= int(result.request.split(".")[0]) <= n_early:
                due = held_back if source.version > STALENESS else [held_back.pop()]
                yield from due
                due.clear()

    source.results = results
    with deadline(120):
        run.run()
    assert host.closed == len(host.resets)
    for version, report in enumerate(run.reports):
        assert (version - report.rollouts.version_B <= STALENESS).all()
    assert 0 in [position for assignment in assignments_in(tmp_path) for position in assignment.refused]


@pytest.mark.heavy
def test_engines_beside_the_learner_do_not_hide_that_it_hangs(tokenizer, stack, one_rank, monkeypatch):
    """Finds signs of life of engines while the learner updates: the gang would seem alive for ever."""
    monkeypatch.setattr(request_feed, "ALIVE_EVERY_S", 0.01)
    signs, calls = [], []

    class Counted(SignsOfLife):
        def __call__(self) -> None:
            calls.append(None)
            super().__call__()

    run = asynchronous(tokenizer, stack, None)
    alive = Counted(lambda: signs.append(None))
    reported = run.learner.report

    def engines_go_on() -> None:
        n_calls, until = len(calls), time.monotonic() + 30
        while len(calls) < n_calls + 3:
            assert time.monotonic() < until, "engines do not go on"

    def hangs(report: IterationReport) -> None:
        reported(report)
        engines_go_on()  # a sign that was under way may still come
        n_signs = len(signs)
        engines_go_on()
        assert len(signs) == n_signs

    with_supply(run, replace(supply_in(run), alive=alive))
    run.learner = replace(run.learner, report=hangs)
    with deadline(120):
        run.run()
    assert signs, "nobody sees that engines work while the learner waits"
    assert alive.passes, "what follows the run waits for engines, too"


@pytest.mark.heavy
def test_an_error_of_the_engines_ends_the_run(tokenizer, stack, one_rank):
    """Finds a learner that waits for ever for conversations that nobody answers."""
    run = asynchronous(tokenizer, stack, None, host := GameHost())
    fail_after_an_answer(run)
    with deadline(60), pytest.raises(RuntimeError, match="no engine"):
        run.run()
    assert host.closed == len(host.resets)


@pytest.mark.heavy
def test_many_conversations_wait_for_their_environment_together(tokenizer, stack, one_rank):
    """Finds conversations that begin only when others have ended: the first iteration would wait for each."""
    under_way = 0

    class Watched(GameHost):
        def episode(self, task):
            episode = super().episode(task)
            inner = episode.reset

            async def reset():
                nonlocal under_way
                under_way += 1
                while under_way < 9:
                    await asyncio.sleep(0.01)
                return await inner()

            episode.reset = reset
            return episode

    run = asynchronous(tokenizer, stack, None, Watched())
    with deadline(60):
        run.run()


# --- speed ---

NANO = replace(MODEL, d_model=160, n_layers=4, n_heads=5, d_ff=640, max_seq_len=192)


class Sleeping(GameHost):
    """Games of one turn, whose verdict takes a log-normal time (sigma 1)."""

    mean_s: float
    dice: random.Random

    def episode(self, task):
        episode = super().episode(task)
        inner = episode.step

        async def step(action):
            await asyncio.sleep(self.mean_s * self.dice.lognormvariate(-0.5, 1))
            return await inner(action)

        episode.step = step
        return episode


@pytest.mark.bars
def test_asynchronous_sampling_takes_more_iterations_an_hour(tokenizer, one_rank):
    """Environments that take one generation on average, 16 tasks of 8 conversations, nano on two cores."""
    iterations, at_once = 6, 384
    limits = Limits(turns=1, tokens=160)
    shared = {"prompts": 16, "samples": 8, "max_new_tokens": 48, "epochs": 1, "kl_coefficient": 0.0}

    def seconds_of(mean_s: float, seed: int, threads: int, count: int, **more: Any) -> tuple[float, Toy]:
        host = Sleeping()
        host.mean_s, host.dice = mean_s, random.Random(seed)
        torch.set_num_threads(threads)
        with ExitStack() as stack:
            model = replace(NANO, vocab_size=tokenizer.vocab_size)
            config = config_of(**shared, **more)
            run = game(config, count, tokenizer, stack, host=host, limits=limits, model=model, at_once=at_once)
            began = time.perf_counter()
            run.run()
            return time.perf_counter() - began, run

    asynchronously = {"asynchronous": True, "max_staleness": STALENESS}
    threads = torch.get_num_threads()
    try:
        _, run = seconds_of(0.0, 0, 1, 3)
        generation_s = min(run.metric("timing/rollout_s"))
        ratios = []
        for seed in range(3):
            # One after the other, learner and engine may have both cores; on a busy machine one is faster.
            in_turns_s = min(seconds_of(generation_s, seed, n, iterations)[0] for n in (1, 2))
            asynchronous_s, run = seconds_of(generation_s, seed, 1, iterations, **asynchronously)
            ratios.append(in_turns_s / asynchronous_s)
            print(f"generation {generation_s:.2f} s, lock-step {in_turns_s:.1f} s, asynchronous {asynchronous_s:.1f} s")
            print("staleness of tokens", run.metric("rollout/token_staleness_mean"))
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(ratios) >= 1.6, ratios
