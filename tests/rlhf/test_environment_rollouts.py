"""Conversations with an environment in the learner: first ratios, masks, failures, and what a restart repeats."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest

from dist_lm.environments.protocol import Limits
from dist_lm.generation.call_grammar import ToolChoice, call_constraint
from dist_lm.rlhf.rewards import RewardError
from dist_lm.rlhf.rollouts import ShuffledPrompts
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.patience import patient
from tests.rlhf.guessing import (
    GUESS,
    TASKS,
    GameHost,
    KilledError,
    config_of,
    end_turns_early,
    fail_after_an_answer,
    game,
)
from tests.rlhf.toy import assert_ends_alike, run_from, saving

REQUIRED = ToolChoice("required")


@pytest.fixture(scope="module")
def tokenizer(tiny_work: WorkDirectory) -> Tokenizer:
    return Tokenizer.load(tiny_work.tokenizer_model)


@pytest.fixture(autouse=True)
def short_turns(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    end_turns_early(tokenizer, monkeypatch)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Ends a block that hangs."""
    signal.alarm(int(patient(seconds)))
    yield
    signal.alarm(0)


FILTERS = ({}, {"top_k": 7}, {"top_p": 0.9, "temperature": 0.8}, {"top_k": 5, "importance_cap": 0.0})


@pytest.mark.parametrize(
    ("algorithm", "filters"),
    [
        *(("grpo", filters) for filters in FILTERS),
        *(pytest.param(name, filters, marks=pytest.mark.heavy) for name in ("dapo", "ppo") for filters in FILTERS),
    ],
)
def test_the_first_ratio_of_several_turns_is_1(algorithm, filters, tokenizer, stack, one_rank):
    """Finds log-probabilities read at other tokens, or under other sets, than those that were drawn."""
    config = config_of(algorithm, epochs=1, **filters)
    run = game(config, 1, tokenizer, stack)
    run.run()

    assert run.metric("rollout/turns")[0] > 1.5
    assert run.metric("rlhf/ratio_mean") == [pytest.approx(1, abs=1e-6)]
    assert run.metric("rollout/logprob_gap")[0] < 1e-5
    (report,) = run.reports
    assert report.rollouts.drawn_N.sum() == report.rollouts.new_tokens_B.sum() == len(report.rollouts.logprobs_M)


