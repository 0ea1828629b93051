"""A run is the same on every layout up to rounding, and to the bit on the same one."""

from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.config.cluster import ParallelConfig
from dist_lm.data.stream import SequenceStream
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World
from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.rlhf.rollouts import EngineRollouts
from dist_lm.stages.rlhf.program import PretrainingText
from tests.parallel.ranks import RankGroups
from tests.rlhf.toy import LENGTH, MODEL, engine_of, toy, write_text

SHAPE = replace(MODEL, d_model=40, n_heads=5, d_ff=72)
CONFIG = replace(
    LENGTH,
    prompts=13,
    max_new_tokens=8,
    epochs=2,
    minibatches=2,
    micro_batch_tokens=40,
    kl_coefficient=0.05,
    lr=1e-3,
    value_lr=1e-3,
    missing_eos_penalty=1.0,
    pretrain_coefficient=0.5,
    rewards={"length": RewardPartConfig(kind="length", target=4), "model": RewardPartConfig(kind="reward_model")},
)
ITERATIONS = 2
SEQUENCES = 6  # of text an update
NEAR = 1e-5
LAYOUTS = {
    "dp 2": (2, ParallelConfig()),
    "tp 2": (2, ParallelConfig(tp=2)),
    "tp 2, sequence parallel": (2, ParallelConfig(tp=2, sp=True)),
    "2 x 2": (4, ParallelConfig(tp=2)),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("text")))


def metrics_of(
    world: World, parallel: ParallelConfig, text: str, prompts: int = CONFIG.prompts
) -> list[dict[str, float]]:
    """Of each iteration, without what a clock says; the same on all ranks, or they would not end together."""
    layout = resolve_layout(parallel, SHAPE, world.size)
    with SequenceStream(
        TokenCorpus.open(Path(text), "train"),
        seed=0,
        seq_len=16,
        global_batch=SEQUENCES,
        micro_batch=2,
        dp_rank=world.rank // layout.tp,
        dp_size=layout.dp,
    ) as stream:
        made = toy(
            replace(CONFIG, prompts=prompts),
            ITERATIONS,
            world=world,
            parallel=parallel,
            model=SHAPE,
            source=lambda: EngineRollouts(engine_of(SHAPE)),
            reward_model=True,
            stop_tokens=tuple(range(1, 9)),
            pretraining=PretrainingText(stream, SEQUENCES, world.device),
        )
        made.run()
    lines = [dict(report.metrics) for report in made.reports]
    return [{name: line[name] for name in line if "timing" not in name and "_per_s" not in name} for line in lines]


SMALL = ("dp 2",)  # tensor parallelism is in `test_online_layouts.py`, and in the others at length


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SMALL else pytest.mark.bars) for name in LAYOUTS]
)
def test_metrics_are_those_of_one_rank(ranks: RankGroups, text: str, name: str):
    size, parallel = LAYOUTS[name]
    expected = ranks.run(1, metrics_of, ParallelConfig(), text)
    found = ranks.run(size, metrics_of, parallel, text)
    assert ranks.run(size, metrics_of, parallel, text) == found
    assert all("rlhf/pretrain_loss" in line for line in found)
    for one, other in zip(found, expected, strict=True):
        assert max(one.pop("rollout/logprob_gap"), other.pop("rollout/logprob_gap")) < NEAR
        assert one == pytest.approx(other, rel=NEAR, abs=NEAR)


@pytest.mark.heavy
def test_a_rank_for_which_no_rollout_is_left_takes_part_all_the_same(ranks: RankGroups, text: str):
    expected = ranks.run(1, metrics_of, ParallelConfig(), text, 2)
    found = ranks.run(2, metrics_of, ParallelConfig(), text, 2)
    for one, other in zip(found, expected, strict=True):
        assert one["rlhf/policy_loss"] == pytest.approx(other["rlhf/policy_loss"], rel=NEAR, abs=NEAR)
