"""Stages that predict the next token of texts and conversations: their objective, data, evaluation and summary."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from dist_lm.config.corpus import SPLITS
from dist_lm.config.root import Config
from dist_lm.config.stage import SamplingConfig, StageConfig
from dist_lm.data.epochs import CorpusPass, phased_passes, shares_of, text_sequences
from dist_lm.data.manifest import Split, read_manifest
from dist_lm.data.order import sequences_an_epoch
from dist_lm.data.phases import MixPhase, PhasedMix, mix_of, mix_phases
from dist_lm.data.sources.reader import form_of
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ConfigError, require
from dist_lm.stages.continuing import left_out_by
from dist_lm.stages.corpus_forms import CorpusFormsConfig
from dist_lm.stages.stage import run_of
from dist_lm.stages.training.arguments import DataArguments, StageData, TrainingSequences
from dist_lm.stages.training.stage import (
    RunState,
    TrainingStage,
    batch_options,
    print_before_and_after,
    sequence_limit,
)
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.readable import change

if TYPE_CHECKING:
    from dist_lm.data.evaluation_batches import EvaluationBatches
    from dist_lm.data.stream import SequenceStream
    from dist_lm.model.transformer import Transformer
    from dist_lm.tokenizer.tokenizer import Tokenizer
    from dist_lm.tracking.console import Console
    from dist_lm.training.objective import Objective
    from dist_lm.training.trainer import Evaluate

log = logging.getLogger(__name__)

INFILL, INFILL_SPM, INFILL_LEFT = "val/infill_loss", "val/infill_loss_spm", "val/infill_loss_left"


@dataclass
class SamplesConfig(SamplingConfig):
    """Samples at the end of a stage."""

    prompts: dict[str, list[str]] = field(default_factory=dict)  # language -> prompts
    samples_per_prompt: int = 4
    temperature: float = 0.7
    top_k: int = 50
    top_p: float = 0.95

    def __post_init__(self) -> None:
        require(self.samples_per_prompt >= 0, "stage.sampling.samples_per_prompt", self.samples_per_prompt, ">= 0")
        self.check_sampling("stage.sampling")


@dataclass
class SampledStageConfig(StageConfig):
    """A stage that ends with samples of its model."""

    sampling: SamplesConfig = field(default_factory=SamplesConfig)
    # In each epoch, this share of the slices of `corpus` is rearranged for fill-in-the-middle; corpora in `mix` and val
    # are not. A slice is the part of a document in one sequence.
    fim_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.fim_rate <= 1, "stage.fim_rate", self.fim_rate, "in [0, 1]")


@dataclass
class SampledConfig(CorpusFormsConfig):
    """The configuration of a stage that ends with samples."""

    stage: SampledStageConfig = MISSING


class TextStage(TrainingStage):
    """Next-token prediction on `stage.corpus`, with shares of other corpora (`stage.mix`, `stage.phases`)."""

    schema = SampledConfig
    needs = ("shards",)
    in_pipeline = True
    writes_text = True
    has_sequences = True

    def check(self, config: Config) -> None:
        """Refuses rankings, whose bad completions would be learned like good ones, and `fim_rate` for a corpus without
        texts.

        Raises:
            ConfigError: names the key.
        """
        stage = config.stage
        mix_key = "stage.phases" if stage.phases else "stage.mix"
        mixed = [(mix_key, name) for name in stage.corpus_names if name != stage.corpus]
        for key, name in (("stage.corpus", stage.corpus), *mixed):
            if name and form_of(config.corpus, name) == "ranking":
                raise ConfigError(f"{key}={name}: expected texts or conversations; stage=reward learns from rankings")
        if fim_rate_of(config) and form_of(config.corpus, stage.corpus) != "text":
            raise ConfigError(f"stage.fim_rate={fim_rate_of(config)}: stage.corpus={stage.corpus} holds no texts")

    def verify(self, on_disk: RunState, config: Config, init_from: str, rebuilt: Collection[str]) -> Path | None:
        """As `TrainingStage.verify`; also refuses documents of stage.without that are not there.

        Raises:
            ArtefactError: as `left_out_by`, or as `TrainingStage.verify`.
            OSError: a file cannot be read.
        """
        if not set(rebuilt) & set(self.needs):
            left_out_by(config, on_disk.run)
        return super().verify(on_disk, config, init_from, rebuilt)

    def objective(self, config: Config) -> "Objective":
        from dist_lm.training.objective import next_token

        return next_token(config.stage.label_smoothing, config.stage.z_loss)

    def open_data(self, arguments: DataArguments) -> StageData:
        """Opens the corpora of the run: the training stream of this rank, its evaluation, and the bytes per token of
        the text.

        The first rank warns of documents that no sequence can hold.

        Raises:
            ArtefactError: a corpus is missing or damaged, or no document fits into a sequence.
            UserError: the tokenizer lacks a mark that stage.fim_rate needs.
            ConfigError: the batch does not divide over the ranks, or a corpus cannot fill a phase.
            OSError: a file cannot be read.
        """
        from dist_lm.data.sequences import note_of_left_out

        if arguments.world.is_first:
            # The documents are the same on every rank, so one warning is enough.
            for name in arguments.config.stage.corpus_names:
                for split in SPLITS:
                    corpus = TokenCorpus.open(arguments.config.corpus_in(arguments.run.work, name), split)
                    stage = arguments.config.stage
                    if note := note_of_left_out(corpus, stage.seq_len, too_long=stage.too_long):
                        log.warning("%s", note)
        stream = open_stream(arguments)
        n_sequences = [sequences.n_sequences for sequences in stream.corpora]
        passes = passes_over(arguments.config.stage, n_sequences)
        phases = [phase.record() for phase in phases_over(arguments.config.stage, n_sequences)]
        text_bytes = bytes_per_token(
            arguments.config, arguments.run, {corpus_pass.corpus: corpus_pass.share for corpus_pass in passes}
        )
        return StageData(stream, evaluator(arguments), text_bytes, passes, phases)

    def sequences(self, config: Config, run: RunDirectory) -> TrainingSequences:
        from dist_lm.data.sequences import MixedSequences
        from dist_lm.tokenizer.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(run.work.tokenizer_model)
        return MixedSequences(seq_len=config.stage.seq_len, **sequence_options(config, run, tokenizer))

    def passes(self, config: Config, exact: bool) -> tuple[CorpusPass, ...]:
        return passes_over(config.stage, self._sequences_of_corpora(config, exact))

    def phases(self, config: Config) -> tuple[MixPhase, ...]:
        return phases_over(config.stage, self._sequences_of_corpora(config, exact=True))

    def _sequences_of_corpora(self, config: Config, exact: bool) -> list[int]:
        """Returns the sequences in an epoch of each corpus of the stage, in the order of `corpus_names`; for `exact`,
        see `passes`.

        Raises:
            ArtefactError: a corpus is missing or damaged.
            ConfigError: a source is invalid.
            OSError: a file cannot be read.
        """
        stage, work = config.stage, run_of(config).work
        # Phases are compared with those of the ranks, so their numbers are exact.
        exact = exact or bool(stage.phases)

        counts = []
        for name in stage.corpus_names:
            directory = config.corpus_in(work, name)
            fim_rate = fim_rate_of(config) if name == stage.corpus else 0.0
            if form_of(config.corpus, name) == "text" and not (exact and fim_rate):
                # To open a corpus of 200 million documents takes minutes, and the manifest knows the tokens.
                train = read_manifest(directory).splits.get("train", Split())
                counts.append(sequences_an_epoch(train.counts.tokens, stage.seq_len))
            else:
                corpus = TokenCorpus.open(directory, "train")
                counts.append(text_sequences(corpus, stage.seq_len, fim_rate, stage.too_long))
        return counts

    def result(self, config: Config, run: RunDirectory, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `gzip_bits_per_byte`: bits per byte of `gzip -9` on each held-out document alone, by language and for
        `all`.

        It reads all of val, and is empty for a corpus of conversations.

        Raises:
            ArtefactError: the corpus or the tokenizer is missing or damaged.
            OSError: a file cannot be read.
            UserError: the package `tokenizers` is needed and not installed.
        """
        from dist_lm.data.evaluation_batches import gzip_bits_per_byte
        from dist_lm.tokenizer.tokenizer import Tokenizer

        corpus = TokenCorpus.open(config.corpus_in(run.work, config.stage.corpus), "val")
        tokenizer = Tokenizer.load(run.work.tokenizer_model)

        # gzip cannot apply a loss mask, so there is no figure for conversations.
        if corpus.has_mask:
            return {"gzip_bits_per_byte": {}}

        texts = (
            (
                corpus.languages[corpus.language_codes[document]],
                tokenizer.decode(corpus.tokens(document, 1, int(corpus.lengths[document])).tolist()).encode(),
            )
            for document in range(corpus.n_documents)
        )
        return {"gzip_bits_per_byte": gzip_bits_per_byte(texts)}

    def print_figures(self, config: Config, result: Mapping[str, Any], console: "Console") -> None:
        print_compression(result, config.stage.corpus, console)
        print_before_and_after(result, console)


