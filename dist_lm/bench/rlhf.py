"""Rollouts a second that PPO takes in: our learner with its pool of Ray actors, against TRL and a bare loop.

A toy of two layers; every way draws 64 completions of 16 tokens with the policy, asks a frozen reference and a reward
model of the policy's shape, and makes four passes of updates of policy and critic. Peers are not installed by default:
one that is missing is named without a figure.

The second case: drawing beside the updates (rlhf.max_staleness=1), learner and actor on a core each, against drawing
first and updating then, where both take equally long: one pass of updates, and completions as long as that takes.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import replace

import psutil
import torch

from dist_lm.bench.case import Case, Comparison, CrewSize, configurations
from dist_lm.bench.rlhf_peers import BareLoop, Peer, Trl
from dist_lm.bench.rlhf_toy import (
    BALANCED_EPOCHS,
    ITERATIONS,
    PROMPTS,
    ToyPpo,
    balanced_tokens,
    made_up_prompts,
    with_length,
)
from dist_lm.bench.trial import Trial
from dist_lm.cluster.pool import Pool, PoolRollouts
from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.cluster.ray_cluster import connect
from dist_lm.config.cluster import ClusterConfig
from dist_lm.config.root import Config
from dist_lm.parallel.mesh import World

OURS, ONE_PROCESS = "our learner and pool", "the same in one process"
TOGETHER, IN_TURNS = "drawing beside updates", "drawing, then updates"
PEERS: dict[str, type[Peer]] = {"TRL": Trl, "bare loop over transformers": BareLoop}
SHAPE = (
    *("model=nano", "model.d_model=64", "model.n_layers=2", "model.n_heads=4", "model.d_ff=256"),
    *("model.max_seq_len=128", "model.tie_embeddings=false", "model.init_std=0.05", "model.qk_norm=false"),
    *(f"stage.global_batch={PROMPTS}", "stage.seq_len=16"),
)
VOCABULARY = 64  # fewer than a tokenizer may have: there is none here
THREADS = 2
ROUNDS = 7
SAMPLES = "samples/s"


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Against peers, then drawing beside updates; with overrides the first one with another model or batch."""
    config = configurations([(*SHAPE, *overrides)], (), quick)[0]
    found = [peers_case(config)]
    return found if overrides or quick else [*found, staleness_case(config)]


def peers_case(config: Config) -> Case:
    """Every way on two threads, in turns."""
    crew = CrewSize(1, THREADS)
    absent = {name: reason for name, peer in PEERS.items() if (reason := _why_not(peer))}
    model, stage = config.model, config.stage
    return Case(
        name=f"PPO, {model.d_model} x {model.n_layers} layers, {stage.global_batch} x {stage.seq_len} new tokens",
        config=config,
        ways=dict.fromkeys([OURS, ONE_PROCESS, *(name for name in PEERS if name not in absent)], crew),
        comparisons=[
            Comparison(
                own=OURS,
                peer=None if name in absent else name,
                peer_name=f"{name}: {absent[name]}" if name in absent else name,
                ceiling=ONE_PROCESS,
            )
            for name in PEERS
        ],
        same_losses=frozenset(),
        rounds=ROUNDS,
        amount=ITERATIONS * stage.global_batch,
        unit=SAMPLES,
    )


def staleness_case(config: Config) -> Case:
    """A core for the learner, a core for the actor."""
    crew = CrewSize(1, 1)
    return Case(
        name="drawing and updates of equal length, a core each",
        config=config,
        ways={TOGETHER: crew, IN_TURNS: crew},
        comparisons=[
            Comparison(own=TOGETHER, peer=IN_TURNS),
            Comparison(own=IN_TURNS, peer_name="-", fact="drawing share_of_time"),
        ],
        same_losses=frozenset(),
        rounds=ROUNDS,
        amount=ITERATIONS * config.stage.global_batch,
        unit=SAMPLES,
    )


def _why_not(peer: type[Peer]) -> str | None:
    missing = [package for package in peer.packages if not importlib.util.find_spec(package)]
    return f"{', '.join(missing)} not installed" if missing else None


class Worker:
    """What the ways of one process share: a pool of one actor, and the length of completions that balances them."""

    def __init__(self) -> None:
        self._ends_with_process = ExitStack()
        self._source: PoolRollouts | None = None
        self._new_tokens = 0

    def source(self, config: Config) -> PoolRollouts:
        """The pool, started at first use; its actor has as many threads as this process."""
        if self._source is None:
            keep = self._ends_with_process.enter_context
            cluster = keep(connect(ClusterConfig(name="local", connect_timeout_s=120.0)))
            spec = EngineSpec(config.model, ToyPpo.options(config), eot_id=0)
            self._source = PoolRollouts(keep(Pool.start(cluster, spec, ToyPpo.weights(config), actors=1)))
        return self._source

    def balanced(self, config: Config, world: World) -> Config:
        """`config` with completions of a length with which drawing and updating take equally long, a core each."""
        source = self.source(config)
        if not self._new_tokens:
            _pin(source)
            self._new_tokens = balanced_tokens(config, world, source)
        return with_length(config, self._new_tokens)


WORKER = Worker()  # of this process: it builds all ways that have its size


def build(way: str, config: Config, world: World) -> Trial:
    """One way of doing some iterations, in one process."""
    config = copy(config)  # `replace` would hold it to a tokenizer
    config.model = replace(config.model, vocab_size=VOCABULARY)
    if way in PEERS:
        peer = PEERS[way](config, made_up_prompts(config))
        return Trial(peer.run, losses=list)
    if way == ONE_PROCESS:
        toy = ToyPpo(config, world, None)
        return Trial(toy.run, losses=list)
    if way == OURS:
        toy = ToyPpo(config, world, WORKER.source(config))
        return Trial(toy.run, losses=list)
    own = WORKER.balanced(config, world)
    toy = ToyPpo(own, world, WORKER.source(config), staleness=int(way == TOGETHER), epochs=BALANCED_EPOCHS)
    return Trial(toy.run, facts=_share_of(toy), losses=list)


def _pin(source: PoolRollouts) -> None:
    """This process on the first of its cores, the actor on the last."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) > 1:
        (member,) = source.pool.members
        psutil.Process(member.pid).cpu_affinity([cores[-1]])
        psutil.Process().cpu_affinity([cores[0]])
        torch.set_num_threads(1)


def _share_of(toy: ToyPpo) -> Callable[[], dict[str, float]]:
    def facts() -> dict[str, float]:
        toy.run()
        return {"drawing share_of_time": toy.drawing_s / toy.iteration_s}

    return facts
