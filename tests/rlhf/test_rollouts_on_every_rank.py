"""The first rank's rollouts on every rank, with and without memory that ranks share."""

import time
from dataclasses import replace

import numpy as np
import psutil
import pytest

from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import all_gather
from dist_lm.parallel.node_memory import HAS_SHARED_MEMORY, NodeMemory
from dist_lm.rlhf.controller import on_every_rank
from dist_lm.rlhf.rollouts import ScoredRollouts, rollouts_of
from dist_lm.rlhf.schedule import Drawn
from tests.rlhf.toy import rollouts_with

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not HAS_SHARED_MEMORY, reason="needs Linux"),
]

ROLLOUTS = rollouts_with([2, 3], [1, 4])
SCORES = [0.25, -1.0]


def received(world: World, denied: int) -> list:
    """Returns the tokens and scores that each rank has received, where rank `denied` may open no memory of others."""

    def refuses(place: object) -> NodeMemory:
        raise PermissionError(13, "Permission denied")

    n_before = psutil.Process().num_fds()
    drawn = Drawn(ScoredRollouts(ROLLOUTS, {"a": np.array(SCORES)}), 1.0, 0.5) if world.is_first else None
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == denied:
            patch.setattr(NodeMemory, "opened", refuses)
        scored = on_every_rank(drawn, replace(world, local_rank=world.rank)).scored

    pair = (scored.rollouts.tokens_N.tolist(), scored.scores["a"].tolist())
    del scored
    assert psutil.Process().num_fds() <= n_before
    return all_gather(pair, tuple[list[int], list[float]])


@pytest.mark.parametrize("denied", [-1, 2])
def test_every_rank_gets_the_rollouts_even_if_one_may_not_open_the_memory_of_another(ranks, denied):
    """Finds ranks that wait forever for one that `/proc` denies the memory of another, and memory that stays open."""
    assert ranks.run(4, received, denied) == [(ROLLOUTS.tokens_N.tolist(), SCORES)] * 4


@pytest.mark.bars
def test_a_large_iteration_costs_little_more_than_its_bytes(capsys):
    """Finds a copy of the rollouts beside the one that ranks share; prints what they cost the first rank.

    256 prompts, 16 completions each, of 1,024 tokens.
    """
    prompts, samples, length = 256, 16, 1024
    draw = np.random.default_rng(0)
    tokens = draw.integers(300, 40_000, (prompts * samples, length)).tolist()
    logprobs = (-draw.random((prompts * samples, length))).tolist()
    params = SamplingParams(max_new_tokens=length, temperature=1.0)
    requests = [Request(str(number), list(range(300, 428)), params, 0, samples) for number in range(prompts)]
    answers = [
        Answer(str(i // samples), i % samples, 128, tuple(tokens[i]), "", tuple(logprobs[i]), (), "length", 0, 0)
        for i in range(prompts * samples)
    ]

    began = time.process_time()
    rollouts = rollouts_of(requests, answers)
    packed = time.process_time()
    memory = NodeMemory.of(Drawn(ScoredRollouts(rollouts, {"a": np.zeros(len(rollouts))}), 0.0, 0.0))
    written = time.process_time()
    read = memory.read(Drawn).scored.rollouts
    mapped = time.process_time()
    with capsys.disabled():
        print(
            f"\nCPU seconds: arrays {packed - began:.3f}, {memory.size:,} bytes written {written - packed:.3f}", end=""
        )
        print(f", mapped {mapped - written:.3f}")

    assert np.array_equal(read.tokens_N, rollouts.tokens_N)
    assert np.array_equal(read.logprobs_M, rollouts.logprobs_M)
    n_bytes = sum(value.nbytes for value in vars(rollouts).values() if isinstance(value, np.ndarray))
    assert memory.size < 1.01 * n_bytes
