"""What a rank trains on and is measured by: the stage's corpus, and those mixed into it."""

import logging
from collections.abc import Callable

import torch.distributed as dist

from dist_lm.config.corpus import SPLITS
from dist_lm.config.root import Config
from dist_lm.data.evaluation_batches import EvaluationBatches, evaluation_batches
from dist_lm.data.manifest import read_manifest
from dist_lm.data.mapped import MappedCorpus
from dist_lm.data.sequences import note_of_left_out
from dist_lm.data.stream import SequenceStream
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.stages.training_stage import Opening, StageData
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training.objective import loss_metrics, mixed_metrics, summed_losses
from dist_lm.training.trainer import Evaluate

log = logging.getLogger(__name__)


def check_corpora(run: RunDirectory, config: Config, tokenizer: Tokenizer, world: World) -> None:
    """Refuse shards that were written with another tokenizer (collective).

    The first rank opens the corpora before the others, so that an index that has to be rebuilt is rebuilt once.
    """
    for name in config.streams:
        directory = run.work.corpus(name)
        read_manifest(directory).require_tokenizer(tokenizer.sha256, directory)
        if world.is_first:
            for split in SPLITS:
                MappedCorpus.open(directory, split)
    dist.barrier()


def corpora_of(config: Config) -> list[str]:
    """The stage's own corpus, then those mixed into it."""
    return [config.stage.corpus, *sorted(config.stage.mix or {})]


def open_data(opening: Opening) -> StageData:
    """Texts and conversations: the training sequences of this rank from the position on, and the val split."""
    if opening.world.is_first:
        for name in opening.config.stage.streams:
            for split in SPLITS:
                corpus = MappedCorpus.open(opening.run.work.corpus(name), split)
                if note := note_of_left_out(corpus, opening.config.stage.seq_len):
                    log.warning("%s", note)
    return StageData(open_stream(opening), evaluator(opening), bytes_per_token(opening.run, opening.config))


def bytes_per_token(run: RunDirectory, config: Config) -> float:
    """UTF-8 bytes of text for each token of the training splits, by the corpora's shares of all sequences."""
    mix = config.stage.mix or {}
    shares = {config.stage.corpus: 1 - sum(mix.values()), **mix}
    counts = {name: read_manifest(run.work.corpus(name)).splits["train"].counts for name in shares}
    return sum(share * counts[name].bytes / counts[name].tokens for name, share in shares.items())


def open_stream(opening: Opening) -> SequenceStream:
    """The training sequences of this rank."""
    config, stage = opening.config, opening.config.stage
    corpora = {name: MappedCorpus.open(opening.run.work.corpus(name), "train") for name in config.stage.streams}
    return SequenceStream(
        corpora[stage.corpus],
        seed=config.seed,
        seq_len=stage.seq_len,
        global_batch=stage.global_batch,
        micro_batch=stage.micro_batch,
        dp_rank=opening.dp_rank,
        dp_size=opening.dp_size,
        position=opening.position,
        document_mask=stage.document_mask,
        reset_positions=stage.reset_positions,
        pad_id=opening.tokenizer.pad_id,
        mix={corpora[name]: share for name, share in sorted((stage.mix or {}).items())},
        pin_memory=opening.world.device.type == "cuda",
    )


def evaluator(opening: Opening) -> Evaluate:
    """Loss and bits per byte on the val split of the stage's corpus, and in one figure each on those mixed into it."""
    stage, device = opening.config.stage, opening.world.device
    own, *others = corpora_of(opening.config)
    opened = {name: MappedCorpus.open(opening.run.work.corpus(name), "val") for name in (own, *others)}

    def batches_of(corpus: MappedCorpus, everything: bool) -> EvaluationBatches:
        return evaluation_batches(
            corpus,
            seq_len=stage.seq_len,
            micro_batch=stage.micro_batch,
            dp_rank=opening.dp_rank,
            dp_size=opening.dp_size,
            limit_sequences=0 if everything else stage.eval_sequences,
            document_mask=stage.document_mask,
            reset_positions=stage.reset_positions,
            pad_id=opening.tokenizer.pad_id,
        )

    def evaluate(model: Transformer, everything: bool, alive: Callable[[], None]) -> dict[str, float]:
        metrics = {}
        for name, corpus in opened.items():
            batches = batches_of(corpus, everything)
            sums = summed_losses(model, batches, len(corpus.languages), device, opening.data_ranks, alive).tolist()
            if name == own:
                metrics |= loss_metrics(sums, corpus.languages, batches.bytes_by_language)
            else:
                metrics |= mixed_metrics(sums, name, batches.bytes_by_language)
        return metrics

    return evaluate