def fim_rate_of(config: Config) -> float:
    """Returns `stage.fim_rate`, or 0 for a stage without that key."""
    return getattr(config.stage, "fim_rate", 0.0)


def phases_over(stage: StageConfig, n_sequences: Sequence[int]) -> tuple[MixPhase, ...]:
    """Returns stage.phases in numbers; none without phases.

    Args:
        n_sequences: sequences in an epoch of each of `stage.corpus_names`.

    Raises:
        ConfigError: a corpus cannot fill a phase; names both, and the numbers.
    """
    if not stage.phases:
        return ()
    return mix_phases(stage, dict(zip(stage.corpus_names, n_sequences, strict=True)))


def passes_over(stage: StageConfig, n_sequences: Sequence[int]) -> tuple[CorpusPass, ...]:
    """Returns the corpora of a stage, its own first; arguments and errors are those of `phases_over`."""
    if stage.phases:
        return phased_passes(phases_over(stage, n_sequences), dict(zip(stage.corpus_names, n_sequences, strict=True)))
    shares = shares_of(stage.corpus, stage.mix)
    return tuple(
        CorpusPass(name, n_epoch, share) for (name, share), n_epoch in zip(shares.items(), n_sequences, strict=True)
    )


def mix_over(stage: StageConfig, n_sequences: Sequence[int]) -> PhasedMix:
    """Returns the order of the corpora of a stage with phases; arguments and errors are those of `phases_over`."""
    return mix_of(phases_over(stage, n_sequences))


