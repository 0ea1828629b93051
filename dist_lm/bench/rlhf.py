"""Rollouts per second of PPO and GRPO: our learner with its pool of Ray actors, against TRL and a bare loop.

The model is a toy of two layers. Every variant draws 64 completions of 16 tokens, runs a frozen reference and a reward
model of the policy's shape, and makes four passes of updates of policy and critic. Peers are not installed by default;
a missing one is listed without a figure.

The GRPO cases draw eight completions for each of eight prompts, score them with a Python function, and make one or four
passes of updates without a reference model.

The next case compares generation during updates (rlhf.max_staleness=1), with a core each for learner and actor,
against generation and updates in turn. It makes one pass of updates; the share of generation is reported.

The last case pushes the weights of a model into Ray's object store, against a copy of all of them and one `ray.put`.
"""

import atexit
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import replace

import numpy as np
import torch

from dist_lm.bench.case import Case, Comparison, GroupSize, against, configurations, why_absent
from dist_lm.bench.models import initial_model
from dist_lm.bench.rank import Trial, pin, two_cores
from dist_lm.bench.rlhf_grpo import GROUP, TrlGrpo, grpo_config
from dist_lm.bench.rlhf_loops import ITERATIONS, PROMPTS, BareLoop, Peer, ToyRun, Trl, made_up_prompts, ppo_config
from dist_lm.cluster.pool import Pool, PoolRollouts
from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.cluster.pool_weights import store
from dist_lm.cluster.ray_cluster import RayCluster, connect
from dist_lm.config.cluster import ClusterConfig, ParallelConfig
from dist_lm.config.root import Config
from dist_lm.model.size import parameter_count
from dist_lm.parallel.mesh import World
from dist_lm.rlhf.models import sent_weights

OURS, ONE_PROCESS = "our learner and pool", "the same in one process"
GRPO_PASSES = (1, 4)
TRL_GRPO = "TRL's GRPOTrainer"
TOGETHER, IN_TURNS = "drawing beside updates", "drawing, then updates"
PEERS: dict[str, type[Peer]] = {"TRL": Trl, "bare loop over transformers": BareLoop}
SHAPE = (
    *("model=nano", "model.d_model=64", "model.n_layers=2", "model.n_heads=4", "model.d_ff=256"),
    *("model.max_seq_len=128", "model.tie_embeddings=false", "model.init_std=0.05", "model.qk_norm=false"),
    *(f"stage.global_batch={PROMPTS}", "stage.seq_len=16"),
)
LONGER = (*SHAPE, "stage.seq_len=48")  # drawing takes about 0.4 of an iteration of one pass
VOCABULARY = 64  # smaller than any tokenizer's; the toy has no tokenizer
THREADS = 2
ROUNDS = 7
SAMPLES, DRAWING = "samples/s", "drawing share_of_time"
PUSH, PUT = "push of weights", "memcpy and ray.put of the same bytes"
PUSHED = (*SHAPE, "model.d_model=768", "model.n_layers=12", "model.n_heads=12", "model.d_ff=3072")


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns cases of PPO and GRPO against peers, generation during updates, a push of weights; overrides, or `quick`,
    leave PPO alone, with that model.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    config = configurations([(*SHAPE, *overrides)], (), quick)[0]
    if overrides or quick:
        return [peers_case(config)]

    longer, pushed = configurations([LONGER, PUSHED], (), quick)
    grpo_cases = [grpo_case(config, passes) for passes in GRPO_PASSES]
    return [peers_case(config), *grpo_cases, staleness_case(longer), push_case(pushed)]


def peers_case(config: Config) -> Case:
    """Returns a case of PPO by every variant, on two threads; a peer that is not installed is only named."""
    size = GroupSize(1, THREADS)
    absent = {name: reason for name, peer in PEERS.items() if (reason := _why_not(peer))}
    model, stage = config.model, config.stage
    return Case(
        name=f"PPO, {model.d_model} x {model.n_layers} layers, {stage.global_batch} x {stage.seq_len} new tokens",
        config=config,
        variants=dict.fromkeys([OURS, ONE_PROCESS, *(name for name in PEERS if name not in absent)], size),
        comparisons=[against(OURS, name, absent.get(name), ONE_PROCESS) for name in PEERS],
        rounds=ROUNDS,
        amount=ITERATIONS * stage.global_batch,
        unit=SAMPLES,
    )


def of_passes(variant: str, passes: int) -> str:
    """Returns the name of a variant of a GRPO case."""
    return f"{variant}, {passes} passes" if passes > 1 else f"{variant}, 1 pass"


def grpo_case(config: Config, passes: int) -> Case:
    """Returns a case of GRPO with `passes` passes by our learner and by TRL, on two threads; TRL is only named if it is
    not installed."""
    size, absent = GroupSize(1, THREADS), _why_not(TrlGrpo)
    model, stage = config.model, config.stage
    ours, one_process, peer = (of_passes(variant, passes) for variant in (OURS, ONE_PROCESS, TRL_GRPO))
    variants = [ours, one_process]
    if not absent:
        variants.append(peer)

    return Case(
        name=f"GRPO, {model.d_model} x {model.n_layers} layers, groups of {GROUP}, "
        f"{stage.global_batch} x {stage.seq_len} new tokens",
        config=config,
        variants=dict.fromkeys(variants, size),
        comparisons=[against(ours, peer, absent, one_process)],
        rounds=ROUNDS,
        amount=ITERATIONS * stage.global_batch,
        unit=SAMPLES,
    )


