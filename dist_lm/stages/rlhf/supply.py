"""The source of rollouts on the first rank of stage `rlhf`, and the pretraining text on all ranks.

Rollouts come from a pool of actors on the gang's Ray cluster, or from an engine in this process. Each policy update
reads the next `rlhf.pretrain_sequences` of a stream of text, so the number of updates gives the position of the stream,
and a checkpoint stores nothing else.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dist_lm.cluster.pool import PoolRollouts
from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.config.corpus import SPLITS
from dist_lm.config.rlhf import PUSH_AUTO, PUSH_RAY
from dist_lm.data.batch import Batch
from dist_lm.data.sequences import note_of_left_out
from dist_lm.data.stream import SequenceStream, StepStream
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.generation.decoder import WeightStream
from dist_lm.generation.engine import Engine
from dist_lm.parallel.mesh import data_mesh
from dist_lm.parallel.sharding import compute_dtype
from dist_lm.rlhf.rollouts import EngineRollouts, RolloutSource
from dist_lm.rlhf.update import Pretraining
from dist_lm.stages.pool_beside import PoolBeside, engine_spec
from dist_lm.stages.rlhf.stage import RlhfRunConfig
from dist_lm.stages.training.program import RankStart
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dist_lm.cluster.pool_push import Sender

log = logging.getLogger(__name__)

SEQ_LEN = "rlhf.pretrain_seq_len"


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
