"""Reward models trained on rankings with known utilities: `python -m dist_lm.bench.reward_learning`.

Completions are random tokens; the utility of a completion is the sum of hidden weights of its tokens. A training
ranking is the order of utility plus Gumbel noise, exactly the assumption of the Plackett-Luce model (Yellott 1977).
Held-out rankings have no noise: Kendall's tau is measured against the true order.

The same rankings are learned in three ways: whole, by K - 1 pairs drawn from each, and by one pair from each. Model,
initial weights, batches and steps are the same. Each training prints one JSON line.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dist_lm.config.root import Config
from dist_lm.data.rankings.shards import MappedRankings
from dist_lm.data.rankings.stream import Lessons, RankingBatches, RankingStream
from dist_lm.data.shard_writer import ShardWriter, write_manifest
from dist_lm.document import TokenizedDocument, Verdict
from dist_lm.launcher.compose import compose_config
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.reward_model import beside_verdicts, choices_of_people, reward_metrics, scores_of_rankings
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from dist_lm.training.step import accumulate_gradients, update

WAYS = ("rankings", "pairs", "one_pair")
SETTINGS = (
    "stage=reward",
    "model=nano",
    "model.vocab_size=512",  # the texts use VOCABULARY of them
    "tracking=none",
    "parallel.compute_dtype=fp32",
    "stage.seq_len=256",
    "stage.global_batch=8",
    "stage.warmup_steps=20",
    "stage.lr=2e-3",
)
VOCABULARY = 48  # token ids of the texts, from 1
LENGTH = 6  # tokens of a completion
SCALE = 2.0  # standard deviation of a utility; that of the noise is 1.28
FEWEST, MOST = 2, 8  # completions
HELD_OUT = 200


def made_rankings(count: int, seed: int, noisy: bool, weight_V: np.ndarray) -> list[TokenizedDocument]:
    """Rankings of 2 to 8 completions of `LENGTH` tokens, after prompts of 2 to 5 tokens."""
    draw = np.random.default_rng([seed, int(noisy)])
    made = []
    for number in range(count):
        k = int(draw.integers(FEWEST, MOST + 1))
        prompt = draw.integers(1, VOCABULARY + 1, draw.integers(2, 6))
        completions = [draw.integers(1, VOCABULARY + 1, LENGTH) for _ in range(k)]
        utility_K = np.array([weight_V[tokens].sum() for tokens in completions])
        noise_K = draw.gumbel(size=k)
        order = np.argsort(-(utility_K + noise_K) if noisy else -utility_K)
        tokens = np.concatenate([prompt, *completions]).astype(np.uint16)
        branch = np.repeat(np.arange(k + 1), [len(prompt), *map(len, completions)]).astype(np.uint8)
        verdict = Verdict(
            branch, np.argsort(order).astype(np.uint8), np.zeros((0, 2), np.uint8), np.zeros(0, np.float32)
        )
        mask = (branch > 0).astype(np.uint8)
        made.append(TokenizedDocument(tokens, len(tokens), "made", f"made:{number}", "none", mask, verdict))
    return made


def write_corpus(directory: Path, count: int, seed: int) -> None:
    """Shards of `count` noisy rankings in train and `HELD_OUT` true ones in val."""
    # a sum of LENGTH of them has standard deviation SCALE
    weight_V = np.random.default_rng([seed, 9]).normal(0, SCALE / np.sqrt(LENGTH), VOCABULARY + 1)
    for split, noisy, n in (("train", True, count), ("val", False, HELD_OUT)):
        with ShardWriter(directory, split, documents_per_member=256, shard_tokens=1_000_000) as writer:
            for document in made_rankings(n, seed, noisy, weight_V):
                writer.write(document)
    write_manifest(directory, tokenizer_sha256="0" * 64, corpus_fingerprint="0" * 64, ingest={})


def train(config: Config, directory: Path, learn_from: str, steps: int) -> dict[str, float]:
    """Metrics on val after `steps` steps on train. One process, with a process group."""
    stage, seed = config.stage, config.seed
    train_split, val = (MappedRankings.open(directory, split) for split in ("train", "val"))
    model = Transformer(config.model)
    initialise(model, seed)
    optimizer = build_optimizer(model, stage)
    batch: dict[str, Any] = {
        "seq_len": stage.seq_len,
        "micro_batch": stage.global_batch,
        "dp_rank": 0,
        "dp_size": 1,
        "pad_id": 0,
    }
    lessons = Lessons(learn_from, 0.0, seed)
    with RankingStream(train_split, lessons, seed=seed, global_batch=stage.global_batch, **batch) as stream:
        for step in range(steps):
            rate = learning_rate(
                step, peak=stage.lr, warmup_steps=stage.warmup_steps, steps=steps, min_ratio=stage.min_lr_ratio
            )
            set_learning_rate(optimizer, rate)
            sums = accumulate_gradients(model, choices_of_people, next(stream).micro_batches)
            update(model, optimizer, sums, grad_clip=stage.grad_clip, counts=True, stop=StopRequest())
    scores = scores_of_rankings(model, RankingBatches.of(val, **batch), torch.device("cpu"), None)
    return reward_metrics(beside_verdicts(val, scores))


def compare(seeds: Sequence[int], ways: Sequence[str], rankings: int, steps: int) -> dict[tuple[int, str], float]:
    """Kendall's tau on held-out rankings by seed and way; prints a JSON line with all metrics per training."""
    taus = {}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for seed in seeds:
            with tempfile.TemporaryDirectory(prefix="dlm-rankings-") as directory:
                write_corpus(Path(directory), rankings, seed)
                for way in ways:
                    started = time.perf_counter()
                    metrics = train(compose_config([*SETTINGS, f"seed={seed}"]), Path(directory), way, steps)
                    taus[seed, way] = metrics["reward/kendall_tau"]
                    line = {"seed": seed, "learn_from": way, "seconds": time.perf_counter() - started}
                    print(json.dumps(line | metrics), flush=True)
    finally:
        dist.destroy_process_group()
    return taus


def main() -> None:
    """Compare the ways on the seeds of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rankings", type=int, default=6000, help="number of training rankings")
    parser.add_argument("--steps", type=int, default=300)
    chosen = parser.parse_args()
    compare(chosen.seeds, chosen.ways, chosen.rankings, chosen.steps)


if __name__ == "__main__":
    main()
