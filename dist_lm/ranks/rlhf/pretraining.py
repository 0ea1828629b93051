"""The pretraining text of stage `rlhf`: sequences that stand beside the rollouts in every update of the policy.

An update takes the next `rlhf.pretrain_sequences` of a stream. So the updates that were made say where it stands, and a
checkpoint, which holds their number, needs nothing more.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dist_lm.config.corpus import SPLITS
from dist_lm.config.rlhf_run import RlhfRunConfig
from dist_lm.data.batch import Batch
from dist_lm.data.mapped import MappedCorpus
from dist_lm.data.sequences import note_of_left_out
from dist_lm.data.stream import SequenceStream, StepStream
from dist_lm.parallel.mesh import data_mesh
from dist_lm.ranks.start import RankStart
from dist_lm.rlhf.update import Pretraining
from dist_lm.storage.run_directory import RunDirectory

log = logging.getLogger(__name__)

SEQ_LEN = "rlhf.pretrain_seq_len"


@dataclass(frozen=True)
class PretrainingText:
    """This rank's part of a stream, an update at a time. A `Pretraining`."""

    stream: StepStream
    sequences: int  # an update, over all ranks
    device: torch.device

    def __call__(self, update: int) -> list[Batch]:
        """The micro-batches of the next update, which has to be number `update`."""
        data = next(self.stream)
        assert data.position == (update + 1) * self.sequences, (data.position, update)
        return [batch.to(self.device) for batch in data.micro_batches]


@contextmanager
def pretraining_text(
    config: RlhfRunConfig, run: RunDirectory, start: RankStart, updates: int
) -> Iterator[Pretraining | None]:
    """For the time of the block; None where it has no weight.

    Args:
        updates: of the policy that were made.

    Raises:
        ArtefactError: a corpus is not there, or fills no sequence.
    """
    group = config.rlhf
    if not group.pretrain_coefficient:
        yield None
        return
    corpora = {name: MappedCorpus.open(run.work.corpus(name), SPLITS[0]) for name in group.pretrain_streams}
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
        mix={corpora[name]: share for name, share in sorted(group.pretrain_mix.items())},
        pin_memory=start.world.device.type == "cuda",
        seq_len_key=SEQ_LEN,
    ) as stream:
        yield PretrainingText(stream, group.pretrain_sequences, start.world.device)
