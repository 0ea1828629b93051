"""Each on-line algorithm without a critic learns what two toys ask for, with its own rate and clip."""

import time
from dataclasses import replace

import pytest

from dist_lm.rlhf.algorithms.registry import ALGORITHMS
from dist_lm.rlhf.config import RlhfConfig
from tests.rlhf.toy import LENGTH, TOKENS, toy

pytestmark = pytest.mark.usefixtures("one_rank")

TOYS = {"tokens": (TOKENS, 20), "length": (LENGTH, 30)}  # with iterations
OWN = {
    "grpo": {"epochs": 4},
    "dr_grpo": {"epochs": 4},
    "rloo": {"epochs": 2, "clip": 0.5},  # of whole completions
    "reinforce_pp": {"epochs": 4, "samples": 8},
    "dapo": {"epochs": 4, "overlong_tokens": 0, "missing_eos_penalty": None},
    "gspo": {"epochs": 4, "clip": 0.05, "clip_high": 0.08},  # completions are short
}
AT_ONCE = ("grpo", "gspo")  # by tokens and by whole completions; `test_online_layouts.py` has the losses of all
RATE = 2e-3
LAST = 5  # iterations whose mean counts
SEEDS = [pytest.param(0, marks=pytest.mark.heavy), *(pytest.param(s, marks=pytest.mark.bars) for s in (1, 2))]


def config_of(algorithm: str, task: RlhfConfig) -> RlhfConfig:
    """The task of a toy, with 8 groups of 8 rollouts."""
    shared = {"missing_eos_penalty": 0.0, **OWN[algorithm]}
    return RlhfConfig(
        algorithm=algorithm,
        prompts=8,
        max_new_tokens=task.max_new_tokens,
        ignore_eot=task.ignore_eot,
        rewards=task.rewards,
        kl_coefficient=0.0,
        lr=RATE,
        **({"samples": 8} | shared),
    )


def test_every_algorithm_has_its_setting():
    assert set(OWN) == {*ALGORITHMS} - {"ppo"}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.bars if i else ()) for i, n in enumerate(TOYS)])
@pytest.mark.parametrize(
    "algorithm", [pytest.param(name, marks=() if name in AT_ONCE else pytest.mark.bars) for name in OWN]
)
def test_a_toy_is_learned(algorithm: str, name: str, seed: int):
    learns(algorithm, name, seed)


@pytest.mark.bars
@pytest.mark.parametrize("own", [{"max_staleness": 1}, {"top_k": 40, "top_p": 0.95}], ids=["older weights", "sets"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("algorithm", OWN)
def test_a_toy_is_learned_from_other_rollouts(algorithm: str, name: str, seed: int, own: dict):
    learns(algorithm, name, seed, **own)


def learns(algorithm: str, name: str, seed: int, **own) -> None:
    """From below 0.5 to above 0.85."""
    task, iterations = TOYS[name]
    made = toy(replace(config_of(algorithm, task), **own), iterations, seed=seed)
    started = time.process_time()
    made.run()
    scores = made.metric("rlhf/score_mean")
    last = sum(scores[-LAST:]) / LAST
    print(
        f"{algorithm}, {name}, seed {seed}, {own}: {scores[0]:.3f} -> {last:.3f}, {time.process_time() - started:.1f} s"
    )
    assert scores[0] < 0.5
    assert last > 0.85
