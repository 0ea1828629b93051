"""PPO learns what two toys ask for."""

import time
from dataclasses import replace

import pytest

from tests.patience import patient
from tests.rlhf.toy import LENGTH, TOKENS, toy

pytestmark = pytest.mark.usefixtures("one_rank")

TOYS = {"tokens": (TOKENS, 30), "length": (LENGTH, 40)}  # with iterations
LAST = 5  # iterations whose mean counts


@pytest.mark.heavy
def test_scores_rise_within_a_few_iterations():
    made = toy(TOKENS, 8)
    made.run()
    scores = made.metric("rlhf/score_mean")
    assert scores[0] < 0.4
    assert scores[-1] > 0.55, scores


SEEDS = [pytest.param(0, marks=pytest.mark.heavy), *(pytest.param(s, marks=pytest.mark.bars) for s in (1, 2))]


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.bars), 1])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["tokens", pytest.param("length", marks=pytest.mark.bars)])
def test_a_toy_is_learned(name: str, seed: int, staleness: int):
    config, iterations = TOYS[name]
    made = toy(replace(config, max_staleness=staleness), iterations, seed=seed)
    started = time.process_time()
    made.run()
    seconds = time.process_time() - started
    scores = made.metric("rlhf/score_mean")
    reached = next((i for i, score in enumerate(scores) if score > 0.85), None)
    print(f"{name} seed {seed} staleness {staleness}: {scores[0]:.3f} -> {sum(scores[-LAST:]) / LAST:.3f}, "
          f"0.85 at iteration {reached}, {seconds:.1f} s")  # fmt: skip
    assert scores[0] < 0.5
    assert sum(scores[-LAST:]) / LAST > 0.85
    assert seconds < patient(60)
