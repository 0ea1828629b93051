"""Muon on matrices that no rank splits, while there are several ranks."""

import pytest
import torch
import torch.distributed as dist

from dist_lm.training.muon import CPU
from dist_lm.training.muon_exchange import owners_of


def test_a_model_that_is_whole_on_every_rank_has_no_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds a whole model, as a check of cards has it beside the split one, that is taken for shards."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert owners_of([torch.zeros(3, 4)], CPU) is None
