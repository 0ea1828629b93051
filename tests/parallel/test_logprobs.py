"""Log-probabilities and entropies at a temperature, and their gradients, are those of one process on any layout."""

import numpy as np
import pytest
import torch

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import ModelConfig
from dist_lm.data.batch import Batch
from dist_lm.model.keyed_random import initialise
from dist_lm.model.token_sets import TokenSets, packed
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.parallel.values import reduce_partial_gradients
from tests.parallel.ranks import RankGroups
from tests.parallel.training_task import whole

MODEL = ModelConfig(
    name="small", d_model=40, n_layers=2, n_heads=5, d_ff=72, max_seq_len=48, vocab_size=65, init_std=0.2
)
SEED, TEMPERATURE = 3, 0.7


def batch() -> Batch:
    tokens = torch.randint(0, MODEL.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    document = torch.tensor([0] * 5 + [1] * 7).expand(3, -1)
    position = torch.tensor([*range(5), *range(7)]).expand(3, -1)
    counted = torch.tensor([1, 2, 9, 17, 30, 31, 35])
    return Batch(tokens, tokens.roll(-1, 1), torch.ones(3, 12), document, position, torch.arange(3), counted)


def kept_tokens() -> torch.Tensor:
    """(N, V) bool: a set for each counted token, its target inside: of one token, of a few, of many, of all."""
    targets = batch().targets_BT.flatten()[batch().logit_index_N]
    sizes = torch.tensor([1, 2, 3, 20, 40, 5, MODEL.vocab_size])
    order = torch.rand(len(targets), MODEL.vocab_size, generator=torch.Generator().manual_seed(1)).argsort(-1)
    kept = torch.zeros(order.shape, dtype=torch.bool)
    for row, size in enumerate(sizes.tolist()):
        kept[row, order[row, :size]] = True
        kept[row, targets[row]] = True
    return kept


def sets() -> TokenSets:
    parts = [packed(row.nonzero()[:, 0].numpy(), MODEL.vocab_size) for row in kept_tokens()]
    parts[-1] = b""  # the whole vocabulary
    size_N = torch.tensor([len(one) for one in parts])
    return TokenSets(torch.frombuffer(bytearray().join(parts), dtype=torch.uint8), size_N.cumsum(0) - size_N, size_N)


def outcome(model: Transformer, entropy_gradient: bool, of_sets: bool) -> dict[str, np.ndarray]:
    found = model.logprobs(batch(), TEMPERATURE, entropy_gradient, sets() if of_sets else None)
    weight = torch.linspace(-1, 1, 36).view(3, 12)
    (weight * found.logprob_BT + (0.3 * found.entropy_BT.square() if entropy_gradient else 0)).sum().backward()
    reduce_partial_gradients(model)
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    cut = {name: value[tuple(slice(n) for n in shape)] for name, value in gradients.items()
           for shape in [dict(Transformer(MODEL).named_parameters())[name].shape]}  # fmt: skip
    values = {"logprob": found.logprob_BT.detach(), "entropy": found.entropy_BT.detach()} | cut
    return {name: value.numpy() for name, value in values.items()}


def on_ranks(world: World, tp: int, chunk_bytes: int, entropy_gradient: bool, of_sets: bool) -> dict[str, np.ndarray]:
    parallel = ParallelConfig(tp=tp)
    mesh = build_mesh(resolve_layout(parallel, MODEL, world.size), world.device)
    model = build_model(MODEL, parallel, mesh, world.device, SEED)
    model.chunk_bytes = chunk_bytes
    return outcome(model, entropy_gradient, of_sets)


@pytest.mark.heavy
@pytest.mark.parametrize("of_sets", [False, True], ids=["all tokens", "sets"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize(("size", "tp", "chunk_bytes"), [(1, 1, 1000), (2, 2, 0), (2, 2, 1000), (3, 3, 1)])
def test_they_are_those_of_one_process(
    ranks: RankGroups, size: int, tp: int, chunk_bytes: int, entropy_gradient: bool, of_sets: bool
):
    found = ranks.run(size, on_ranks, tp, chunk_bytes, entropy_gradient, of_sets)
    model = Transformer(MODEL)
    initialise(model, SEED)
    expected = outcome(model, entropy_gradient, of_sets)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=2e-5, err_msg=name)
    hidden = model.hidden(batch().tokens_BT, document_BT=batch().document_BT, position_BT=batch().position_BT)
    own, entropy = dense_logprobs(model.head(hidden).flatten(0, 1)[batch().logit_index_N], of_sets)
    weight = torch.linspace(-1, 1, 36)[batch().logit_index_N]
    loss = (weight * own + (0.3 * entropy.square() if entropy_gradient else 0)).sum()
    gradient = torch.autograd.grad(loss, model.head_weight)[0]
    np.testing.assert_allclose(found["lm_head.weight"], gradient.numpy(), rtol=1e-4, atol=2e-5)
    for name, definition in (("logprob", own), ("entropy", entropy)):
        definition = definition.detach().numpy()
        np.testing.assert_allclose(found[name].flatten()[batch().logit_index_N], definition, rtol=1e-5, atol=1e-5)
        left_out = np.delete(found[name].flatten(), batch().logit_index_N.numpy())
        assert not left_out.any()


def dense_logprobs(logits_NV: torch.Tensor, of_sets: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """By the definition: the softmax of the kept logits of each row alone."""
    kept_NV, targets_N = kept_tokens(), batch().targets_BT.flatten()[batch().logit_index_N]
    own, entropy = [], []
    for logits_V, kept_V, target in zip(logits_NV / TEMPERATURE, kept_NV, targets_N, strict=True):
        kept_V = kept_V if of_sets else torch.ones_like(kept_V)
        p_K = logits_V[kept_V].exp() / logits_V[kept_V].exp().sum()
        own.append((logits_V[target].exp() / logits_V[kept_V].exp().sum()).log())
        entropy.append(-(p_K * p_K.log()).sum())
    return torch.stack(own), torch.stack(entropy)
