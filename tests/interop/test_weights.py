"""Our model equals transformers' in every family: logits, gradients, and tensors there and back."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.interop.weights import converted
from dist_lm.model.size import parameter_shapes
from tests.interop.hf_models import (
    FAMILIES,
    SCORED,
    SHAPES,
    architecture,
    our_model,
    sized,
    small,
    their_model,
    tokens_for,
)

pytest.importorskip("transformers")


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize(("family", "size"), SHAPES)
def test_logits_of_every_size_are_those_of_transformers(family: str, size: str):
    ours = our_model(sized(size, family))
    tokens = tokens_for(ours.config, 24)
    with torch.no_grad():
        our_logits, their_logits = ours(tokens), their_model(ours)(tokens).logits
    assert float((our_logits - their_logits).abs().max()) < 1e-5 * float(their_logits.abs().max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers(family: str, tied: bool):
    ours = our_model(small(family, tie_embeddings=tied, rope_base=500.0))
    theirs = their_model(ours)
    tokens = tokens_for(ours.config)
    next_token_loss(ours(tokens), tokens).backward()
    next_token_loss(theirs(tokens).logits, tokens).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    if "lm_head.weight" in gradients and architecture(ours.config).family == "GPTNeoX":
        gradients["embed_out.weight"] = gradients["lm_head.weight"]
    own = dict(ours.named_parameters())
    seen = set()
    for one in converted(architecture(ours.config), parameter_shapes(ours.config)):
        for place, name in enumerate(one.ours):
            gradient = own[name].grad
            assert gradient is not None
            assert float((gradient - one.to_ours(gradients[one.name], place)).abs().max()) < 1e-5, name
            # the key bias shifts all scores of a query alike: its gradient is rounding in both
            assert name.endswith("key_bias") or float(gradient.abs().max()) > 1e-4, name
            seen.add(name)
    assert seen == own.keys()


@pytest.mark.parametrize("changes", [{}, {"head_width": 12, "n_kv_heads": 2, "n_heads": 4}], ids=["even", "apart"])
def test_width_of_heads_apart_from_the_model(changes: dict):
    ours = our_model(small("Qwen3", **changes))
    tokens = tokens_for(ours.config)
    with torch.no_grad():
        our_logits, their_logits = ours(tokens), their_model(ours)(tokens).logits
    assert float((our_logits - their_logits).abs().max()) < 1e-5 * float(their_logits.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "head"), [*((family, "tokens") for family in FAMILIES), *((family, "scalar") for family in SCORED)]
)
def test_tensors_come_back(family: str, head: str, dtype: torch.dtype):
    config = small(family, head=head)
    state = our_model(config).to(dtype).state_dict()
    back, shapes = {}, parameter_shapes(config)
    for one in converted(architecture(config), shapes):
        theirs = one.to_theirs([state[name] for name in one.ours])
        assert tuple(theirs.shape) == one.shape
        back |= {name: one.to_ours(theirs, place) for place, name in enumerate(one.ours)}
        assert torch.equal(one.to_theirs([back[name] for name in one.ours]), theirs)
    assert back.keys() == state.keys() - {"scalar_head.bias"}
    assert all(torch.equal(back[name], state[name]) and back[name].shape == shapes[name] for name in back)


@pytest.mark.parametrize("family", SCORED)
def test_scores_differ_by_the_bias_alone(family: str):
    config = small(family, head="scalar")
    ours = our_model(config)
    theirs = their_model(ours)
    theirs.config.pad_token_id = None
    for tokens in tokens_for(config):
        hidden = ours.hidden(tokens[None])[0, -1]
        assert ours.scalar_head is not None
        score, bias = (float(x.detach()) for x in (ours.scalar_head(hidden), ours.scalar_head.bias))
        assert math.isclose(float(theirs(tokens[None]).logits) + bias, score, abs_tol=1e-5)
