"""Every off-line algorithm raises the held-out pair accuracy of its implicit reward on rankings of known utilities.

The rankings are those of test_reward_learning: random tokens whose hidden weights add up to a utility, noise in train
and none in val. The policy starts untrained, so it has no opinion.
"""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_lm.config.preference import BETAS
from dist_lm.config.root import Config
from dist_lm.data.rankings.completions import Trees
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.rankings.stream import RankingBatches, RankingStream
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.rlhf.preference import PreferenceLoss
from dist_lm.rlhf.preference_objective import held_out_metrics, preference_objective, preparation, seen_rankings
from dist_lm.rlhf.reference import split_reference
from dist_lm.stages.preference.config import settings_of
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from dist_lm.training.step import accumulate_gradients, update
from tests.bench.test_reward_learning import write_corpus

SETTINGS = (
    "stage=preference",
    "model=nano",
    "model.d_model=64",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.d_ff=256",
    "model.vocab_size=512",  # the texts use 48 of them
    "tracking=none",
    "parallel.compute_dtype=fp32",
    "stage.seq_len=256",
    "stage.global_batch=8",
    "stage.warmup_steps=10",
    "stage.lr=2e-3",
    "stage.weight_decay=0.01",
)
WORLD = World(0, 1, 0, torch.device("cpu"))
ALGORITHMS = {
    "dpo": (),
    "dpo by pairs": ("stage.preference.learn_from=pairs",),
    **{name: () for name in BETAS if name != "dpo"},
}
BEFORE, AFTER = 0.6, 0.8


def accuracies(config: Config, directory: Path, steps: int) -> tuple[float, float]:
    """Held-out pair accuracy before and after `steps` steps, ties half. One process, with a process group."""
    stage, settings = config.stage, settings_of(config)
    train, val = (RankingCorpus.open(directory, split) for split in ("train", "val"))
    model = Transformer(config.model)
    initialise(model, config.seed)
    batch = {"seq_len": stage.seq_len, "micro_batch": stage.global_batch, "dp_rank": 0, "dp_size": 1, "pad_id": 0}
    trees = Trees(None, settings.learns_text, settings.has_reference_point)
    reference = {}
    if settings.has_reference:
        for name, split in (("train", train), ("val", val)):
            batches = RankingBatches(rankings=split, assemble=trees, **batch)
            shares: list[float] = []
            reference[name] = split_reference(model, batches, WORLD, None, shares.append)
            assert shares == sorted(shares)
            assert shares[-1] == pytest.approx(1)  # each ranking fits into a sequence
    loss, optimizer = PreferenceLoss(settings), build_optimizer(model, stage)
    prepare, objective, stop = preparation(loss), preference_objective(loss), StopRequest()

    def accuracy() -> float:
        of_val = reference.get("val")
        held_out = RankingBatches(rankings=val, assemble=replace(trees, reference=of_val), **batch)
        seen, point = seen_rankings(model, held_out, WORLD.device, None)
        return held_out_metrics(loss, val, of_val, seen, point, config.seed)["preference/accuracy"]

    before, own = accuracy(), replace(trees, reference=reference.get("train"))
    with RankingStream(
        train, settings.lesson, 0.0, seed=config.seed, global_batch=stage.global_batch, assemble=own, **batch
    ) as stream:
        for step in range(steps):
            rate = learning_rate(
                step, peak=stage.lr, warmup_steps=stage.warmup_steps, steps=steps, min_ratio=stage.min_lr_ratio
            )
            set_learning_rate(optimizer, rate)
            batches = next(stream).micro_batches
            batches = prepare(model, batches) if prepare else batches
            sums = accumulate_gradients(model, objective, batches)
            update(model, optimizer, sums, grad_clip=stage.grad_clip, adds_sums=True, stop=stop)
    return before, accuracy()


def learned(directory: Path, name: str, seed: int, steps: int) -> tuple[float, float]:
    write_corpus(directory, 2000, seed)
    config = compose_config(
        [*SETTINGS, f"seed={seed}", f"stage.preference.algorithm={name.split()[0]}", *ALGORITHMS[name]]
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    started = time.process_time()
    try:
        before, after = accuracies(config, directory, steps)
    finally:
        dist.destroy_process_group()
    print(f"{name}, seed {seed}: accuracy {before:.3f} -> {after:.3f} in {time.process_time() - started:.0f} CPU s")
    return before, after


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.bars) for name in ("dpo", "kto", "orpo", "simpo")]
)
def test_it_learns_the_order(tmp_path: Path, name: str) -> None:
    before, after = learned(tmp_path, name, seed=0, steps=60)
    assert before <= BEFORE
    assert after >= AFTER


@pytest.mark.bars
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_learns_the_order_on_every_seed(tmp_path: Path, name: str, seed: int) -> None:
    before, after = learned(tmp_path, name, seed, steps=120)
    assert before <= BEFORE
    assert after >= AFTER
