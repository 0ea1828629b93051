"""The benchmark of constraints: both variants draw as many tokens as the case counts."""

import pytest
import torch

from dist_lm.bench import constraints
from dist_lm.parallel.mesh import World

SMALL = ("model.d_model=32", "model.n_layers=1", "model.d_ff=64", "model.vocab_size=1024", "model.n_heads=2")


@pytest.mark.parametrize("variant", [constraints.WITH, constraints.WITHOUT])
def test_both_variants_draw_what_the_case_counts(variant: str):
    """Finds a made-up tokenizer that lacks what grammars ask of one, and answers that end early."""
    (case,) = constraints.cases([*SMALL, "stage.global_batch=2", "stage.seq_len=8"], quick=True)
    constraints.build(variant, case.config, World(0, 1, 0, torch.device("cpu"))).step()
