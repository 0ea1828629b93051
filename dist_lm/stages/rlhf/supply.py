"""The source of rollouts on the first rank of stage `rlhf`, and the pretraining text on all ranks. Other stages use the
pool of actors for tasks (`eval_tasks.py`).

Rollouts come from a pool of actors on the gang's Ray cluster, or from an engine in this process. Each policy update
reads the next `rlhf.pretrain_sequences` of a stream of text, so the number of updates gives the position of the stream,
and a checkpoint stores nothing else.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dist_lm.cluster.allocation import actors_in_all, site_of, without_pool
from dist_lm.cluster.pool import ActorsLostError, Pool, PoolRollouts
from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.cluster.ray_cluster import RayAccess, RayCluster, joined_by, own_access
from dist_lm.config.corpus import SPLITS
from dist_lm.config.rlhf import PUSH_AUTO, PUSH_RAY, RolloutPoolConfig
from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.data.sequences import note_of_left_out
from dist_lm.data.stream import SequenceStream, StepStream
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.generation.decoder import WeightStream
from dist_lm.generation.engine import Engine, EngineOptions
from dist_lm.parallel.mesh import data_mesh
from dist_lm.parallel.sharding import compute_dtype
from dist_lm.rlhf.rollouts import EngineRollouts, RolloutSource
from dist_lm.rlhf.update import Pretraining
from dist_lm.stages.rlhf.stage import RlhfRunConfig
from dist_lm.stages.training.program import RankStart
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dist_lm.cluster.pool_push import Sender

log = logging.getLogger(__name__)

EVERY_NODE = 1_000_000  # no limit on nodes: the number of actors limits the pool
SEQ_LEN = "rlhf.pretrain_seq_len"


@dataclass(frozen=True)
class PoolBeside:
    """The cluster that this rank has joined, and the keys of its pool."""

    config: Config
    pool: RolloutPoolConfig
    device: str  # cpu | cuda
    access: RayAccess
    cluster: RayCluster

    def start(
        self,
        spec: EngineSpec,
        weights: WeightStream,
        version: int,
        wanted: Callable[[], bool],
        sender: "Sender | None" = None,
    ) -> Pool:
        """Start the actors. It calls `wanted` at least twice a second while it works; False ends it.

        Raises:
            ActorsLostError: no free resources for an actor; the message names the keys to change.
        """
        pool, ranks = self.pool, int(os.environ["LOCAL_WORLD_SIZE"])
        actors = actors_in_all(pool, len(self.access.nodes), ranks if self.device == "cuda" else 0)
        try:
            started = Pool.start(
                self.cluster,
                spec,
                weights,
                version=version,
                actors=actors,
                wanted=wanted,
                warn=log.warning,
                site=site_of(pool, self.access.nodes, ranks, self.device),
                sender=sender,
            )
        except ActorsLostError as error:
            shared = f", or {pool.key}.placement=shared" if pool.may_share else ""
            raise ActorsLostError(
                f"{pool.key}.actors={actors}: {error}; leave resources for it (fewer cluster.ranks_per_node{shared}), "
                f"or do without: {without_pool(pool)}"
            ) from error
        log.info("%d actors: %s", len(started.members), ", ".join(map(str, started.members)))
        return started


@contextmanager
def joined(config: Config, device: torch.device) -> Iterator[PoolBeside | None]:
    """The cluster of this rank inside the block, for a pool; None without actors, and with a warning without Ray
    (`torchrun -m dist_lm.train RUN_DIR`).

    Raises:
        ClusterError: Ray refuses this rank.
    """
    pool, access = config.pool, own_access(os.environ)
    if pool is None or not pool.actors:
        yield None
    elif access is None:
        log.warning("%s.actors=%d: this rank runs without Ray, so it %s", pool.key, pool.actors, pool.without)
        yield None
    else:
        with joined_by(access, replace(config.cluster, nodes=EVERY_NODE)) as cluster:
            yield PoolBeside(config, pool, device.type, access, cluster)


def engine_options(pool: RolloutPoolConfig) -> EngineOptions:
    """The size of an engine of a pool."""
    return EngineOptions(cache_tokens=pool.cache_tokens, page_tokens=pool.page_tokens, max_sequences=pool.max_sequences)


def engine_spec(
    config: Config, pool: RolloutPoolConfig, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device, texts: bool
) -> EngineSpec:
    """The engine of an actor.

    Args:
        texts: whether answers have texts, which stop texts need.
    """
    return EngineSpec(
        model=config.model,
        options=engine_options(pool),
        eot_id=tokenizer.eot_id,
        vocabulary=tuple(tokenizer.vocabulary()) if texts else None,
        dtype=dtype,
        device=device.type,
        tp=pool.tp,
    )


@contextmanager
def rollout_source(
    config: RlhfRunConfig,
    tokenizer: Tokenizer,
    weights: WeightStream,
    device: torch.device,
    alive: Callable[[], None],
    beside: PoolBeside | None,
) -> Iterator[RolloutSource]:
    """The source of rollouts inside the block. Without Ray (`torchrun -m dist_lm.train RUN_DIR`) a local engine.

    Args:
        weights: of any version of the policy.
        alive: called regularly during generation.
        beside: the cluster of the actors; None: a local engine.

    Raises:
        ClusterError: Ray has no free resources for an actor.
    """

    def wanted() -> bool:
        alive()
        return True

    dtype, texts = compute_dtype(config.parallel, device), bool(config.stage.eval_tasks)
    spec = engine_spec(config, config.pool, tokenizer, dtype, device, texts)
    if beside is None:
        yield _engine(config, spec, weights, device)
        return
    with beside.start(spec, weights, -1, wanted, _sender(config, spec, device)) as started:
        yield PoolRollouts(started, sleeps=config.in_turns)


def _sender(config: RlhfRunConfig, spec: EngineSpec, device: torch.device) -> "Sender | None":
    """What sends weights straight to actors, unless rlhf.pool.push leaves that to Ray."""
    push = config.pool.push
    if push == PUSH_RAY or (push == PUSH_AUTO and device.type == "cpu"):
        return None
    from dist_lm.cluster.pool_push import sender_for

    patience_s = config.cluster.hang_min_s / 4  # this rank may not wait as long as a hang takes
    return sender_for(push, spec.model, spec.dtype, device, tp=spec.tp, patience_s=patience_s)


def _engine(config: RlhfRunConfig, spec: EngineSpec, weights: WeightStream, device: torch.device) -> EngineRollouts:
    engine = Engine(
        spec.model,
        weights,
        eot_id=spec.eot_id,
        vocabulary=spec.vocabulary,
        options=spec.options,
        dtype=spec.dtype,
        device=device,
    )
    return EngineRollouts(engine, sleeps=config.in_turns)


@dataclass(frozen=True)
class PretrainingText:
    """This rank's share of a stream of text, update by update. Implements `Pretraining`."""

    stream: StepStream
    sequences: int  # per update over all ranks
    device: torch.device

    def __call__(self, update: int) -> list[Batch]:
        """The micro-batches of the next update, whose number must be `update`."""
        data = next(self.stream)
        assert data.position == (update + 1) * self.sequences, (data.position, update)
        return [batch.to(self.device) for batch in data.micro_batches]


