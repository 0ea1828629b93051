"""Bounds of the conf group `rlhf`."""

import math

import pytest

from dist_lm.errors import ConfigError
from dist_lm.rlhf.config import RewardPartConfig, RlhfConfig


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"lr": math.inf}, "rlhf.lr=inf: expected a positive number"),
        ({"clip": math.nan}, "rlhf.clip=nan: expected a positive number"),
        ({"kl_coefficient": math.nan}, "rlhf.kl_coefficient=nan: expected 0 or a positive number"),
        ({"kl_target": math.inf}, "rlhf.kl_target=inf: expected a positive number, or null"),
        (
            {"kl_target": 5.0, "kl_coefficient": 0.0},
            "rlhf.kl_coefficient=0.0: expected a positive number to begin with",
        ),
        (
            {"rewards": {"mine": RewardPartConfig(kind="length", target=3, weight=math.nan)}},
            "rlhf.rewards.mine.weight=nan: expected a number within the range of fp32",
        ),
        (
            {"rewards": {"mine": RewardPartConfig(kind="length", target=3, weight=-1e39)}},
            "rlhf.rewards.mine.weight=-1e+39: expected a number within the range of fp32",
        ),
        (
            {"rewards": {name: RewardPartConfig(kind="length", target=3, weight=2e38) for name in "ab"}},
            "rlhf.rewards={'a': 2e+38, 'b': 2e+38}: expected weights whose sum",
        ),
        ({"minibatches": 5, "prompts": 2}, "rlhf.minibatches=5: expected at most the 2 rollouts"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_its_key(values: dict, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RlhfConfig(**values)
    assert str(refused.value).startswith(named)
