"""Near-duplicates are the same, whether all texts are searched together or group by group."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from dist_lm.data import near_duplicate_groups
from dist_lm.data import near_duplicates as search
from dist_lm.data.near_duplicate_groups import TextGroups, band_records, neighbours
from dist_lm.data.near_duplicates import band_hashes, near_duplicates, text_windows
from tests.data.test_near_duplicates import changed, words

LEAST = 0.8


def families(generator: random.Random) -> list[str]:
    """Returns texts in random order: chains of copies that change a little with each copy, and texts of their own."""
    texts = []
    for _ in range(12):
        text = words(generator, 60)
        for _ in range(generator.randrange(1, 8)):
            texts.append(" ".join(text))
            text = changed(generator, text, generator.randrange(3))
    generator.shuffle(texts)
    return list(dict.fromkeys(texts))


def dropped(texts: Sequence[tuple[bytes, str]]) -> dict[bytes, bytes]:
    return near_duplicates(lambda: iter(texts), LEAST)


def groups_of(n_texts: int, pairs: np.ndarray) -> np.ndarray:
    groups = TextGroups(n_texts)
    groups.join(pairs)
    return groups.groups()


def groups_by_hand(n_texts: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    groups = list(range(n_texts))
    for left, right in pairs:
        lower, upper = sorted((groups[left], groups[right]))
        groups = [lower if group == upper else group for group in groups]
    return groups


@pytest.mark.parametrize("limit", [64, 2])
def test_groups_together_drop_what_one_search_drops(monkeypatch, limit):
    """Would find a group that lacks a text which decides in it, also where a text is compared with few others."""
    monkeypatch.setattr(search, "HELD", limit)
    monkeypatch.setattr(search, "COMPARED", limit)
    for seed in range(3):
        texts = [(number.to_bytes(4), text) for number, text in enumerate(families(random.Random(seed)))]
        bands = np.stack([band_hashes(text_windows(text)) for _, text in texts])
        groups = groups_of(len(texts), neighbours(band_records(bands, 0))[:, :, 1].astype(np.int64))

        of_groups: dict[bytes, bytes] = {}
        for group in np.unique(groups):
            of_groups |= dropped([texts[number] for number in np.flatnonzero(groups == group)])
        together = dropped(texts)
        assert together
        assert of_groups == together


@pytest.mark.parametrize("at_once", [3, 1 << 20])
def test_groups_are_those_of_a_search_by_hand(monkeypatch, at_once):
    """Would find two connected texts in two groups, long chains above all, and unconnected ones in one."""
    monkeypatch.setattr(near_duplicate_groups, "AT_ONCE", at_once)
    for seed in range(30):
        generator = random.Random(seed)
        n_texts = generator.randrange(1, 40)
        n_pairs = generator.randrange(0, 40)
        pairs = [(generator.randrange(n_texts), generator.randrange(n_texts)) for _ in range(n_pairs)]
        groups = groups_of(n_texts, np.array(pairs, np.int64).reshape(-1, 2))
        assert groups.tolist() == groups_by_hand(n_texts, pairs)

    chain = np.stack([np.arange(999), np.arange(1, 1000)], axis=1)
    np.random.default_rng(0).shuffle(chain)
    assert not groups_of(1000, chain).any()
