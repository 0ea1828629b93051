"""The engine of a single process: what it computes in."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_lm.generation import session
from dist_lm.prepare.compose import compose_config
from tests.conftest import TINY


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((8, 6), torch.bfloat16)])
def test_an_engine_computes_in_what_the_gpu_has(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    built: list[torch.dtype] = []
    monkeypatch.setattr(session, "Engine", lambda *_, dtype, **__: built.append(dtype))
    tokenizer = SimpleNamespace(eot_id=0, vocabulary=lambda: [])
    loaded: Any = SimpleNamespace(
        config=compose_config(["stage=language", *TINY]).model, weights={}, tokenizer=tokenizer
    )
    session.build_engine(loaded, torch.device("cuda", 0), 1)
    session.build_engine(loaded, torch.device("cpu"), 1)
    assert built == [expected, torch.float32]
