"""Tensors whose memory is given back for a while, and an optimizer whose state is away between its steps."""

import pytest
import torch

from dist_lm.parallel.host_copies import HostCopies


def test_values_and_views_come_back_and_the_memory_is_free_meanwhile():
    """Finds weights of an engine that keep their memory while the learner trains, or lose a view of it."""
    first, second = torch.arange(12.0).view(3, 4), torch.arange(5, dtype=torch.bfloat16)
    turned, row = first.t(), first[1]
    expected = turned.clone(), row.clone(), second.clone()
    copies = HostCopies()
    for _ in range(2):
        copies.move([first, second])
        assert copies.n_bytes == 12 * 4 + 5 * 2
        assert first.untyped_storage().nbytes() == second.untyped_storage().nbytes() == 0
        copies.restore()
        assert copies.n_bytes == 0
        assert all(torch.equal(*pair) for pair in zip((turned, row, second), expected, strict=True))


def test_new_values_take_the_place_of_those_that_are_away():
    old, new = torch.ones(4), torch.zeros(6)
    copies = HostCopies()
    copies.move([old])
    copies.forget()
    copies.move([new])
    copies.restore()
    assert torch.equal(new, torch.zeros(6))
    assert old.untyped_storage().nbytes() == 0


def test_a_tensor_that_shares_its_memory_is_not_moved():
    """Finds weights that are freed under another owner."""
    with pytest.raises(AssertionError, match="alone"):
        HostCopies().move([torch.ones(4)[:2]])
