"""The sets of tokens that top-k and top-p left to draw from, packed into bytes.

A token drawn from a set has the probability of the model's distribution renormalised over that set. The engine packs
the set of every token beside its log-probability; log-probability passes of the same token read it again, so both speak
of one distribution ("Keep Sampling Mask", DeepSeek-AI 2025, DeepSeek-V3.2, section 3.1).

A set is a list of token ids, little-endian, of 2 bytes (4 in vocabularies past 65,536), or one bit for each token of
the vocabulary, whichever is shorter. So a set takes at most V / 8 bytes, a 32nd of fp32 logits. A set of 0 bytes is the
whole vocabulary.

Dimensions: N sets, n sets that are read, b of them stored as bits and i as ids, X bytes of all sets, V vocabulary,
C columns of the vocabulary, K token ids in the sets.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

SHORT_IDS = 1 << 16  # vocabularies up to this size have ids of 2 bytes
BITS = 8


def bytes_as_bits(vocab_size: int) -> int:
    """Returns the bytes of a set with one bit for each token: the most that a set takes."""
    return -(-vocab_size // BITS)


def bytes_of_id(vocab_size: int) -> int:
    """Returns the bytes of a token id."""
    return 2 if vocab_size <= SHORT_IDS else 4


def packed(id_K: np.ndarray, vocab_size: int) -> bytes:
    """Returns one set as bytes: token ids if they are shorter, else one bit for each token of the vocabulary.

    Args:
        id_K: token ids, at least one, each once, of any integer dtype.
    """
    width = bytes_of_id(vocab_size)
    if width * len(id_K) < bytes_as_bits(vocab_size):
        return id_K.astype(f"<u{width}").tobytes()

    bits_V = np.zeros(vocab_size, bool)
    bits_V[id_K] = True
    return np.packbits(bits_V, bitorder="little").tobytes()


@dataclass(frozen=True, slots=True)
class TokenSets:
    """N packed sets, one for each sampled token."""

    bytes_X: torch.Tensor  # uint8
    begin_N: torch.Tensor  # int64; first byte of each set
    size_N: torch.Tensor  # int64; bytes of each set

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "TokenSets":
        """Returns a copy with `change` applied to every tensor."""
        return TokenSets(change(self.bytes_X), change(self.begin_N), change(self.size_N))

    def mask(self, index_n: torch.Tensor, vocab_size: int, columns: range) -> torch.Tensor:
        """Returns (n, C) bool: which tokens of `columns` are in the sets at `index_n`; in a set of 0 bytes all are.

        Args:
            index_n: int64, indices of sets.
            vocab_size: tokens of the complete vocabulary, with which the sets were packed.
            columns: consecutive token ids.
        """
        begin_n, size_n = self.begin_N[index_n], self.size_N[index_n]
        allowed_nC = (size_n == 0)[:, None].repeat(1, len(columns))  # a set of 0 bytes is the vocabulary

        # The size of a set tells its form.
        row_b = (size_n == bytes_as_bits(vocab_size)).nonzero()[:, 0]
        row_i = ((size_n > 0) & (size_n < bytes_as_bits(vocab_size))).nonzero()[:, 0]

        allowed_nC[row_b] = self._unpack_bits(begin_n[row_b], columns)

        set_K, id_K = self._unpack_ids(begin_n[row_i], size_n[row_i], bytes_of_id(vocab_size))
        column_K = id_K - columns.start
        inside_K = (column_K >= 0) & (column_K < len(columns))
        allowed_nC[row_i[set_K[inside_K]], column_K[inside_K]] = True
        return allowed_nC

    def _unpack_bits(self, begin_b: torch.Tensor, columns: range) -> torch.Tensor:
        """Returns (b, C) bool: which of the columns are in the sets, stored as bits, that begin at these bytes."""
        first_byte, end_byte = columns.start // BITS, bytes_as_bits(columns.stop)
        byte_U = torch.arange(first_byte, end_byte, device=begin_b.device)
        packed_bU = self.bytes_X[begin_b[:, None] + byte_U]

        bit_8 = torch.arange(BITS, dtype=torch.uint8, device=begin_b.device)
        bits_bC = (packed_bU[..., None] >> bit_8 & 1).flatten(1).bool()
        skipped = columns.start - first_byte * BITS
        return bits_bC[:, skipped : skipped + len(columns)]

    def _unpack_ids(self, begin_i: torch.Tensor, size_i: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (index of the set, token id) of all ids in the sets that begin at these bytes, (K,) int64 each.

        Args:
            size_i: bytes of each set.
            width: bytes of an id.
        """
        count_i = size_i // width
        set_K = torch.arange(len(count_i), device=begin_i.device).repeat_interleave(count_i)

        # Byte of each id: ids of all sets are numbered through, so the ids of earlier sets are subtracted.
        earlier_i = count_i.cumsum(0) - count_i
        number_K = torch.arange(len(set_K), device=begin_i.device) - earlier_i[set_K]
        byte_K = begin_i[set_K] + width * number_K
        return set_K, sum((self.bytes_X[byte_K + b].long() << BITS * b for b in range(width)), byte_K * 0)
