"""Sets of tokens come back from their bytes, whole or in columns, and no set takes more than a bit a token."""

import numpy as np
import pytest
import torch

from dist_lm.model.token_sets import TokenSets, bytes_as_bits, packed


def sets_of(parts: list[bytes]) -> TokenSets:
    size_N = torch.tensor([len(one) for one in parts])
    whole = np.frombuffer(b"".join(parts), np.uint8).copy()
    return TokenSets(torch.from_numpy(whole), size_N.cumsum(0) - size_N, size_N)


@pytest.mark.parametrize("vocab_size", [1, 7, 64, 65, 1000, 70_001])
def test_sets_come_back_whole_and_in_columns(vocab_size: int):
    draw = np.random.default_rng(vocab_size)
    sizes = [min(vocab_size, n) for n in (1, 2, 4, 5, vocab_size // 40 + 1, vocab_size // 3 + 1, vocab_size)]
    mask_NV = torch.zeros(len(sizes) + 1, vocab_size, dtype=torch.bool)
    parts = []
    for row, size in enumerate(sizes):
        ids = np.sort(draw.choice(vocab_size, size, replace=False))
        mask_NV[row, torch.from_numpy(ids)] = True
        parts.append(packed(ids, vocab_size))
        assert 0 < len(parts[-1]) <= bytes_as_bits(vocab_size)
    parts.append(b"")  # the whole vocabulary
    mask_NV[-1] = True
    sets = sets_of(parts)
    places = torch.arange(len(parts))
    assert torch.equal(sets.mask(places, vocab_size, range(vocab_size)), mask_NV)
    some, columns = torch.tensor([len(parts) - 1, 3, 0]), range(vocab_size // 3, vocab_size - vocab_size // 5)
    assert torch.equal(sets.mask(some, vocab_size, columns), mask_NV[some][:, columns.start : columns.stop])
    assert sets.mask(places[:0], vocab_size, range(vocab_size)).shape == (0, vocab_size)


def test_a_few_ids_are_listed_and_many_are_bits():
    assert len(packed(np.arange(50), 32_000)) == 100
    assert len(packed(np.arange(50), 100_000)) == 200
    assert len(packed(np.arange(2000), 32_000)) == len(packed(np.arange(32_000), 32_000)) == 4000
