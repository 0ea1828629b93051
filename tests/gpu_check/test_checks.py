"""Checks pass where the code is right and find a fault that is put in; on a CPU, at the sizes of a rehearsal."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from dist_lm.generation.engine import Engine
from dist_lm.gpu_check import arithmetic, engine, training
from dist_lm.gpu_check.probe import CheckFailedError, Probe
from dist_lm.model.attention import CAUSAL
from dist_lm.parallel.mesh import World
from dist_lm.training import checkpoint


@pytest.fixture
def probe(tmp_path) -> Iterator[Probe]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Probe(tmp_path, 1, rehearsal=True, process_group=World(0, 1, 0, torch.device("cpu")))
    dist.destroy_process_group()


def blind_to_documents(q, k, v, visibility, attend=arithmetic.attend):
    """In bf16, which is what the card computes."""
    return attend(q, k, v, CAUSAL if q.dtype == torch.bfloat16 else visibility)


def without_gradient(q, k, v, visibility, attend=arithmetic.attend):
    return attend(q, k.detach() if q.dtype == torch.bfloat16 else k, v, visibility) + 0 * k.mean()


@pytest.mark.parametrize("check", [arithmetic.varlen, arithmetic.masks])
@pytest.mark.parametrize("fault", [blind_to_documents, without_gradient])
def test_wrong_attention_is_found(probe, monkeypatch, check, fault):
    check(probe)
    assert all(0 < value <= arithmetic.HALF_ERROR for value in probe.facts.values())
    monkeypatch.setattr(arithmetic, "attend", fault)
    with pytest.raises(CheckFailedError, match="of the largest value"):
        check(probe)


def test_other_bits_are_found(probe, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda site, token_T: function(site, token_T + 1))
    with pytest.raises(CheckFailedError, match="compiled dropout masks differ"):
        arithmetic.bits(probe)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    arithmetic.bits(probe)
    drawn = iter((0.0, 1e-9))
    monkeypatch.setattr(arithmetic, "uniform", lambda seed_N, position_N: torch.full((4,), next(drawn)).double())
    with pytest.raises(CheckFailedError, match="sampling"):
        arithmetic.bits(probe)


def test_an_engine_that_keeps_old_weights_is_found(probe, monkeypatch):
    load_weights = Engine.load_weights
    monkeypatch.setattr(
        Engine, "load_weights", lambda own, weights, version: None if version else load_weights(own, weights, version)
    )
    with pytest.raises(CheckFailedError, match="new weights, prompt of 1 tokens"):
        engine.engine(probe)


@pytest.mark.heavy
def test_a_checkpoint_without_moments_is_found(probe, monkeypatch):
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path, model, optimizer, config: load(path, model, None, config))
    with pytest.raises(CheckFailedError, match="tensors differ from those saved"):
        training.save(probe)