def open_stream(arguments: DataArguments) -> "SequenceStream":
    """Returns the training sequences of this rank, from the position in `arguments` on.

    Raises:
        ArtefactError: a corpus is missing or damaged, or fills no sequence.
        UserError: the tokenizer lacks a mark that stage.fim_rate needs.
        ConfigError: the batch does not divide over the ranks, or a corpus cannot fill a phase.
        OSError: a file cannot be read.
    """
    from dist_lm.data.stream import SequenceStream

    stage = arguments.config.stage
    return SequenceStream(
        global_batch=stage.global_batch,
        position=arguments.position,
        document_mask=stage.document_mask,
        reset_positions=stage.reset_positions,
        pin_memory=arguments.world.device.type == "cuda",
        # corpora, seed, mix and order
        **sequence_options(arguments.config, arguments.run, arguments.tokenizer),
        # sequence length, micro-batch size, this rank, padding and first token
        **batch_options(arguments),
    )


def sequence_options(config: Config, run: RunDirectory, tokenizer: "Tokenizer") -> dict[str, Any]:
    """Returns the arguments of `SequenceStream` and `MixedSequences` that decide which sequences a run trains on.

    These are corpora, seed, mix, order and documents left out. The length of a sequence is in `batch_options`.

    Raises:
        ArtefactError: a corpus is missing or damaged, or as `left_out_by`.
        UserError: the tokenizer lacks a mark that stage.fim_rate needs.
        OSError: a file cannot be read.
    """
    from dist_lm.data.infill import Infill, InfillMarks
    from dist_lm.data.sequences import PhasedCorpora

    stage = config.stage
    corpora = {name: TokenCorpus.open(config.corpus_in(run.work, name), "train") for name in stage.corpus_names}
    infill = None
    if fim_rate := fim_rate_of(config):
        infill = Infill(fim_rate, InfillMarks.of(tokenizer))

    mix: dict[TokenCorpus, float] | PhasedCorpora = {
        corpora[name]: share for name, share in sorted((stage.mix or {}).items())
    }
    if stage.phases:
        mix = PhasedCorpora([corpora[name] for name in stage.corpus_names[1:]], partial(mix_over, stage))
    return {
        "corpus": corpora[stage.corpus],
        "seed": config.seed,
        "mix": mix,
        "infill": infill,
        "too_long": stage.too_long,
        "without": left_out_by(config, run),
        "order": stage.order,
    }


