"""A policy of adapters: its own base is the reference, and gives what a separate reference gives."""

from dataclasses import replace

import pytest
import torch

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import AdaptedModelConfig
from dist_lm.config.stage import LoraConfig
from dist_lm.parallel.mesh import World
from dist_lm.parallel.values import whole_weights
from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.rlhf.models import as_reference, sent_weights
from dist_lm.rlhf.rollouts import EngineRollouts
from tests.parallel.ranks import RankGroups
from tests.rlhf.toy import LENGTH, MODEL, engine_of, toy

SHAPE = AdaptedModelConfig.of(replace(MODEL, d_model=40, n_heads=5, d_ff=72), LoraConfig(rank=4, alpha=8.0))
CONFIG = replace(
    LENGTH,
    prompts=8,
    max_new_tokens=8,
    minibatches=2,
    micro_batch_tokens=40,
    kl_coefficient=0.05,
    lr=1e-2,
    value_lr=1e-2,
    rewards={"length": RewardPartConfig(kind="length", target=4)},
)
ITERATIONS = 3


def metrics_of(
    world: World, parallel: ParallelConfig, shared: bool, shape: AdaptedModelConfig = SHAPE
) -> tuple[list[dict[str, float]], bool]:
    """Metrics of each iteration without times, and whether the base left as reference is the base (collective)."""
    made = toy(
        CONFIG,
        ITERATIONS,
        world=world,
        parallel=parallel,
        model=shape,
        source=lambda: EngineRollouts(engine_of(shape.plain)),
        stop_tokens=tuple(range(1, 9)),
    )
    models = made.learner.models
    separate = models.reference
    assert separate is not None
    if shared:
        models = replace(models, reference=models.policy.model)
        made.learner = replace(made.learner, models=models)
    made.run()
    expected = whole_weights(separate, shape, torch.float32)  # B is 0
    with as_reference(replace(models, reference=models.policy.model)):
        sent = dict(sent_weights(models.policy.model, parallel, world))
    is_base = all(torch.equal(sent[name], expected[name]) for name in sent)
    lines = [dict(report.metrics) for report in made.reports]
    kept = [{name: line[name] for name in line if "timing" not in name and "_per_s" not in name} for line in lines]
    return kept, is_base


@pytest.mark.heavy
@pytest.mark.parametrize(("size", "parallel"), [(1, {}), pytest.param(2, {"tp": 2}, marks=pytest.mark.bars)])
def test_the_base_of_the_policy_is_the_reference(size: int, parallel: dict, ranks: RankGroups):
    (alone, _), (shared, is_base) = (
        ranks.run(size, metrics_of, ParallelConfig(**parallel), shared) for shared in (False, True)
    )
    assert is_base
    assert shared[-1]["rlhf/kl"] != 0
    assert shared == alone


@pytest.mark.heavy
def test_the_base_in_four_bits_is_the_reference(ranks: RankGroups):
    """Finds engines and references that have the base before it was rounded, and a critic without a trunk."""
    pytest.importorskip("bitsandbytes")
    shape = AdaptedModelConfig.of(SHAPE.plain, replace(SHAPE.lora, load_in_4bit=True))
    (alone, _), (shared, is_base) = (
        ranks.run(1, metrics_of, ParallelConfig(), shared, shape) for shared in (False, True)
    )
    assert is_base
    assert shared[-1]["rlhf/kl"] != 0
    assert shared == alone
