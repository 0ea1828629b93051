"""What a run of stage rlhf begins with."""

import json
from pathlib import Path

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.rlhf.reward_model import RewardScale
from dist_lm.rlhf.state import KlController
from dist_lm.stages.rlhf.config import RlhfRunGroup
from dist_lm.stages.rlhf.models import first_state
from dist_lm.storage.run_directory import RunDirectory

MODEL = RewardPartConfig(kind="reward_model")
RULE = RewardPartConfig(kind="length", target=8)


@pytest.fixture
def reward(tmp_path: Path) -> RunDirectory:
    """A finished run of stage reward, as far as others read it."""
    run = RunDirectory(tmp_path)
    run.result.write_text(json.dumps({"normaliser": {"mean": 2.0, "std": 4.0}}))
    return run


def rlhf_settings(reward: RunDirectory, **changes) -> RlhfRunGroup:
    return RlhfRunGroup(**{"reward_model": str(reward.path), "rewards": {"a": MODEL, "b": RULE}} | changes)


def test_scores_are_scaled_by_what_stage_reward_measured(reward):
    scale = first_state(rlhf_settings(reward)).reward_scale
    assert scale == RewardScale(2.0, 4.0)


def test_there_is_no_scale_where_none_is_asked_for(reward):
    assert first_state(rlhf_settings(reward, normalise_reward=False)).reward_scale is None
    assert first_state(rlhf_settings(reward, rewards={"b": RULE})).reward_scale is None


def test_a_reward_model_that_is_not_finished_is_refused(reward):
    reward.result.unlink()
    with pytest.raises(ArtefactError, match="run stage=reward to its end"):
        first_state(rlhf_settings(reward))


def test_the_kl_controller_is_that_of_the_configuration(reward):
    made = rlhf_settings(reward, kl_coefficient=0.3, kl_target=5.0, kl_horizon=77)
    assert first_state(made).kl == KlController(0.3, 5.0, 77)