def staleness_case(config: Config) -> Case:
    """Returns a case of generation during updates, against both in turn, and of the share of generation."""
    size = GroupSize(1, 1)
    return Case(
        name=f"drawing {config.stage.seq_len} new tokens beside updates, a core each",
        config=config,
        variants={TOGETHER: size, IN_TURNS: size},
        comparisons=[
            Comparison(variant=TOGETHER, peer=IN_TURNS),
            Comparison(variant=IN_TURNS, peer_name="-", fact=DRAWING),
        ],
        rounds=ROUNDS,
        amount=ITERATIONS * config.stage.global_batch,
        unit=SAMPLES,
    )


def push_case(config: Config) -> Case:
    """Returns a case of a push of one rank in fp32, until all weights are stored, against a copy and `ray.put` of as
    many bytes, in MiB a second.
    """
    size, model = GroupSize(1, THREADS), replace(config.model, vocab_size=VOCABULARY)
    mib = 4 * parameter_count(model) >> 20
    return Case(
        name=f"push of {mib} MiB, {model.d_model} x {model.n_layers} layers",
        config=config,
        variants={PUSH: size, PUT: size},
        comparisons=[Comparison(variant=PUSH, peer=PUT)],
        rounds=ROUNDS,
        amount=mib,
        unit="MiB/s",
    )


def _why_not(peer: type[Peer]) -> str | None:
    return why_absent(peer.packages, peer.modules)


class Worker:
    """Holds what the variants of one process share: a Ray cluster, and a pool of one actor."""

    def __init__(self) -> None:
        self._ends_with_process = ExitStack()
        self._source: PoolRollouts | None = None
        self._cluster: RayCluster | None = None

    def cluster(self) -> RayCluster:
        """Returns the local Ray, started on first use; it ends when this process exits.

        Raises:
            ClusterError: Ray cannot be started.
        """
        if self._cluster is None:
            local = ClusterConfig(name="local", connect_timeout_s=120.0)
            # Left to the garbage collector, it would be closed when an exiting process can no longer import.
            atexit.register(self._ends_with_process.close)
            self._cluster = self._ends_with_process.enter_context(connect(local))
        return self._cluster

    def source(self, config: Config) -> PoolRollouts:
        """Returns the pool of one actor, started on first use with the model of `config` (a later `config` is ignored);
        the actor has as many threads as this process.

        Raises:
            ClusterError, PoolFailure: Ray cannot be started, or has no place for an actor.
            UserError: as `Pool.start`.
        """
        if self._source is None:
            spec = EngineSpec(config.model, ToyRun.options(config), eot_id=0)
            pool = Pool.start(self.cluster(), spec, ToyRun.weights(config), actors=1)
            self._source = PoolRollouts(self._ends_with_process.enter_context(pool))
        return self._source


WORKER = Worker()  # one per process, because a process builds all variants of its size


def pushing(variant: str, config: Config, world: World) -> Callable[[], float]:
    """Returns a step that stores the weights of the policy once in Ray's object store, which is started now: by our
    push (PUSH), or by a copy of all and one `ray.put`.

    Raises:
        ClusterError: Ray cannot be started.
    """
    import ray

    WORKER.cluster()
    model, parallel = initial_model(config), ParallelConfig(compute_dtype="fp32")

    def push() -> float:
        store(sent_weights(model, parallel, world), config.model, torch.float32)
        return 0.0

    def put() -> float:
        ray.put({name: np.array(weight.detach().numpy()) for name, weight in model.named_parameters()})
        return 0.0

    return push if variant == PUSH else put


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant of running `ITERATIONS` iterations, in one process.

    Raises:
        ConfigError: the settings do not fit the ranks, no architecture of transformers holds the model, or this machine
            has no sandbox that a reward needs.
        ClusterError, PoolFailure: Ray cannot be started, or has no place for an actor.
    """
    # `replace` would check it against a tokenizer.
    config = copy(config)
    config.model = replace(config.model, vocab_size=VOCABULARY)

    if variant in (PUSH, PUT):
        return Trial(pushing(variant, config, world), losses=list)
    if variant in PEERS:
        peer = PEERS[variant](config, made_up_prompts(config))
        return Trial(peer.run, losses=list)
    if variant in (OURS, ONE_PROCESS):
        source = WORKER.source(config) if variant == OURS else None
        return Trial(ToyRun(config, world, source, ppo_config(config)).run, losses=list)

    for passes in GRPO_PASSES:
        if variant == of_passes(TRL_GRPO, passes):
            return Trial(TrlGrpo(config, made_up_prompts(config), passes).run, losses=list)
        if variant in (of_passes(OURS, passes), of_passes(ONE_PROCESS, passes)):
            source = WORKER.source(config) if variant == of_passes(OURS, passes) else None
            return Trial(ToyRun(config, world, source, grpo_config(config, passes)).run, losses=list)

    # Drawing beside updates gains only where both have a core of their own.
    source = WORKER.source(config)
    learner_core, actor_core = two_cores()
    pin(0, learner_core)
    pin(source.pool.members[0].pid, actor_core)
    toy = ToyRun(config, world, source, ppo_config(config, staleness=int(variant == TOGETHER), epochs=1))

    def facts() -> dict[str, float]:
        toy.run()
        return {DRAWING: toy.drawing_s / toy.iteration_s}

    return Trial(toy.run, facts, losses=list)
