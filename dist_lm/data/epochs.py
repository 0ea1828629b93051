"""Passes over corpora: how often a run reads each one, and how many steps a number of passes takes.

An epoch of a corpus is all its sequences, once. A step takes `stage.global_batch` sequences; with a mix, each corpus
gives its share of them, and with phases what the phases give it. Nothing here needs torch, because the plan of a
command counts epochs too.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dist_lm.data.order import sequences_an_epoch
from dist_lm.data.packing import DROP, Packing
from dist_lm.data.phases import MixPhase, PhasedMix, mix_of
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.tracking.readable import counted, listed, passes_in_words

MANY = 10  # passes over a corpus, beyond which a launch warns: by then training loss no longer tells of other text
NAMED = 4  # corpora that a line names


@dataclass(frozen=True, slots=True)
class CorpusPass:
    """One corpus of a training stream."""

    corpus: str
    n_sequences: int  # sequences in an epoch
    share: float = 1.0  # part of the sequences in a step

    def epochs(self, sequences: int) -> float:
        """Returns the passes over the corpus in the first `sequences` sequences of the stream."""
        return sequences * self.share / self.n_sequences

    def steps(self, epochs: float, global_batch: int) -> int:
        """Returns the steps of `global_batch` sequences that read the corpus `epochs` times, rounded up."""
        # A share such as 1 - 0.1 - 0.2 is not exact, and must not cost a step.
        return max(1, math.ceil(round(epochs * self.n_sequences / (self.share * global_batch), 6)))


@dataclass(frozen=True, slots=True)
class PhasedPass(CorpusPass):
    """One corpus of a training stream with phases; `share` is that of all phases together."""

    mix: PhasedMix = field(kw_only=True)
    place: int = field(kw_only=True)  # of the corpus in `mix`

    def epochs(self, sequences: int) -> float:
        """Returns the passes over the corpus in the first `sequences` sequences of the stream."""
        return self.mix.count(self.place, sequences) / self.n_sequences


def phased_passes(phases: Sequence[MixPhase], n_sequences: Mapping[str, int]) -> tuple[PhasedPass, ...]:
    """Returns the corpora of a training stream with phases, that of the stage first.

    Args:
        n_sequences: sequences in an epoch of each corpus, in the order of `MixPhase.sequences`.
    """
    mix = mix_of(phases)
    total = sum(sum(phase.sequences.values()) for phase in phases)
    return tuple(
        PhasedPass(name, n_epoch, mix.count(place, total) / total, mix=mix, place=place)
        for place, (name, n_epoch) in enumerate(n_sequences.items())
    )


def text_sequences(corpus: TokenCorpus, seq_len: int, fim_rate: float = 0.0, too_long: str = DROP) -> int:
    """Returns the sequences of an epoch of texts or conversations, as `CorpusSequences` has them; perhaps 0.

    Args:
        seq_len: in tokens.
        fim_rate: share of the slices of texts that are rearranged for fill-in-the-middle.
        too_long: what becomes of conversations that are longer than a sequence (`packing.TOO_LONG`).
    """
    if corpus.has_mask:
        return Packing(corpus.lengths, seq_len, too_long).n_rows
    if fim_rate:
        from dist_lm.data.infill import ADDED, most_slices  # imports torch

        seq_len -= ADDED * most_slices(corpus.lengths, fim_rate, seq_len)
    return sequences_an_epoch(corpus.n_tokens, seq_len)


def ranking_sequences(corpus: TokenCorpus, seq_len: int) -> int:
    """Returns the sequences of an epoch of rankings, as `RankingStream` has them; perhaps 0."""
    return Packing(corpus.lengths, seq_len - 1).n_rows


def shares_of(corpus: str, mix: Mapping[str, float] | None) -> dict[str, float]:
    """Returns the share of the sequences that each corpus gives: `corpus` first, then those of `mix` by name."""
    mixed = dict(sorted((mix or {}).items()))
    return {corpus: 1 - sum(mixed.values()), **mixed}


def epochs_of(passes: Sequence[CorpusPass], sequences: int) -> dict[str, float]:
    """Returns the metrics of the first `sequences` sequences: `train/epochs` of the stage's own corpus, and
    `train/epochs_NAME` of the others.
    """
    names = ["train/epochs", *(f"train/epochs_{mixed.corpus}" for mixed in passes[1:])]
    # Without a corpus there is no pass, and no name is needed.
    return {name: corpus.epochs(sequences) for name, corpus in zip(names, passes, strict=False)}


def in_words(passes: Iterable[CorpusPass], sequences: int) -> str:
    """Returns how often a stream of `sequences` sequences reads each corpus: `3.0 epochs of code, 0.2 of language`."""
    words = []
    for corpus in passes:
        unit = "" if words else " epochs"  # said once, with the first corpus
        words.append(f"{passes_in_words(corpus.epochs(sequences))}{unit} of {corpus.corpus}")
    return listed(words, NAMED)


def repetition_warning(stage: str, passes: Sequence[CorpusPass], steps: int, global_batch: int) -> str:
    """Returns a warning about corpora that are read more than `MANY` times; empty if there are none.

    The warning names at most `NAMED` corpora with their numbers of passes. If the stage's own corpus is one of them, it
    also says how many steps `stage.epochs=3` would take, unless the stream has phases.

    Args:
        stage: name of the stage, which begins the warning.
        passes: corpora of the training stream, the stage's own first.
        steps: steps of the run.
        global_batch: sequences of a step.
    """
    epochs_of_corpus = {corpus.corpus: corpus.epochs(steps * global_batch) for corpus in passes}
    repeated = {name: epochs for name, epochs in epochs_of_corpus.items() if epochs > MANY}
    if not repeated:
        return ""

    counts = [f"{name} {passes_in_words(epochs)} times" for name, epochs in repeated.items()]
    words = f"stage={stage}: {steps:,} steps read {listed(counts, NAMED)}: a model learns such text by heart"
    # The key counts passes over the stage's own corpus, which comes first; phases count steps.
    own_passes = passes[0]
    if own_passes.corpus in repeated and not isinstance(own_passes, PhasedPass):
        words += f"; stage.epochs=3 takes {counted(own_passes.steps(3, global_batch), 'step')}"
    return words
