"""Each on-line algorithm gives the same losses, metrics and gradients, however rollouts are cut and on any layout, with
and without filters of sampling."""

from dataclasses import replace

import pytest
import torch

from dist_lm.config.cluster import ParallelConfig
from dist_lm.parallel.mesh import World
from dist_lm.rlhf.algorithms.registry import ALGORITHMS
from dist_lm.rlhf.config import RewardPartConfig, RlhfConfig
from dist_lm.rlhf.rollouts import EngineRollouts
from tests.parallel.ranks import RankGroups
from tests.rlhf.toy import MODEL, engine_of, toy, weights_of

pytestmark = pytest.mark.heavy  # several processes

SHAPE = replace(MODEL, d_model=40, n_heads=5, d_ff=72)
SETS = " of sets"
OF_SETS = [f"{name}{SETS}" for name in ALGORITHMS if name != "ppo"]
ONLINE = [*(name for name in ALGORITHMS if name != "ppo"), *OF_SETS]
NEAR = 1e-5
LARGE = 1e6
OWN = {"gspo": {"clip": 1e-3, "clip_high": 2e-3}}
WHOLE = 8192  # tokens of a micro-batch: all rollouts in one
Found = dict[str, tuple[list[dict[str, float]], dict[str, torch.Tensor]]]


def config_of(name: str, micro_batch_tokens: int) -> RlhfConfig:
    """With a learning rate and an epsilon of Adam that make an update the gradient itself."""
    algorithm = name.removesuffix(SETS)
    filters = {"top_k": 20, "top_p": 0.8, "temperature": 0.5} if name.endswith(SETS) else {}
    return RlhfConfig(
        algorithm=algorithm,
        prompts=5,
        samples=3,
        max_new_tokens=8,
        epochs=2,
        micro_batch_tokens=micro_batch_tokens,
        lr=0.1 * LARGE,
        adam_eps=LARGE,
        beta1=0.0,
        grad_clip=0.0,
        kl_coefficient=0.05,
        rewards={"length": RewardPartConfig(kind="length", target=4)},
        **OWN.get(algorithm, {}),
        **filters,
    )


def trained(world: World, parallel: ParallelConfig, algorithms: list[str], micro_batch_tokens: int) -> Found:
    """Metrics of each update and of the iteration, and the weights after it, of each algorithm."""
    found = {}
    for name in algorithms:
        made = toy(
            config_of(name, micro_batch_tokens),
            1,
            world=world,
            parallel=parallel,
            model=SHAPE,
            source=lambda: EngineRollouts(engine_of(SHAPE)),
            stop_tokens=tuple(range(1, 9)),
        )
        made.run()
        report = made.reports[0]
        metrics = {
            key: value for key, value in report.metrics.items() if "timing" not in key and "_per_s" not in key
        } | {"rollout/logprob_gap": 0.0}
        found[name] = ([*map(dict, report.updates), metrics], weights_of(made))
    return found


@pytest.fixture(scope="module")
def expected(ranks: RankGroups) -> Found:
    return ranks.run(1, trained, ParallelConfig(), ONLINE, WHOLE)


def assert_same(found: Found, expected: Found) -> None:
    for name, (metrics, weights) in found.items():
        for one, other in zip(metrics, expected[name][0], strict=True):
            assert one == pytest.approx(other, rel=NEAR, abs=NEAR), name
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[name][1][key], rtol=NEAR, atol=NEAR, msg=f"{name} {key}")


@pytest.mark.parametrize("micro_batch_tokens", [64, 30], ids=["2 micro-batches", "4 and more"])
def test_micro_batches_change_nothing(ranks: RankGroups, expected: Found, micro_batch_tokens: int):
    assert_same(ranks.run(1, trained, ParallelConfig(), ONLINE, micro_batch_tokens), expected)
    for name, (metrics, _) in expected.items():
        first, second, whole = metrics
        assert first["ratio_mean"] == pytest.approx(1, abs=1e-6), name
        assert abs(second["ratio_mean"] - 1) > 1e-6 or second["approx_kl"] > 1e-9, name
        assert whole["rlhf/groups_without_signal"] < 1


@pytest.mark.bars  # `test_layouts.py` has two data ranks
def test_two_ranks_change_nothing(ranks: RankGroups, expected: Found):
    assert_same(ranks.run(2, trained, ParallelConfig(), ONLINE, 30), expected)


@pytest.mark.bars  # `tests/parallel` cuts every model by tp
def test_tensor_parallelism_changes_nothing(ranks: RankGroups, expected: Found):
    assert_same(ranks.run(2, trained, ParallelConfig(tp=2), ["grpo", "gspo", *OF_SETS], 30), expected)
