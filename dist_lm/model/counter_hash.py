"""Random bits as a pure function of counters: no generator, no state, the same bits on every device.

The 64-bit mixer is the finaliser of SplitMix64 (Steele, Lea, Flood 2014), the 32-bit one is a round of
MurmurHash3's (Appleby 2011). All arithmetic wraps.
"""

from typing import overload

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1

_ROUND_1 = 0x85EBCA6B - (1 << 32)
_ROUND_2 = 0xC2B2AE35 - (1 << 32)


def signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (the operator shifts arithmetically)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: int | torch.Tensor) -> int | torch.Tensor:
    if isinstance(x, int):
        x &= _WORD
        x = ((x ^ (x >> 30)) * _MIX_1) & _WORD
        x = ((x ^ (x >> 27)) * _MIX_2) & _WORD
        return x ^ (x >> 31)
    x = (x ^ _shifted(x, 30)) * signed(_MIX_1)
    x = (x ^ _shifted(x, 27)) * signed(_MIX_2)
    return x ^ _shifted(x, 31)


@overload
def hash_words(*words: int) -> int: ...
@overload
def hash_words(*words: int | torch.Tensor, state: int | torch.Tensor = 0) -> torch.Tensor: ...
def hash_words(*words: int | torch.Tensor, state: int | torch.Tensor = 0) -> int | torch.Tensor:
    """64 random bits from a sequence of words, ints or int64 tensors that broadcast.

    Put the ints first: they cost nothing. A tensor of one value and the int give the same bits.

    Args:
        state: the hash of words that come before these.

    Returns:
        int64 tensor, or an int in [0, 2^64) where all words are ints.
    """
    for word in words:
        if isinstance(state, int) and isinstance(word, torch.Tensor):
            state = _mix(signed(state + _GOLDEN) ^ word)
        elif isinstance(state, int):
            assert isinstance(word, int)
            state = _mix((state + _GOLDEN) ^ (word & _WORD))
        else:
            state = _mix((state + signed(_GOLDEN)) ^ (signed(word) if isinstance(word, int) else word))
    return state


def hash_grid(row: torch.Tensor, column_C: torch.Tensor) -> torch.Tensor:
    """32 random bits for every pair of a row and a column, from hashes of each.

    Only six cheap passes touch the whole grid, so one hash a row and one a column carry the expensive mixing.

    Args:
        row: int64 hashes of any shape (...).
        column_C: int64 hashes.

    Returns:
        int32 (..., C), uniform over all int32.
    """
    low, high = row.unsqueeze(-1).view(torch.int32).split(1, dim=-1)
    x = low ^ column_C.to(torch.int32)
    x = torch.add(high, x, alpha=_ROUND_1)
    # An arithmetic shift: x and ~x share a hash, which leaves the result uniform and saves a pass.
    x.bitwise_xor_(x >> 15)
    return x.mul_(_ROUND_2)