def held_out_batches(arguments: DataArguments, corpus: "TokenCorpus", everything: bool) -> "EvaluationBatches":
    """Returns this rank's batches of a corpus's val split. All ranks together read `stage.eval_sequences` sequences (0:
    all), or all of val with `everything`."""
    from dist_lm.data.evaluation_batches import EvaluationBatches

    stage = arguments.config.stage
    return EvaluationBatches(
        corpus=corpus,
        limit_sequences=sequence_limit(arguments.config, everything),
        document_mask=stage.document_mask,
        reset_positions=stage.reset_positions,
        too_long=stage.too_long,
        **batch_options(arguments),
    )


def evaluator(arguments: DataArguments) -> "Evaluate":
    """Returns a function for loss (nats) and bits per byte on val; its figures are the same on every rank (collective).

    There is one figure per language of the stage's corpus, and one for each mixed corpus. With `stage.fim_rate` also
    the loss on middles of val documents, with and without what stands after them.

    Raises:
        ArtefactError: a corpus is missing or damaged.
        UserError: the tokenizer lacks a mark that stage.fim_rate needs.
        OSError: a file cannot be read.
    """
    from dist_lm.data.infill import PSM, SPM, InfillMarks
    from dist_lm.data.infill_evaluation import HeldOutMiddles
    from dist_lm.training.objective import loss_metrics, mixed_metrics, summed_losses

    config, stage, device = arguments.config, arguments.config.stage, arguments.world.device
    corpora = {name: TokenCorpus.open(config.corpus_in(arguments.run.work, name), "val") for name in stage.corpus_names}

    # INFILL_LEFT hides the text after the middle, to measure how much that text helps.
    middles = {}
    if fim_rate_of(arguments.config) > 0:
        infill_marks = InfillMarks.of(arguments.tokenizer)
        middles = {INFILL: (infill_marks, PSM), INFILL_SPM: (infill_marks, SPM), INFILL_LEFT: (None, PSM)}

    def evaluate(model: "Transformer", everything: bool, alive: Callable[[], None]) -> dict[str, float]:
        metrics = {}
        for name, corpus in corpora.items():
            # Ranks read different sequences; the sums are those of all ranks.
            batches = held_out_batches(arguments, corpus, everything)
            sums = summed_losses(model, batches, len(corpus.languages), device, arguments.data_ranks, alive).tolist()
            if name == stage.corpus:
                metrics |= loss_metrics(sums, corpus.languages, batches.bytes_by_language)
            else:
                metrics |= mixed_metrics(sums, name, batches.bytes_by_language)

        corpus = corpora[stage.corpus]
        for name, (marks, form) in middles.items():
            batches = HeldOutMiddles(
                corpus=corpus,
                marks=marks,
                form=form,
                limit=sequence_limit(arguments.config, everything),
                **batch_options(arguments),
            )
            sums = summed_losses(model, batches, len(corpus.languages), device, arguments.data_ranks, alive)
            metrics[name] = (sums[:, 0].sum() / sums[:, 1].sum()).item()
        return metrics

    return evaluate


def bytes_per_token(config: Config, run: RunDirectory, shares: Mapping[str, float]) -> float:
    """Returns the UTF-8 bytes per token of the training splits, weighted by each corpus's share of all sequences.

    Raises:
        ArtefactError: a corpus is missing or damaged.
    """
    counts = {name: read_manifest(config.corpus_in(run.work, name)).splits["train"].counts for name in shares}
    return sum(share * counts[name].bytes / counts[name].tokens for name, share in shares.items())


def print_compression(result: Mapping[str, Any], corpus: str, console: "Console") -> None:
    """Prints bits per byte on held-out documents by language, beside those of `gzip -9` on each document alone.

    Nothing is printed for conversations.
    """
    gzip_bits = result["gzip_bits_per_byte"]
    if not gzip_bits:
        return

    rows = []
    # Metrics over all languages have no suffix.
    for language in ("all", *sorted(key for key in gzip_bits if key != "all")):
        suffix = "" if language == "all" else f"_{language}"
        model_bits = result["metrics"][f"val/bits_per_byte{suffix}"]
        ratio = change(model_bits / gzip_bits[language])
        rows.append((language, f"{model_bits:.3f}", f"{gzip_bits[language]:.3f}", ratio))
    console.table(
        f"bits per byte on the held-out documents of corpus {corpus}",
        ("language", "model", "gzip -9", "model against gzip"),
        rows,
    )