def test_calls_are_constrained_in_every_turn(tokenizer, stack, one_rank, monkeypatch):
    """Finds sets of a grammar that the learner reads for another turn: the gap or the ratio would show it."""
    monkeypatch.undo()  # calls end by themselves
    host = GameHost(tools=(GUESS,))
    config = config_of(epochs=1, max_new_tokens=40, top_k=9)
    run = game(
        config, 1, tokenizer, stack, host=host, constraint_of=lambda tools: call_constraint(tools, tokenizer, REQUIRED)
    )
    run.run()

    (report,) = run.reports
    assert report.metrics["rollout/turns"] > 1.2
    assert report.metrics["rollout/tool_errors"] > 0.2
    assert report.metrics["rlhf/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert report.metrics["rollout/logprob_gap"] < 1e-5
    assert len(report.rollouts.set_size_M) == len(report.rollouts.logprobs_M)


@pytest.mark.heavy
def test_the_order_of_events_changes_no_number(tokenizer, one_rank):
    """Finds answers that depend on which conversations wait for their environment."""

    def late(task) -> float:
        return 0.05 * (int(task.key) % 3)

    ends = []
    for host in (GameHost(), GameHost(delay_s=late)):
        with ExitStack() as stack:
            run = game(config_of(), 2, tokenizer, stack, host=host)
            saved = saving(run)
            run.run()
            ends.append((run, saved))
    assert_ends_alike(ends[1][0], ends[0][0], ends[0][1], 0)


def test_a_conversation_that_waits_holds_up_no_other(tokenizer, stack, one_rank):
    """Finds turns that are drawn in lock-step: fast conversations must be over before the slow one's first turn."""
    closed_before_slow: list[int] = []

    class Watched(GameHost):
        def episode(self, task):
            episode = super().episode(task)
            if task.key == slow_key:
                inner = episode.reset

                async def reset():
                    while self.closed < 6:
                        await asyncio.sleep(0.01)
                    closed_before_slow.append(self.closed)
                    return await inner()

                episode.reset = reset
            return episode

    slow_key = ShuffledPrompts(TASKS, 0)(0, 1)[0].key
    run = game(config_of(), 1, tokenizer, stack, host=Watched())
    with deadline(60):
        run.run()
    assert len(closed_before_slow) == 3  # the conversations of the slow task


def test_failures_leave_their_group_and_are_counted_by_reason(tokenizer, stack, one_rank):
    """Finds a failure that becomes a number: the others' advantages must be those of the group without it."""

    class Failing(GameHost):
        def episode(self, task):
            episode = super().episode(task)
            self.n_opened = getattr(self, "n_opened", 0) + 1
            if reason := {2: "timeout", 7: "crashed"}.get(self.n_opened):
                episode.host = replace(self, failure_of=lambda task: reason)
            return episode

    config = config_of(max_failed_fraction=0.25, normalise_reward=False)
    run = game(config, 1, tokenizer, stack, host=Failing())
    run.run()

    (report,) = run.reports
    assert len(report.score_B) == len(report.rollouts) == 7
    assert np.isfinite(report.rollouts.reward_B).all()
    assert (report.rollouts.failure_B < 0).all()
    np.testing.assert_allclose(
        report.score_B.numpy(), report.rollouts.reward_B - 1.0 * ~report.rollouts.ended, rtol=1e-6
    )
    metrics = report.metrics
    assert metrics["rlhf/left_out"] == pytest.approx(2 / 9)
    assert metrics["rlhf/failed_environment"] == 2
    assert metrics["rollout/invalid_timeout"] == metrics["rollout/invalid_crashed"] == 1


def test_rewards_that_leave_fp32_are_no_number_and_are_told(tokenizer, stack, one_rank, caplog):
    """Finds a sum of rewards that is learned from as infinity, or a conversation that is left out without a word."""

    class Generous(GameHost):
        def episode(self, task):
            episode = super().episode(task)
            self.n_opened = getattr(self, "n_opened", 0) + 1
            if self.n_opened == 2:
                inner = episode.step

                async def step(action):
                    return replace(await inner(action), turn_reward=1e300)

                episode.step = step
            return episode

    run = game(config_of(max_failed_fraction=0.25), 1, tokenizer, stack, host=Generous())
    run.run()
    (report,) = run.reports
    assert report.metrics["rollout/invalid_bad_reward"] == 1
    assert np.isfinite(report.rollouts.reward_B).all()
    (warning,) = (record.getMessage() for record in caplog.records if "bad_reward" in record.getMessage())
    assert "rewards add up to" in warning


def test_a_run_stops_above_the_share_of_failures(tokenizer, stack, one_rank):
    """Finds a run that goes on while its environment is broken."""
    host = GameHost(failure_of=lambda task: "infrastructure")
    run = game(config_of(max_failed_fraction=0.3), 1, tokenizer, stack, host=host)
    with pytest.raises(RewardError, match=r"environment=game: 9 of 9 .* no verdict .infrastructure 9.*max_failed_frac"):
        run.run()


@pytest.mark.heavy
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_resumed_run_ends_with_the_same_bits(staleness, tokenizer, tmp_path, one_rank):
    """Finds state of conversations that a checkpoint lacks, and verdicts asked for again."""
    config = config_of(max_staleness=staleness, top_p=0.95)
    with ExitStack() as stack:
        whole = game(config, 4, tokenizer, stack, folder=tmp_path / "whole")
        saved = saving(whole)
        whole.run()
    for start in (1, 3):
        with ExitStack() as stack:
            resumed = game(config, 4, tokenizer, stack, folder=tmp_path / f"resumed_{start}")
            saving(resumed)
            run_from(resumed, saved[start])
            assert_ends_alike(resumed, whole, saved, start)


@pytest.mark.heavy
def test_conversations_that_were_finished_before_a_kill_are_not_held_again(tokenizer, tmp_path, one_rank):
    """Finds an environment that is executed again for what is recorded, or numbers that change by the record."""
    with ExitStack() as stack:
        whole = game(config_of(), 2, tokenizer, stack, host=(host := GameHost()), folder=tmp_path / "whole")
        saved = saving(whole)
        whole.run()
    n_steps = host.steps

    # The run dies in the middle of the second iteration, and begins again without a checkpoint.
    with ExitStack() as stack:
        killed = game(config_of(), 2, tokenizer, stack, host=GameHost(dies_at=n_steps - 3), folder=tmp_path / "killed")
        with pytest.raises(KilledError):
            killed.run()
    files = sorted((tmp_path / "killed").glob("*.jsonl"))
    lines = files[-1].read_text().splitlines()
    assert len(files) == 2
    assert 0 < len(lines) < 9
    files[-1].write_text("\n".join([*lines[:-1], lines[-1][:-40]]))  # the last line is torn

    with ExitStack() as stack:
        again = game(config_of(), 2, tokenizer, stack, host=(host := GameHost()), folder=tmp_path / "killed")
        saving(again)
        again.run()
        assert len(host.resets) == 9 - (len(lines) - 1)
        assert host.closed == len(host.resets)
        assert_ends_alike(again, whole, saved, 0)
    recorded = [sorted(path.read_text().splitlines()) for path in sorted((tmp_path / "killed").glob("*.jsonl"))]
    assert recorded == [sorted(path.read_text().splitlines()) for path in sorted((tmp_path / "whole").glob("*.jsonl"))]


def test_an_error_of_the_engines_closes_all_environments(tokenizer, stack, one_rank):
    """Finds conversations that wait for ever after their engine has failed."""
    host = GameHost()
    run = game(config_of(), 1, tokenizer, stack, host=host)
    fail_after_an_answer(run)
    with deadline(60), pytest.raises(RuntimeError, match="no engine"):
        run.run()
    assert host.closed == 9


@pytest.mark.parametrize("limits", [Limits(turns=1, tokens=160), Limits(turns=9, tokens=60)])
def test_limits_end_conversations_with_a_verdict(limits, tokenizer, stack, one_rank):
    """Finds conversations that outgrow their limits, or that a limit leaves without a verdict."""
    run = game(config_of(epochs=1), 1, tokenizer, stack, limits=limits)
    run.run()

    (report,) = run.reports
    rollouts = report.rollouts
    assert len(rollouts) == 9
    assert rollouts.sample_tokens_S.max() <= limits.tokens
    assert rollouts.turns_B.max() <= limits.turns + 1
    assert (rollouts.cut_B > 0).any()
    assert (rollouts.ended == (rollouts.cut_B == 0)).all()
