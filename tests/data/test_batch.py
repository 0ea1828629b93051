"""Targets that count: all of them, and so many others that kernels see few sizes."""

import numpy as np
import pytest

from dist_lm.data.batch import LOGIT_MULTIPLE, logit_indices


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.8])
def test_all_that_count_are_among_a_round_number_of_places(share: float) -> None:
    learned = (np.random.default_rng(0).random((2, 700)) < share).astype(np.float32)
    places = logit_indices(learned)
    assert places is not None
    assert set(np.flatnonzero(learned)) <= set(places.tolist())
    assert len(places) % LOGIT_MULTIPLE == 0
    assert len(places) < learned.sum() + LOGIT_MULTIPLE
    assert places.tolist() == sorted(set(places.tolist()))


@pytest.mark.parametrize(("size", "count"), [(700, 640), (40, 3), (64, 64)])
def test_where_that_is_nearly_all_of_them_it_is_all(size: int, count: int) -> None:
    learned = np.zeros((1, size), np.float32)
    learned[0, :count] = 1
    assert logit_indices(learned) is None
