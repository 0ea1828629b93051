"""What a rank trains on and is measured by: the stage's corpus, and those mixed into it."""

import logging
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from dist_lm.config import SPLITS, Config
from dist_lm.data.evaluation_batches import EvaluationBatches, evaluation_batches
from dist_lm.data.manifest import read_manifest
from dist_lm.data.mapped import MappedCorpus
from dist_lm.data.sequences import note_of_left_out
from dist_lm.data.stream import SequenceStream
from dist_lm.parallel.mesh import World, data_mesh
from dist_lm.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training.evaluation import loss_metrics, mixed_metrics, summed_losses
from dist_lm.training.objective import LossModel
from dist_lm.training.state import TrainState
from dist_lm.training.trainer import Evaluate

log = logging.getLogger(__name__)


def check_corpora(run: RunDirectory, config: Config, tokenizer: Tokenizer, world: World) -> None:
    """Refuse shards that were written with another tokenizer, and say what no sequence holds (collective).

    The first rank opens the corpora before the others, so that an index that has to be rebuilt is rebuilt once.
    """
    for name in corpora_of(config):
        directory = run.work.corpus(name)
        read_manifest(directory).require_tokenizer(tokenizer.sha256, directory)
        if world.is_first:
            for split in SPLITS:
                note = note_of_left_out(MappedCorpus.open(directory, split), config.stage.seq_len)
                if note:
                    log.warning("%s", note)
    dist.barrier()


def corpora_of(config: Config) -> list[str]:
    """The stage's own corpus, then those mixed into it."""
    return [config.stage.corpus, *sorted(config.stage.mix or {})]


def open_stream(
    run: RunDirectory, config: Config, mesh: DeviceMesh, world: World, tokenizer: Tokenizer, state: TrainState
) -> SequenceStream:
    """The training sequences of this rank, from the state's position on."""
    stage, ranks = config.stage, data_mesh(mesh)
    corpora = {name: MappedCorpus.open(run.work.corpus(name), "train") for name in corpora_of(config)}
    return SequenceStream(
        corpora[stage.corpus],
        seed=config.seed,
        seq_len=stage.seq_len,
        global_batch=stage.global_batch,
        micro_batch=stage.micro_batch,
        dp_rank=ranks.get_local_rank(),
        dp_size=ranks.size(),
        position=state.position,
        document_mask=stage.document_mask,
        reset_positions=stage.reset_positions,
        pad_id=tokenizer.pad_id,
        mix={corpora[name]: share for name, share in sorted((stage.mix or {}).items())},
        pin_memory=world.device.type == "cuda",
    )


def evaluator(run: RunDirectory, config: Config, mesh: DeviceMesh, world: World, tokenizer: Tokenizer) -> Evaluate:
    """Loss and bits per byte on the val split of the stage's corpus, and in one figure each on those mixed into it."""
    stage, ranks = config.stage, data_mesh(mesh)
    group: ProcessGroup = ranks.get_group()
    own, *others = corpora_of(config)
    opened = {name: MappedCorpus.open(run.work.corpus(name), "val") for name in (own, *others)}

    def batches_of(corpus: MappedCorpus, everything: bool) -> EvaluationBatches:
        return evaluation_batches(
            corpus,
            seq_len=stage.seq_len,
            micro_batch=stage.micro_batch,
            dp_rank=ranks.get_local_rank(),
            dp_size=ranks.size(),
            limit_sequences=0 if everything else stage.eval_sequences,
            document_mask=stage.document_mask,
            reset_positions=stage.reset_positions,
            pad_id=tokenizer.pad_id,
        )

    def evaluate(model: LossModel, everything: bool, alive: Callable[[], None]) -> dict[str, float]:
        metrics = {}
        for name, corpus in opened.items():
            batches = batches_of(corpus, everything)
            sums = summed_losses(model, batches, len(corpus.languages), world.device, group, alive).tolist()
            if name == own:
                metrics |= loss_metrics(sums, corpus.languages, batches.bytes_by_language)
            else:
                metrics |= mixed_metrics(sums, name, batches.bytes_by_language)
        return metrics

    return evaluate
