"""One rate for every width: the best rate at 128, 256 and 512 wide is the same, with `model.base_width`.

Models of two layers read the bytes of modules of the standard library once; a loss is the mean over the last steps, on
text not seen before, and over three seeds: initial values alone move the best rate at 128 wide by a factor of 1.5.
"""

import argparse
import inspect
import math
import typing
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.config.model import ModelConfig
from dist_lm.config.stage import MuonConfig, StageConfig
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.training.optimizer import build_optimizer, set_learning_rate, stage_rate

pytestmark = [pytest.mark.bars, pytest.mark.timeout(7200)]

WIDTHS, BASE_WIDTH = (128, 256, 512), 128
STEPS, BATCH, SEQ_LEN, LAST = 60, 8, 64, 15
OPTIMIZERS = {"AdamW": (2**-9, None), "Muon": (2**-6.25, MuonConfig(lr=None, scale="adamw"))}
"""By name: a rate near the best one at the base width, and Muon."""
GRID = (-1.5, -0.5, 0.5, 1.5)  # powers of 2 of that rate
SEEDS = (0, 1, 2)  # of initial values


@cache
def text_TB() -> torch.Tensor:
    """Bytes, (steps, sequences, tokens + 1)."""
    source = "".join(inspect.getsource(module) for module in (typing, argparse, inspect)).encode()
    size = STEPS * BATCH * (SEQ_LEN + 1)
    assert len(source) >= size
    rows = torch.from_numpy(np.frombuffer(source[:size], np.uint8).astype(np.int64)).view(-1, SEQ_LEN + 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order].view(STEPS, BATCH, SEQ_LEN + 1)


def loss_of(width: int, rate: float, muon: MuonConfig | None, base_width: int | None, seed: int) -> float:
    """Mean loss of the last steps."""
    config = ModelConfig(
        name="w",
        d_model=width,
        n_layers=2,
        n_heads=width // 32,
        d_ff=4 * width,
        max_seq_len=SEQ_LEN,
        vocab_size=256,
        norm="rmsnorm",
        bias=False,
        init_std=0.05,
        base_width=base_width,
    )
    model = Transformer(config)
    initialise(model, seed)
    stage = StageConfig(
        name="w", lr=rate, steps=STEPS, warmup_steps=6, schedule="wsd", decay_steps=20, weight_decay=0.0
    )
    optimizer = build_optimizer(model, stage, muon)
    losses = []
    for step, tokens in enumerate(text_TB()):
        set_learning_rate(optimizer, stage_rate(stage, step))
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses[-LAST:]))


@cache
def best_rate(width: int, name: str, base_width: int | None) -> float:
    """The lowest point of a parabola through the lowest three of the grid, in the logarithm of the rate."""
    near, muon = OPTIMIZERS[name]
    losses = [
        float(np.mean([loss_of(width, near * 2.0**power, muon, base_width, seed) for seed in SEEDS])) for power in GRID
    ]
    middle = min(max(int(np.argmin(losses)), 1), len(GRID) - 2)
    a, b, _ = np.polyfit(GRID[middle - 1 : middle + 2], losses[middle - 1 : middle + 2], 2)
    best = float(np.clip(-b / (2 * a), GRID[0], GRID[-1])) if a > 0 else float(GRID[int(np.argmin(losses))])
    print(f"{name}, {width} wide, base {base_width}: {np.round(losses, 3)}, best {near * 2**best:.4g}", flush=True)
    return near * 2**best


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_best_rate_is_the_same_at_every_width(name):
    best = [best_rate(width, name, BASE_WIDTH) for width in WIDTHS]
    assert max(best) / min(best) < 1.5, best


def test_without_scaling_the_best_rate_of_adamw_falls_with_width():
    narrow, wide = best_rate(BASE_WIDTH, "AdamW", BASE_WIDTH), best_rate(WIDTHS[-1], "AdamW", None)
    assert math.log2(narrow / wide) > 0.6, (narrow, wide)