@contextmanager
def pretraining_text(
    config: RlhfRunConfig, run: RunDirectory, start: RankStart, updates: int
) -> Iterator[Pretraining | None]:
    """The pretraining text inside the block; None if rlhf.pretrain_coefficient is 0.

    Args:
        updates: policy updates so far.

    Raises:
        ArtefactError: a corpus is missing or too small for a sequence.
    """
    group = config.rlhf
    if not group.pretrain_coefficient:
        yield None
        return
    corpora = {name: TokenCorpus.open(run.work.corpus(name), SPLITS[0]) for name in group.pretrain_streams}
    for corpus in corpora.values() if start.world.is_first else ():
        if note := note_of_left_out(corpus, group.pretrain_seq_len, SEQ_LEN):
            log.warning("%s", note)
    ranks = data_mesh(start.mesh)
    with SequenceStream(
        corpora[group.pretrain_corpus],
        seed=config.seed,
        seq_len=group.pretrain_seq_len,
        global_batch=group.pretrain_sequences,
        micro_batch=max(1, group.micro_batch_tokens // group.pretrain_seq_len),
        dp_rank=ranks.get_local_rank(),
        dp_size=ranks.size(),
        position=updates * group.pretrain_sequences,
        pad_id=start.tokenizer.pad_id,
        opening=start.tokenizer.opening,
        mix={corpora[name]: share for name, share in sorted(group.pretrain_mix.items())},
        pin_memory=start.world.device.type == "cuda",
        seq_len_key=SEQ_LEN,
    ) as stream:
        yield PretrainingText(stream, group.pretrain_sequences, start.world.device)
