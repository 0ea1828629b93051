"""Log-likelihoods of packed trees equal those of whole sequences."""

import pytest
import torch

from dist_lm.generation import likelihood
from dist_lm.generation.decoder import Decoder
from dist_lm.generation.likelihood import Tree, likelihoods
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.prepare.compose import compose_config
from tests.conftest import TINY

CPU = torch.device("cpu")
TREES = (
    Tree((1, 5, 9, 9, 3), ((7, 8), (4,), (7, 6, 5, 4))),
    Tree((2,), ((3, 3, 3),)),
    Tree(tuple(range(10, 60)), ((61,), (62,))),  # continuations that need no token of their own
)
SHAPES = {
    "neox": (),
    "llama": ("model.norm=rmsnorm", "model.ffn=swiglu", "model.bias=false", "model.n_heads=4", "model.n_kv_heads=2"),
    "value residual": ("model.value_residual=true",),
    "squared and capped": ("model.norm=rmsnorm", "model.ffn=relu2", "model.logit_cap=1"),
}


def model_of(shape: str) -> Transformer:
    model = Transformer(compose_config(["stage=code", *TINY, "model.init_std=0.2", *SHAPES[shape]]).model)
    initialise(model, seed=1)
    return model.requires_grad_(requires_grad=False)


def decoder_of(model: Transformer) -> Decoder:
    decoder = Decoder(model.config, 2, 64, torch.float32, CPU)
    with torch.inference_mode():
        decoder.load(dict(model.named_parameters()))
    return decoder


def alone(model: Transformer, context: tuple[int, ...], continuation: tuple[int, ...]) -> tuple[list[float], bool]:
    """By the model on the whole sequence."""
    tokens = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits_TV = model(tokens)[0, len(context) - 1 : -1].float()
    target = torch.tensor(continuation)
    found = logits_TV.log_softmax(-1).gather(1, target[:, None])[:, 0]
    return found.tolist(), bool((logits_TV.argmax(-1) == target).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [1, 40, 1024])
def test_every_continuation_has_the_likelihood_of_its_whole_sequence(shape, packed, monkeypatch):
    monkeypatch.setitem(likelihood.PACKED_TOKENS, "cpu", packed)
    monkeypatch.setitem(likelihood.LOGIT_ROWS, "cpu", 3)
    model = model_of(shape)
    found = list(likelihoods(decoder_of(model), TREES, CPU))
    assert [len(one) for one in found] == [len(tree.continuations) for tree in TREES]
    for tree, several in zip(TREES, found, strict=True):
        for continuation, own in zip(tree.continuations, several, strict=True):
            logprobs, is_greedy = alone(model, tree.context, continuation)
            assert own.logprobs == pytest.approx(logprobs, abs=1e-5)
            assert own.is_greedy == is_greedy
            assert own.total == pytest.approx(sum(logprobs), abs=1e-5)


def test_a_greedy_continuation_is_found():
    model = model_of("neox")
    tokens = [4, 5, 6]
    for _ in range(3):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    greedy, other = tuple(tokens[3:]), (*tokens[3:5], (tokens[5] + 1) % model.config.vocab_size)
    ((first, second),) = likelihoods(decoder_of(model), [Tree((4, 5, 6), (greedy, other))], CPU)
    assert first.is_greedy
    assert not second.is_greedy


def test_a_tree_counts_the_tokens_to_compute():
    assert [tree.inputs for tree in TREES] == [5 + 1 + 0 + 3, 3, 50]
