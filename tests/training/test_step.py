"""One optimizer step: the same however the batch is cut, and nothing at all when gradients are not finite."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_lm.config.stage import MuonConfig, StageConfig
from dist_lm.data.batch import Batch
from dist_lm.model.cross_entropy import token_losses
from dist_lm.parallel.values import squared_norms
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.objective import LossSum, next_token
from dist_lm.training.optimizer import build_optimizer, named_state
from dist_lm.training.step import accumulate_gradients, gradients_by_group, update
from dist_lm.training.step_meter import WallLaps
from tests.model.small_models import small_config, small_model, small_tokens

VOCAB = 11


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Toy(nn.Module):
    """Embedding and head."""

    def __init__(self):
        super().__init__()
        self.config = small_config()
        self.trained_tokens = None
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCAB, 6)
        self.final_norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, VOCAB)

    def token_losses(self, batch: Batch, label_smoothing: float = 0.0, z_loss: float = 0.0) -> torch.Tensor:
        logits = self.lm_head(self.final_norm(self.embedding(batch.tokens_BT)))
        losses = token_losses(logits.flatten(0, 1), batch.targets_BT.flatten(), label_smoothing, z_loss)
        return losses.view_as(batch.targets_BT)


def batch_of(rows: slice) -> Batch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB, (8, 5), generator=generator)
    mask = (torch.rand(8, 4, generator=generator) > 0.3).float()
    zeros = torch.zeros(8, 4, dtype=torch.int64)
    whole = (tokens[:, :-1], tokens[:, 1:], mask, zeros, zeros, torch.arange(8))
    return Batch(*(part[rows] for part in whole))


def step(model, optimizer, batches, objective=None, grad_clip=1.0, laps=None):
    sums = accumulate_gradients(model, objective or next_token(0.1), batches)
    return update(model, optimizer, sums, grad_clip=grad_clip, adds_sums=True, stop=StopRequest(), laps=laps)


def step_of_the_host(model, optimizer, batches, grad_clip):
    """The same step with every decision taken by the host: it reads norm and count, then clips, then steps or not."""
    sums = accumulate_gradients(model, next_token(0.1), batches)
    groups = gradients_by_group(model)
    squares = squared_norms(list(groups.values())).tolist()
    divisor = max(sums.total_and_count[1].item(), 1.0)
    grad_norm = math.sqrt(sum(squares)) / divisor
    clip = grad_clip / grad_norm if grad_clip and grad_norm > grad_clip else 1.0
    if math.isfinite(grad_norm):
        torch._foreach_mul_([gradient for group in groups.values() for gradient in group], clip / divisor)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


MUON = MuonConfig(lr=0.02, variance_beta=0.9)


def trained_pair(muon):
    """Two equal models with an optimizer each, and the batch they learn."""
    config = small_config(qk_norm=True)
    stage = StageConfig(name="test", lr=1e-2, weight_decay=0.1)
    tokens = small_tokens(config, 4, 17)
    batch = Batch.plain(tokens[:, :-1], tokens[:, 1:])
    models = [small_model(config) for _ in range(2)]
    return [(model, build_optimizer(model, stage, muon)) for model in models], batch


def bits_of(model, optimizer):
    return {**dict(model.named_parameters()), **dict(named_state(model, optimizer))}


@pytest.mark.parametrize("muon", [None, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("grad_clip", [0.0, 0.05, 1e3], ids=["off", "clipped", "not reached"])
def test_a_step_decided_on_the_device_has_the_bits_of_one_decided_by_the_host(muon, grad_clip):
    """A factor in another dtype, a sum in another order or a division by a reciprocal: the last bit of every weight."""
    ((model, optimizer), (reference, its_optimizer)), batch = trained_pair(muon)
    for _ in range(2):
        result = step(model, optimizer, [batch], grad_clip=grad_clip, laps=WallLaps())
        assert result.grad_norm == step_of_the_host(reference, its_optimizer, [batch], grad_clip)
    expected = bits_of(reference, its_optimizer)
    assert [n for n, value in bits_of(model, optimizer).items() if not torch.equal(value, expected[n])] == []


@pytest.mark.parametrize("muon", [None, MUON], ids=["adamw", "muon"])
def test_a_skipped_step_leaves_no_trace_in_what_follows(muon):
    """Moments, counters or variances that a skipped step moves show in the next step, if not at once."""
    ((model, optimizer), (reference, its_optimizer)), batch = trained_pair(muon)

    def broken(forward, batch):
        loss = next_token(0.1)(forward, batch)
        return LossSum(loss.total * float("nan"), loss.count)

    objectives = [None, broken, broken, None]
    assert [step(model, optimizer, [batch], chosen).applied for chosen in objectives] == [True, False, False, True]
    for _ in range(2):
        step(reference, its_optimizer, [batch])
    expected = bits_of(reference, its_optimizer)
    assert [n for n, value in bits_of(model, optimizer).items() if not torch.equal(value, expected[n])] == []


def optimizer_of(model):
    return build_optimizer(model, StageConfig(name="test", lr=1e-2, weight_decay=0.1))


@pytest.mark.parametrize("cuts", [(8,), (4, 4), (1, 2, 5), (1,) * 8], ids=str)
def test_the_step_does_not_depend_on_how_the_batch_is_cut(cuts):
    results = []
    for pieces in ((8,), cuts):
        model = Toy()
        optimizer = optimizer_of(model)
        starts = [sum(pieces[:i]) for i in range(len(pieces))]
        batches = [batch_of(slice(start, start + size)) for start, size in zip(starts, pieces, strict=True)]
        result = step(model, optimizer, batches)
        results.append((result.loss, result.grad_norm, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert results[1][:2] == pytest.approx(results[0][:2], rel=1e-6)
    torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-5, atol=1e-7)


def test_the_step_is_that_of_torch_on_the_mean_loss():
    model, reference = Toy(), Toy()
    batch = batch_of(slice(0, 8))
    step(model, optimizer_of(model), [batch], grad_clip=0.05)
    loss = next_token(0.1)(reference, batch)
    (loss.total / loss.count).backward()
    nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
    optimizer_of(reference).step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_change_nothing(bad):
    model = Toy()
    optimizer = optimizer_of(model)
    before = [p.detach().clone() for p in model.parameters()]

    def broken(forward, batch):
        loss = next_token(0.0)(forward, batch)
        return LossSum(loss.total * bad, loss.count)

    result = step(model, optimizer, [batch_of(slice(0, 8))], broken)
    assert not result.applied
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
    assert all(not state.any() for _, state in named_state(model, optimizer))
    assert step(model, optimizer, [batch_of(slice(0, 8))]).applied
