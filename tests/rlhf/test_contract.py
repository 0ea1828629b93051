"""What the learner owes every algorithm: keys, counts, groups, and no critic where there is none."""

from dataclasses import replace

import pytest
import torch

from dist_lm.dry_run.iterations import rlhf_memory
from dist_lm.errors import ConfigError
from dist_lm.parallel.layout import Layout
from dist_lm.prepare.compose import compose_config
from dist_lm.rlhf.algorithms.registry import ALGORITHMS
from dist_lm.rlhf.config import DEFAULTS, RewardPartConfig, RlhfConfig
from dist_lm.rlhf.policy_gradient import groups_of
from dist_lm.stages.rlhf.config import rlhf_config
from tests.rlhf.toy import GroupMean, toy

PARTS = {"length": RewardPartConfig(kind="length", target=4)}
GROUPS = RlhfConfig(
    algorithm="grpo",
    prompts=6,
    samples=4,
    max_new_tokens=8,
    epochs=2,
    minibatches=2,
    lr=1e-3,
    rewards=PARTS,
)
STOPS = tuple(range(1, 9))


# --- keys ---


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_key_that_an_algorithm_does_not_read_is_null_and_refused_by_name(algorithm: str):
    config = RlhfConfig(algorithm=algorithm)
    for key in {key for keys in DEFAULTS.values() for key in keys}:
        if key in DEFAULTS[algorithm]:
            assert getattr(config, key) == DEFAULTS[algorithm][key] or DEFAULTS[algorithm][key] is None, key
        else:
            assert getattr(config, key) is None
            with pytest.raises(ConfigError, match=rf"rlhf\.{key}=0\.5: expected null: rlhf\.algorithm={algorithm} "):
                RlhfConfig(algorithm=algorithm, **{key: 0.5})
    assert replace(config, lr=1e-3) == replace(RlhfConfig(algorithm=algorithm), lr=1e-3)  # filled keys are accepted


def test_ppo_has_the_values_that_it_had():
    config = RlhfConfig(lr=1e-4)
    assert (config.algorithm, config.samples, config.epochs, config.clip) == ("ppo", 1, 4, 0.2)
    assert (config.value_lr, config.kl_coefficient, config.missing_eos_penalty) == (3e-4, 0.05, 1.0)


@pytest.mark.parametrize("model", ["nano", "medium", "large"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_files_of_conf_set_no_key_that_some_algorithm_does_not_read(algorithm: str, model: str):
    settings = rlhf_config(compose_config(["stage=rlhf", f"model={model}", f"rlhf.algorithm={algorithm}"])).rlhf
    assert {key: getattr(settings, key) for key, value in DEFAULTS[algorithm].items() if value is not None} == {
        key: value for key, value in DEFAULTS[algorithm].items() if value is not None
    }


def test_a_group_of_one_is_refused_where_groups_are_compared():
    with pytest.raises(ConfigError, match=r"rlhf.samples=1: expected at least 2"):
        RlhfConfig(algorithm="grpo", samples=1)


def test_no_critic_is_planned_for_where_there_is_none():
    ppo, grpo = (
        rlhf_config(compose_config(["stage=rlhf", "model=large", "hardware=h100", f"rlhf.algorithm={name}"]))
        for name in ("ppo", "grpo")
    )
    with_critic, without = (rlhf_memory(config, Layout(1, 8, 1)) for config in (ppo, grpo))
    # Reference and reward model have no masters, so they count half: 1 + 1 with two halves, beside 1 with two halves.
    assert without.models * 3 == with_critic.models * 2
    assert without.optimizer * 2 == with_critic.optimizer
    assert (ppo.trained_models, grpo.trained_models) == (2, 1)


# --- counts ---


@pytest.mark.usefixtures("one_rank")
def test_the_loss_has_its_own_count_and_metrics_those_of_tokens():
    class Counting(GroupMean):
        """A loss of 3 for each rollout, which counts 2; 5 for each token."""

        def prepare(self, experience, kl_coefficient):
            prepared = super().prepare(experience, kl_coefficient)
            return replace(prepared, divisor_B=torch.full_like(experience.score_B, 2.0))

        def policy_loss(self, tokens):
            loss = super().policy_loss(tokens)
            rollouts = float(tokens.rollout_N.unique().numel())
            metrics = {"policy_loss": torch.tensor(3.0 * rollouts), "approx_kl": 0.0 * loss.total.detach()}
            return replace(loss, metrics={**metrics, "ratio_mean": 5.0 * loss.count})

    for tokens in (8192, 13):  # one micro-batch, and many
        made = toy(replace(GROUPS, micro_batch_tokens=tokens), 1, algorithm=Counting(), stop_tokens=STOPS)
        made.run()
        for update in made.reports[0].updates:
            assert update["policy_loss"] == pytest.approx(1.5)
            assert update["ratio_mean"] == pytest.approx(5)


# --- groups ---


def test_statistics_of_a_group_are_those_of_its_scores_and_0_where_they_are_the_same():
    score_B = torch.tensor([1.0, 0.1, 3.0, 0.1, 0.1, 7.0])
    groups = groups_of(score_B, torch.tensor([5, 9, 5, 9, 9, 11]))
    assert groups.size_B.tolist() == [2, 3, 2, 3, 3, 1]
    assert groups.mean_B.tolist() == pytest.approx([2, 0.1, 2, 0.1, 0.1, 7])
    assert groups.std_B.tolist() == pytest.approx([2**0.5, 0, 2**0.5, 0, 0, 0])
    assert groups.std_B[1] == 0


# --- no critic ---


@pytest.mark.usefixtures("one_rank")
def test_grpo_runs_without_a_critic_and_reports_its_groups():
    made = toy(GROUPS, 2, stop_tokens=STOPS)
    assert made.learner.models.critic is None
    made.run()
    for report in made.reports:
        metrics = report.metrics
        assert not [name for name in metrics if "value" in name or "return" in name]
        score = report.score_B.double().view(-1, 4)
        assert metrics["rlhf/groups_without_signal"] == pytest.approx(float((score.std(1) == 0).double().mean()))
        assert metrics["rlhf/group_std_mean"] == pytest.approx(float(score.std(1).mean()), abs=1e-6)
        assert metrics["rlhf/score_p10"] <= metrics["rlhf/score_p50"] <= metrics["rlhf/score_p90"]
        assert report.updates[0]["ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert report.updates[0]["approx_kl"] == pytest.approx(0, abs=1e-9)
        assert report.updates[1]["approx_kl"] > 1e-7
