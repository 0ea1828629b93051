"""The sets of tokens that top-k and top-p left to draw from, packed into bytes.

A token drawn from a set has the probability of the model's distribution renormalised over that set. The engine packs
the set of every token beside its log-probability; log-probability passes of the same token read it again, so both speak
of one distribution ("Keep Sampling Mask", DeepSeek-AI 2025, DeepSeek-V3.2, section 3.1).

A set is a list of token ids, little-endian, of 2 bytes (4 in vocabularies past 65,536), or one bit for each token of
the vocabulary, whichever is shorter. So a set takes at most V / 8 bytes, a 32nd of fp32 logits. A set of 0 bytes is the
whole vocabulary.

Dimensions: N places in all, n places asked for, X bytes of all sets, V vocabulary, C columns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

SHORT_IDS = 1 << 16  # vocabularies up to this size have ids of 2 bytes
BITS = 8


def bytes_as_bits(vocab_size: int) -> int:
    """Bytes of a set with one bit for each token: the most that a set takes."""
    return -(-vocab_size // BITS)


def bytes_of_id(vocab_size: int) -> int:
    """Bytes of a token id."""
    return 2 if vocab_size <= SHORT_IDS else 4


def packed(id_K: np.ndarray, vocab_size: int) -> bytes:
    """One set.

    Args:
        id_K: token ids, at least one, each once.
    """
    width = bytes_of_id(vocab_size)
    if width * len(id_K) < bytes_as_bits(vocab_size):
        return id_K.astype(f"<u{width}").tobytes()
    bits_V = np.zeros(vocab_size, bool)
    bits_V[id_K] = True
    return np.packbits(bits_V, bitorder="little").tobytes()


@dataclass(frozen=True, slots=True)
class TokenSets:
    """The packed sets of N places."""

    bytes_X: torch.Tensor  # uint8
    begin_N: torch.Tensor  # int64; first byte of each set
    size_N: torch.Tensor  # int64; bytes of each set

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "TokenSets":
        """A copy with `change` applied to every tensor."""
        return TokenSets(change(self.bytes_X), change(self.begin_N), change(self.size_N))

    def kept(self, place_n: torch.Tensor, vocab_size: int, columns: range) -> torch.Tensor:
        """(n, C) bool: which tokens of `columns` are in the sets of these places.

        Args:
            place_n: int64.
            columns: consecutive token ids.
        """
        begin_n, size_n = self.begin_N[place_n], self.size_N[place_n]
        kept_nC = (size_n == 0)[:, None].repeat(1, len(columns))
        row_b = (size_n == bytes_as_bits(vocab_size)).nonzero()[:, 0]
        row_i = ((size_n > 0) & (size_n < bytes_as_bits(vocab_size))).nonzero()[:, 0]
        kept_nC[row_b] = self._from_bits(begin_n[row_b], columns)
        row_K, column_K = self._from_ids(begin_n[row_i], size_n[row_i], bytes_of_id(vocab_size))
        column_K = column_K - columns.start
        here_K = (column_K >= 0) & (column_K < len(columns))
        kept_nC[row_i[row_K[here_K]], column_K[here_K]] = True
        return kept_nC

    def _from_bits(self, begin_b: torch.Tensor, columns: range) -> torch.Tensor:
        """(b, C) bool: the columns in sets that begin at these bytes."""
        first, last = columns.start // BITS, bytes_as_bits(columns.stop)
        byte_U = torch.arange(first, last, device=begin_b.device)
        value_bU = self.bytes_X[begin_b[:, None] + byte_U]
        bit_8 = torch.arange(BITS, dtype=torch.uint8, device=begin_b.device)
        bits_bC = (value_bU[..., None] >> bit_8 & 1).flatten(1).bool()
        skipped = columns.start - first * BITS
        return bits_bC[:, skipped : skipped + len(columns)]

    def _from_ids(self, begin_i: torch.Tensor, size_i: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(index of the set, token id) of all ids in sets that begin at these bytes, (K,) int64 each."""
        count_i = size_i // width
        index_K = torch.arange(len(count_i), device=begin_i.device).repeat_interleave(count_i)
        before_i = count_i.cumsum(0) - count_i
        number_K = torch.arange(len(index_K), device=begin_i.device) - before_i[index_K]
        place_K = begin_i[index_K] + width * number_K
        return index_K, sum((self.bytes_X[place_K + b].long() << BITS * b for b in range(width)), place_K * 0)
