"""The benchmark of adapters: all variants draw as many tokens as the case counts."""

import pytest
import torch

from dist_lm.bench import adapters
from dist_lm.parallel.mesh import World

SMALL = ("model.d_model=32", "model.n_layers=1", "model.d_ff=64", "model.vocab_size=512", "model.n_heads=2")


@pytest.mark.parametrize("variant", [adapters.SHARED, adapters.APART, adapters.ALONE])
def test_all_variants_draw_what_the_case_counts(variant: str):
    """Finds a variant whose requests go to an engine that is not there, and answers that end early."""
    (case,) = adapters.cases([*SMALL, "stage.global_batch=4", "stage.seq_len=4"], quick=True)
    trial = adapters.build(variant, case.config, World(0, 1, 0, torch.device("cpu")))
    trial.step()
    assert trial.facts().keys() == {adapters.MEMORY}
