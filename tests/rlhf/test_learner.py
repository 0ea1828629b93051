"""Whole iterations of small runs: what has to hold in every one, whatever is learned."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_lm.errors import ConfigError
from dist_lm.generation.request import Answer, Request
from dist_lm.rlhf.algorithms.ppo import Ppo
from dist_lm.rlhf.config import RewardPartConfig, RlhfConfig
from dist_lm.rlhf.controller import RolloutSupply
from dist_lm.rlhf.models import start_critic
from dist_lm.rlhf.reward_model import RewardScale
from dist_lm.rlhf.rewards import RewardError
from dist_lm.rlhf.rollouts import EngineRollouts
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.trainer import NonFiniteGradientsError
from tests.rlhf.toy import (
    LENGTH,
    TOKENS,
    GroupMean,
    Toy,
    assert_ends_alike,
    engine_of,
    run_from,
    saving,
    supply_in,
    tensors_of,
    weights_of,
    with_supply,
)
from tests.rlhf.toy import toy as plain_toy
from tests.rlhf.toy_rewards import VOCABULARY

pytestmark = pytest.mark.usefixtures("one_rank")

SHORT = replace(LENGTH, prompts=12, max_new_tokens=8, epochs=2, minibatches=2, kl_coefficient=0.05)
SHORT = replace(SHORT, rewards={"length": RewardPartConfig(kind="length", target=4)}, missing_eos_penalty=1.0)
WITH_REWARD_MODEL = replace(SHORT, rewards=SHORT.rewards | {"model": RewardPartConfig(kind="reward_model")})
NEAR = 1e-5
FAILING = {"starts": RewardPartConfig(kind="function", function="tests.rlhf.toy_rewards:fails_on_low_starts")}
STOPS = tuple(range(1, 9))  # so that completions have many lengths


def toy(config, iterations: int, **options) -> Toy:
    return plain_toy(config, iterations, stop_tokens=STOPS, **options)


def ran(config, iterations: int, **options) -> Toy:
    made = toy(config, iterations, **options)
    made.run()
    return made


# --- engine, trainer, reference ---


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_trainer_and_reference_agree_at_any_temperature_and_the_first_ratio_is_1(temperature):
    made = ran(replace(SHORT, temperature=temperature, minibatches=1), 3)
    assert max(made.metric("rollout/logprob_gap")) < NEAR
    assert made.metric("rollout/staleness") == [0, 0, 0]
    assert made.metric("rlhf/kl")[0] == pytest.approx(0, abs=NEAR)
    assert made.metric("rlhf/kl")[-1] > 1e-3
    for report in made.reports:
        assert report.updates[0]["ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert report.updates[0]["approx_kl"] == pytest.approx(0, abs=1e-9)
        assert report.updates[1]["approx_kl"] > 1e-6


def test_the_share_of_forward_passes_is_told():
    """Finds an iteration that is silent while the log-probabilities of many rollouts are computed."""
    shares: list[float] = []
    ran(replace(WITH_REWARD_MODEL, micro_batch_tokens=30), 1, reward_model=True, scoring=shares.append)
    assert len(shares) > 4
    assert shares == sorted(shares)
    assert (shares[0], max(shares) > 0.7, max(shares) <= 1) == (0.0, True, True)


@pytest.mark.heavy
def test_the_first_ratio_is_1_also_where_the_first_update_sees_a_part():
    made = ran(replace(SHORT, micro_batch_tokens=30), 2)
    for report in made.reports:
        assert report.updates[0]["ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert report.updates[0]["approx_kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("ignore_eot", [False, True])
def test_no_token_ends_a_completion_with_ignore_eot(ignore_eot):
    made = ran(replace(SHORT, ignore_eot=ignore_eot, epochs=1, minibatches=1), 1)
    assert (made.metric("rlhf/new_tokens_min") == [SHORT.max_new_tokens]) == ignore_eot


@pytest.mark.heavy
def test_rollouts_are_drawn_without_filters_and_by_seeds_of_prompt_and_sample():
    asked: list[Request] = []

    class Listening(EngineRollouts):
        def generate(self, requests: Sequence[Request], *seen_by) -> list[Answer]:
            asked.extend(requests)
            return super().generate(requests, *seen_by)

    made = ran(replace(SHORT, samples=2, temperature=0.9), 2, source=lambda: Listening(engine_of()))
    assert len(asked) == 2 * SHORT.prompts
    params = asked[0].params
    assert (params.top_k, params.top_p, params.min_p, params.temperature) == (0, 1, 0, 0.9)
    assert len({request.seed for request in asked}) == len(asked)
    assert made.reports[1].rollouts.position_B.tolist() == [12 + i // 2 for i in range(24)]
    assert made.reports[1].rollouts.sample_B.tolist() == [0, 1] * 12
    again = ran(replace(SHORT, samples=2, temperature=0.9), 1)
    assert np.array_equal(again.reports[0].rollouts.tokens_N, made.reports[0].rollouts.tokens_N)


# --- rewards ---


def test_a_completion_without_an_end_is_penalised():
    report = ran(SHORT, 1).reports[0]
    whole = torch.from_numpy(report.rollouts.ended)
    assert 0 < int(whole.sum()) < len(whole)
    torch.testing.assert_close(report.score_B, report.part_B["length"] - (~whole).float())
    assert report.metrics["rlhf/truncated_rate"] == pytest.approx(1 - float(whole.float().mean()))


def test_parts_are_logged_apart_and_the_reward_model_is_normalised_by_the_references_samples():
    made = ran(WITH_REWARD_MODEL, 2, reward_model=True)
    first, second = (report.part_B["model"] for report in made.reports)
    assert float(first.mean()) == pytest.approx(0, abs=NEAR)
    assert float(first.std(unbiased=False)) == pytest.approx(1, abs=NEAR)
    assert abs(float(second.mean())) > 1e-3  # by what the first ones gave
    assert made.saved[-1].reward_scale is not None
    for report in made.reports:
        for name, score_B in report.part_B.items():
            assert report.metrics[f"rlhf/part_{name}"] == pytest.approx(float(score_B.mean()), abs=1e-6)


@pytest.mark.heavy
def test_a_scale_that_is_known_before_the_first_iteration_is_used_from_there_on():
    made, other = toy(WITH_REWARD_MODEL, 2, reward_model=True), ran(WITH_REWARD_MODEL, 1, reward_model=True)
    made.state = replace(made.state, reward_scale=RewardScale(2.0, 4.0))
    assert made.run().reward_scale == RewardScale(2.0, 4.0)
    own = other.saved[-1].reward_scale
    assert own
    raw = other.reports[0].part_B["model"] * own.std + own.mean  # of the same rollouts
    torch.testing.assert_close(made.reports[0].part_B["model"], (raw - 2.0) / 4.0)


@pytest.mark.heavy
def test_a_completion_without_a_score_takes_no_part_in_anything():
    """As if it had never been drawn: by a function that fails, and by one that never sees those completions."""

    class Sorted(RolloutSupply):
        def draw(self, *given):
            rollouts = super().draw(*given)
            return rollouts.chosen(np.array([one.completion[0] >= VOCABULARY // 4 for one in rollouts]))

    config = replace(WITH_REWARD_MODEL, rewards=WITH_REWARD_MODEL.rewards | FAILING, max_failed_fraction=0.9, samples=2)
    failing, other = (toy(config, 3, reward_model=True) for _ in range(2))
    with_supply(other, Sorted(**vars(supply_in(other))))
    failing.run()
    other.run()
    assert sum(failing.metric("rlhf/failed_starts")) > 5
    assert sum(other.metric("rlhf/failed_starts")) == sum(failing.metric("rlhf/failed_length")) == 0
    for name, value in tensors_of(other).items():
        assert torch.equal(value, tensors_of(failing)[name]), name
    for report, expected in zip(failing.reports, other.reports, strict=True):
        failed = report.metrics["rlhf/failed_starts"]
        assert len(report.rollouts) == len(expected.rollouts) == 24 - failed
        assert report.metrics["rlhf/left_out"] == pytest.approx(failed / 24)
        kept = {
            n
            for n in report.metrics
            if "timing" not in n
            and "_per_s" not in n
            and "failed" not in n
            and "left_out" not in n
            and n != "rollout/prompts"
        }
        assert {n: report.metrics[n] for n in kept} == {n: expected.metrics[n] for n in kept}


def test_parts_and_models_that_do_not_go_together_are_refused():
    for config, options, message in (
        (WITH_REWARD_MODEL, {}, "reward_model"),
        (SHORT, {"reference": False}, "rlhf.kl_coefficient=0.05"),
        (replace(SHORT, rewards={}), {}, "at least one part"),
    ):
        with pytest.raises(ConfigError, match=message):
            toy(config, 1, **options)


# --- the critic ---


def test_a_critic_begins_with_the_reward_models_trunk_and_a_head_of_zero_or_the_reward_models():
    made = toy(WITH_REWARD_MODEL, 1, reward_model=True)
    critic, reward = made.learner.models.critic, made.learner.models.reward
    assert critic
    assert reward
    with torch.no_grad():
        reward.get_parameter("scalar_head.bias").fill_(0.5)
    start_critic(critic.model, reward, "zero")
    for name, parameter in critic.model.named_parameters():
        assert torch.equal(parameter, reward.get_parameter(name)) != name.startswith("scalar_head"), name
        assert not name.startswith("scalar_head") or not parameter.any()
    start_critic(critic.model, reward, "reward_model")
    for name, parameter in critic.model.named_parameters():
        assert torch.equal(parameter, reward.get_parameter(name)), name
    with pytest.raises(ConfigError, match="expected zero"):
        start_critic(critic.model, made.learner.models.policy.model, "reward_model")


@pytest.mark.heavy
def test_the_critic_learns_and_optimizers_have_their_own_rates():
    rewards = {"one": RewardPartConfig(kind="function", function="tests.rlhf.toy_rewards:one")}
    config = replace(SHORT, lr=1e-12, value_lr=3e-3, epochs=4, rewards=rewards, missing_eos_penalty=0.0)
    made = ran(replace(config, kl_coefficient=0.0, lam=1.0), 5)
    values = made.metric("rlhf/value_mean")
    assert made.metric("rlhf/return_mean") == pytest.approx([1.0] * 5, abs=NEAR)
    assert values[0] == 0
    assert values[-1] > 0.5
    critic, policy = made.learner.models.critic, made.learner.models.policy
    assert critic
    for trained, lr in ((policy, 1e-12), (critic, 3e-3)):
        assert {(group["lr"], group["eps"]) for group in trained.optimizer.param_groups} == {(lr, 1e-5)}


# --- updates ---


@pytest.mark.heavy
def test_updates_do_not_depend_on_how_rollouts_are_cut():
    """The loss is a mean over all tokens of a minibatch, not over those of a micro-batch or a completion."""
    whole, parts = ran(SHORT, 2), ran(replace(SHORT, micro_batch_tokens=13), 2)
    for name, value in weights_of(whole).items():
        torch.testing.assert_close(weights_of(parts)[name], value, rtol=1e-4, atol=2e-6)
    for name in ("rlhf/policy_loss", "rlhf/value_loss", "rlhf/entropy", "rlhf/kl"):
        assert parts.metric(name) == pytest.approx(whole.metric(name), abs=1e-5), name


@pytest.mark.heavy
def test_passes_end_where_the_policy_has_gone_far_enough():
    far = replace(SHORT, epochs=6, lr=1e-2)
    assert ran(far, 1).metric("rlhf/updates") == [12]
    stopped = ran(replace(far, stop_kl=0.01), 1)
    updates = stopped.reports[0].updates
    assert 2 <= len(updates) < 12
    assert updates[-1]["approx_kl"] > 0.01 >= max(update["approx_kl"] for update in updates[:-1])
    assert stopped.saved[-1].policy_updates == len(updates)


@pytest.mark.heavy
def test_an_entropy_bonus_keeps_the_distribution_wide():
    peaked = replace(SHORT, lr=3e-3, epochs=6)
    plain, wide = ran(peaked, 4), ran(replace(peaked, entropy_coefficient=0.5), 4)
    assert wide.metric("rlhf/entropy")[-1] > plain.metric("rlhf/entropy")[-1] + 0.01


@pytest.mark.heavy
def test_an_adaptive_coefficient_moves_towards_its_target_and_is_used():
    used: list[float] = []

    class Listening(Ppo):
        def prepare(self, experience, kl_coefficient):
            used.append(kl_coefficient)
            return super().prepare(experience, kl_coefficient)

    steered = replace(SHORT, kl_target=1e-4, kl_horizon=24, lr=3e-3)
    made = ran(steered, 4, algorithm=Listening(steered))
    assert used == made.metric("rlhf/kl_coefficient")
    coefficients = made.metric("rlhf/kl_coefficient")
    assert coefficients[0] == 0.05
    assert coefficients[-1] > coefficients[1]
    report = made.reports[-1]
    expected = report.metrics["rlhf/score_mean"] - coefficients[-1] * report.metrics["rlhf/kl"]
    assert report.metrics["rlhf/reward_mean"] == pytest.approx(expected)


def test_rates_warm_up():
    rates: list[float] = []
    made = toy(replace(SHORT, warmup_iterations=4, lr=1e-3, epochs=1, minibatches=1), 3)
    optimizer = made.learner.models.policy.optimizer
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    made.run()
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4])


def test_updates_that_are_not_finite_are_skipped_and_end_the_run_when_there_is_nothing_else():
    class Broken(GroupMean):
        def policy_loss(self, tokens):
            loss = super().policy_loss(tokens)
            return replace(loss, total=loss.total * float("nan"))

    made = toy(replace(SHORT, samples=2, max_nonfinite_updates=3), 2, algorithm=Broken())
    before = weights_of(made)
    with pytest.raises(NonFiniteGradientsError, match="3 updates in a row, in iteration 0"):
        made.run()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(made).items())


def test_an_iteration_of_scores_that_teach_nothing_is_refused_and_leaves_no_trace():
    class Overflowing(GroupMean):
        def prepare(self, experience, kl_coefficient):
            prepared = super().prepare(experience, kl_coefficient)
            return replace(prepared, tokens={name: column / 0 for name, column in prepared.tokens.items()})

    made = toy(replace(SHORT, samples=2), 2, algorithm=Overflowing(), save_every=1)
    before = weights_of(made)
    with pytest.raises(RewardError, match=r"rlhf.rewards.length: with its scores, .*not finite"):
        made.run()
    assert all(torch.equal(value, before[name]) for name, value in weights_of(made).items())
    assert not made.saved


# --- the algorithm is a part ---


@pytest.mark.heavy
def test_another_algorithm_without_a_critic_learns_in_the_same_frame():
    config = replace(TOKENS, prompts=24, samples=4, max_new_tokens=6, epochs=2, lr=3e-3)
    made = ran(config, 10, algorithm=GroupMean(), reference=False)
    scores = made.metric("rlhf/score_mean")
    assert scores[0] < 0.5
    assert scores[-1] > scores[0] + 0.2, scores
    assert set(made.metric("rlhf/others_mean")) == {3.0}
    assert "rlhf/kl" not in made.reports[0].metrics


# --- state ---


@pytest.mark.heavy
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(staleness):
    config = replace(WITH_REWARD_MODEL, max_staleness=staleness, kl_target=0.5, kl_horizon=24, prompts=6)
    config = replace(config, rewards=config.rewards | FAILING, max_failed_fraction=0.9)
    whole = toy(config, 5, reward_model=True)
    saved = saving(whole)
    end = whole.run()
    assert [int(report.rollouts.version_B[0]) for report in whole.reports] == [max(0, i - staleness) for i in range(5)]
    assert sum(whole.metric("rlhf/failed_starts")) > 0
    assert whole.metric("rollout/staleness") == [min(i, staleness) for i in range(5)]
    for stopped in (1, 3):
        resumed = toy(config, 5, reward_model=True)
        assert replace(run_from(resumed, saved[stopped]), pending={}) == replace(end, pending={})
        assert_ends_alike(resumed, whole, saved, stopped)


@pytest.mark.heavy
def test_stale_rollouts_are_weighed_by_how_likely_the_trainer_finds_them():
    stale = ran(replace(SHORT, max_staleness=1, lr=1e-2), 3)
    assert max(stale.metric("rollout/logprob_gap")[1:]) > 0.01
    unweighed = ran(replace(SHORT, max_staleness=1, lr=1e-2, importance_cap=0.0), 3)
    assert stale.metric("rlhf/policy_loss")[0] == pytest.approx(unweighed.metric("rlhf/policy_loss")[0], abs=1e-6)
    assert stale.metric("rlhf/policy_loss")[1] != pytest.approx(unweighed.metric("rlhf/policy_loss")[1], abs=1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "gspo"])
def test_the_divergence_of_a_policy_that_has_moved_is_not_paid_for(algorithm):
    """Finds a KL that falls below 0 where the reference drew the tokens, be it for want of `importance_cap` or because
    the importance of whole completions weighs their tokens."""
    config = RlhfConfig(
        algorithm=algorithm,
        prompts=24,
        samples=4,
        max_new_tokens=8,
        max_staleness=1,
        epochs=2,
        lr=1e-2,
        kl_coefficient=0.1,
        rewards=SHORT.rewards,
    )
    stale = ran(config, 2)
    unweighed = ran(replace(config, importance_cap=0.0), 2)
    assert stale.metric("rlhf/kl")[0] == unweighed.metric("rlhf/kl")[0]
    # Both runs have the same policy then, but for the rounding of fresh importance.
    assert stale.metric("rlhf/kl")[1] == pytest.approx(unweighed.metric("rlhf/kl")[1], rel=1e-2)
    assert stale.metric("rlhf/kl")[1] > 0.01


def test_a_stop_is_obeyed_after_an_iteration_whose_state_is_saved():
    stop = StopRequest()
    made = toy(SHORT, 5, stop=stop, alive=lambda: setattr(stop, "requested", True))
    state = made.run()
    assert state.iteration == 1
    assert made.saved == [state]


@pytest.mark.heavy
def test_the_best_iteration_is_remembered():
    made = ran(SHORT, 4, save_every=2)
    rewards = made.metric("rlhf/reward_mean")
    assert [state.iteration for state in made.saved] == [2, 4]
    assert made.saved[-1].best_reward == max(rewards)
    assert made.saved[-1].best_iteration == rewards.index(max(rewards)) + 1


def test_a_reward_model_alone_is_a_reward() -> None:
    """Without any rule there are scores of none, for as many rollouts."""
    config = replace(SHORT, rewards={"model": RewardPartConfig(kind="reward_model")})
    made = ran(config, 2, reward_model=True)
    assert len(made.reports) == 2
