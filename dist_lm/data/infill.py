"""Fill in the middle: documents rearranged so that a model learns to write what stands between two texts.

At the level of tokens, after Bavarian et al. 2022, 'Efficient Training of Language Models to Fill in the Middle'
(arXiv 2207.14255), sections 3 and 4:

    document   <|endoftext|> before middle after
    PSM        <|endoftext|> <|fim_prefix|> before <|fim_suffix|> after <|fim_middle|> middle
    SPM        <|endoftext|> <|fim_prefix|> <|fim_suffix|> after <|fim_middle|> before middle

The shards hold plain documents. Which ones an epoch rearranges, and where it cuts them, are pure functions of (seed,
epoch, document number).
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from dist_lm.data.keys import Shuffle, key, splitmix64
from dist_lm.data.mapped import MappedCorpus
from dist_lm.tokenizer.symbols import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX
from dist_lm.tokenizer.tokenizer import Tokenizer

ADDED = 3  # tokens
LEAST = 4  # tokens of an eligible document: end-of-text and three others
PLAIN, PSM, SPM = 0, 1, 2


class InfillMarks(NamedTuple):
    """Ids of the three marks."""

    prefix: int
    suffix: int
    middle: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """The marks of a tokenizer.

        Raises:
            UserError: it lacks one.
        """
        return cls(*(tokenizer.mark_id(mark) for mark in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)))

    def prompt(self, before: list[int], after: list[int]) -> list[int]:
        """What a model continues with the middle; `before` begins with end-of-text."""
        return [before[0], self.prefix, *before[1:], self.suffix, *after, self.middle]


@dataclass(frozen=True)
class Infill:
    """How a corpus is rearranged."""

    rate: float  # share of the eligible documents of every epoch, half of them PSM, half SPM
    marks: InfillMarks


def rearranged(tokens: np.ndarray, begin: int, end: int, marks: InfillMarks, form: int = PSM) -> np.ndarray:
    """A document whose tokens [begin, end) are the middle: (n + 3,). `tokens`: (n,), the first is end-of-text."""
    assert 1 <= begin <= end <= len(tokens), (begin, end, len(tokens))
    before, middle, after = tokens[1:begin], tokens[begin:end], tokens[end:]
    prefix, suffix, mid = (np.array([mark], tokens.dtype) for mark in marks)
    if form == SPM:
        parts = (tokens[:1], prefix, suffix, after, mid, before, middle)
    else:
        parts = (tokens[:1], prefix, before, suffix, after, mid, middle)
    return np.concatenate(parts)


def restored(tokens: np.ndarray, marks: InfillMarks) -> np.ndarray:
    """The inverse of `rearranged` in both forms; any other document as it is."""
    if len(tokens) < 1 + ADDED or tokens[1] != marks.prefix:
        return tokens
    (suffix,), (mid,) = np.flatnonzero(tokens == marks.suffix), np.flatnonzero(tokens == marks.middle)
    # in SPM nothing stands before the suffix, and `before` stands with the middle
    return np.concatenate([tokens[:1], tokens[2:suffix], tokens[mid + 1 :], tokens[suffix + 1 : mid]])


def middle_of(length: int, word: int) -> tuple[int, int]:
    """Where the middle of a document of `length` tokens begins and ends: two different cuts, every pair equally likely.

    The middle is never empty; what stands before it or after it may be.
    """
    first, second = splitmix64(word, 2).tolist()
    one = first % length  # cuts 0 .. length - 1 stand before token 1 .. length
    other = second % (length - 1)
    other += other >= one
    return 1 + min(one, other), 1 + max(one, other)


def eligible(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Numbers of the documents that may be rearranged: those with three tokens or more that then fit a sequence."""
    return np.flatnonzero((lengths >= LEAST) & (lengths + ADDED <= seq_len))


def chosen_count(rate: float, n_eligible: int) -> int:
    """Documents of an epoch that are rearranged: the whole number next to `rate` x eligible documents."""
    return int(rate * n_eligible + 0.5)


class InfillEpoch:
    """The documents of one epoch, some of them rearranged. Reads like a corpus without a loss mask."""

    has_mask = False

    def __init__(self, corpus: MappedCorpus, infill: Infill, seed: int, epoch: int, seq_len: int) -> None:
        self._corpus, self._marks = corpus, infill.marks
        self._word = (Shuffle.INFILL_MIDDLES, seed, epoch)
        places = eligible(corpus.lengths, seq_len)
        count = chosen_count(infill.rate, len(places))
        # the chosen ones have the smallest hashes; the first half of them is SPM
        hashes = splitmix64(key(Shuffle.INFILL_DOCUMENTS, seed, epoch), len(corpus.lengths))[places]
        self.form = np.zeros(len(corpus.lengths), np.uint8)  # (documents,)
        for form, most in ((PSM, count), (SPM, count // 2)):
            if most:
                self.form[places[hashes <= np.partition(hashes, most - 1)[most - 1]]] = form
        self.lengths = corpus.lengths + ADDED * (self.form != PLAIN)  # (documents,) tokens

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document: (stop - start,)."""
        form = self.form.item(document)
        if form == PLAIN:
            return self._corpus.tokens(document, start, stop)
        length = self._corpus.lengths.item(document)
        cuts = middle_of(length, key(*self._word, document))
        return rearranged(self._corpus.tokens(document, 0, length), *cuts, self._marks, form)[start:stop]

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Every token is learned: (stop - start,) uint8."""
        return np.ones(stop - start, np.uint8)
