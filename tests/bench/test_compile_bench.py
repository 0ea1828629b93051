"""The benchmark of torch.compile times what a run of a user compiles on that device."""

import pytest
import torch

from dist_lm.bench.training import COMPILE, COMPILED, EAGER, compiled_as_used
from dist_lm.model.size import packs_documents
from dist_lm.parallel.sharding import compute_dtype


@pytest.mark.parametrize(
    ("device", "overrides", "dtype", "packed"),
    [
        ("cuda", (), torch.bfloat16, True),
        ("cpu", (), torch.float32, False),
        ("cuda", ("model=tiny",), torch.bfloat16, True),
        ("cuda", ("parallel.compute_dtype=fp32",), torch.float32, True),
    ],
)
def test_arithmetic_and_attention_are_those_of_a_run_on_that_device(device, overrides, dtype, packed):
    (case,) = COMPILE.cases(overrides, True)
    for variant, mode in ((COMPILED, "always"), (EAGER, "never")):
        config = compiled_as_used(variant, case.config, torch.device(device))
        assert config.parallel.compile == mode
        assert compute_dtype(config.parallel, torch.device(device)) is dtype
        assert config.stage.document_mask is packed
        flash = packs_documents(device, dtype is torch.bfloat16, config.model.d_head)
        assert flash is (device == "cuda" and dtype is torch.bfloat16)
