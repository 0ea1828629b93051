"""The transformer: causality, documents, options, dropout, and building without memory.

Dimensions: B sequences, T tokens.
"""

import math
from dataclasses import replace

import pytest
import torch
from small_models import small_config, small_model, small_tokens

from dist_lm.config.model import ModelConfig
from dist_lm.data.batch import Batch
from dist_lm.model.attention import CAUSAL
from dist_lm.model.keyed_random import DropoutKey, initial_value
from dist_lm.model.layers import rope_tables
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer

OPTIONS = {
    "default": {},
    "tied": {"tie_embeddings": True},
    "rmsnorm": {"norm": "rmsnorm"},
    "swiglu": {"ffn": "swiglu"},
    "squared ReLU and capped logits": {"ffn": "relu2", "logit_cap": 2.0},
    "no bias": {"bias": False},
    "value residual": {"value_residual": True},
    "one key head": {"n_kv_heads": 1},
    "normalised queries and keys": {"qk_norm": True},
    "as Pythia": {"parallel_residual": True, "rotary_fraction": 0.5},
    "as Qwen2 with scaled positions": {
        "bias": False,
        "qkv_bias": True,
        "rope_scaling": "llama3",
        "rope_factor": 4.0,
        "rope_original_len": 8,
    },
    "grouped, all options": {
        "d_model": 48,
        "n_heads": 6,
        "n_kv_heads": 2,
        "norm": "rmsnorm",
        "ffn": "swiglu",
        "bias": False,
        "tie_embeddings": True,
        "qk_norm": True,
        "value_residual": True,
    },
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return small_config(**request.param)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def test_later_tokens_change_nothing(config: ModelConfig) -> None:
    model, tokens = small_model(config), small_tokens(config, 2, 12)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % config.vocab_size
    assert close(model(tokens)[:, :7], model(changed)[:, :7])
    assert not close(model(tokens)[:, 7:], model(changed)[:, 7:])


def test_packed_documents_equal_each_alone(config: ModelConfig) -> None:
    model, tokens = small_model(config), small_tokens(config, 2, 20)
    lengths = [[5, 1, 14], [11, 9]]
    document = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = model(tokens, document_BT=document, position_BT=position)
    for b, row in enumerate(lengths):
        ends = torch.tensor(row).cumsum(0).tolist()
        for start, end in zip([0, *ends], ends, strict=False):
            assert close(packed[b : b + 1, start:end], model(tokens[b : b + 1, start:end]))


def test_only_relative_positions_matter(config: ModelConfig) -> None:
    model, tokens = small_model(config), small_tokens(config, 1, 10)
    assert close(model(tokens), model(tokens, position_BT=torch.arange(10)[None] + 17))
    assert not close(model(tokens), model(tokens, position_BT=2 * torch.arange(10)[None]))


def test_lengths_of_queries_and_keys_count_only_without_qk_norm() -> None:
    for qk_norm in (False, True):
        config = small_config(qk_norm=qk_norm, bias=False, norm_eps=1e-8)
        model, tokens = small_model(config), small_tokens(config, 2, 12)
        expected = model(tokens)
        for block in model.blocks:
            block.attention.query.data *= 3
            block.attention.key.data *= 0.5
        assert close(model(tokens), expected) is qk_norm


def test_normalised_queries_and_keys_are_those_of_the_formula() -> None:
    """RMSNorm over d_head with one weight for all heads (Qwen3), written out, at position 0 where nothing rotates."""
    config = small_config(qk_norm=True, n_layers=1)
    attention, T = small_model(config).blocks[0].attention, 6
    for norm in (attention.query_norm, attention.key_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    x_BTD = torch.randn(1, T, config.d_model, generator=torch.Generator().manual_seed(0))
    at_start = rope_tables(torch.zeros(1, T, dtype=torch.int64), config, torch.float32)
    q_HTK, k_HTK, v_HTK = (
        torch.einsum("td,hkd->htk", x_BTD[0], getattr(attention, name)) + getattr(attention, f"{name}_bias")[:, None]
        for name in ("query", "key", "value")
    )
    q_HTK, k_HTK = (
        x_HTK / (x_HTK.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * norm.weight
        for x_HTK, norm in ((q_HTK, attention.query_norm), (k_HTK, attention.key_norm))
    )
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    score_HTS = (q_HTK @ k_HTK.mT / math.sqrt(config.d_head)).masked_fill(~seen, -math.inf)
    o_TD = torch.einsum("hts,hsk,hkd->td", score_HTS.softmax(-1), v_HTK, attention.output) + attention.output_bias
    assert close(attention(x_BTD, at_start, CAUSAL)[0][0], o_TD)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_zero_heads_change_nothing(qk_norm: bool) -> None:
    """A module that holds more heads than the config names, filled with zeros, is the same function."""
    config = small_config(qk_norm=qk_norm)
    model, tokens = small_model(config), small_tokens(config, 2, 9)
    expected = model(tokens)
    for block in model.blocks:
        for name in ("query", "key", "value", "output", "query_bias", "key_bias", "value_bias"):
            weight = getattr(block.attention, name)
            padded = torch.cat([weight, torch.zeros_like(weight[:1])])
            setattr(block.attention, name, torch.nn.Parameter(padded))
    assert close(model(tokens), expected)
    model(tokens).square().sum().backward()
    for block in model.blocks:
        assert block.attention.output.grad[:-1].abs().sum() > 0
        assert block.attention.output.grad[-1].abs().sum() == 0
        assert block.attention.query.grad[-1].abs().sum() == 0


def test_dropout_hangs_on_the_sequence_not_on_the_batch() -> None:
    config = small_config()
    model, tokens = small_model(config), small_tokens(config, 4, 12)
    key = DropoutKey(rate=0.3, seed=1, step=2, sequence_B=torch.tensor([10, 11, 12, 13]))
    whole = model(tokens, dropout=key)
    part = model(tokens[2:], dropout=DropoutKey(rate=0.3, seed=1, step=2, sequence_B=key.sequence_B[2:]))
    assert close(whole[2:], part)
    assert not close(whole, model(tokens))
    assert not close(whole, model(tokens, dropout=DropoutKey(0.3, 1, 3, key.sequence_B)))


@pytest.mark.heavy
def test_dropout_keeps_the_mean() -> None:
    """Over many steps, the first layer's input averages to the embedding."""
    config = small_config(n_layers=1)
    model, tokens = small_model(config), small_tokens(config, 1, 8)
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for step in range(250):
        model.hidden(tokens, dropout=DropoutKey(0.2, 0, step, torch.tensor([5])))
    mean = torch.stack(seen).mean(0)
    assert float((mean - model.embedding(tokens)).detach().abs().max()) < 0.2


def test_meta_device_then_filled_equals_built_plainly(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    reference, tokens = small_model(config), small_tokens(config, 2, 8)
    model.to_empty(device="cpu")
    model.load_state_dict(reference.state_dict())
    assert torch.equal(model(tokens), reference(tokens))


def test_head_of_hidden_is_forward(config: ModelConfig) -> None:
    model, tokens = small_model(config), small_tokens(config, 2, 8)
    assert torch.equal(model.head(model.hidden(tokens)), model(tokens))


def test_bfloat16_stays_close(config: ModelConfig) -> None:
    model, tokens = small_model(config), small_tokens(config, 2, 20)
    document = torch.tensor([[0] * 8 + [1] * 12, [0] * 20])
    expected = model(tokens, document_BT=document).detach()
    logits = model.to(torch.bfloat16)(tokens, document_BT=document)
    assert logits.dtype == torch.bfloat16
    assert float((logits.detach().float() - expected).abs().mean()) < 0.03 * float(expected.abs().mean())


def tree(config: ModelConfig, trunk: int, branches: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (1, T) of a trunk and the branches behind it, their branch numbers and positions."""
    tokens = small_tokens(config, 1, trunk + sum(branches))
    branch = torch.tensor([[0] * trunk + [n for n, length in enumerate(branches, 1) for _ in range(length)]])
    position = torch.tensor([[*range(trunk), *(trunk + i for length in branches for i in range(length))]])
    return tokens, branch, position


@pytest.mark.parametrize(
    "changes", [{}, {"ffn": "swiglu", "norm": "rmsnorm", "n_kv_heads": 1}], ids=["plain", "groups"]
)
def test_branches_behind_one_trunk_score_as_each_would_alone(changes: dict) -> None:
    config = small_config(head="scalar", **changes)
    model, branches = small_model(config), [4, 1, 7]
    tokens, branch, position = tree(config, 6, branches)
    batch = replace(Batch.plain(tokens), position_BT=position, branch_BT=branch)
    together = model.scores(batch)[0]
    assert together.dtype == torch.float32
    begin = 6
    for length in branches:
        alone = model.scores(Batch.plain(torch.cat([tokens[:, :6], tokens[:, begin : begin + length]], dim=1)))[0]
        torch.testing.assert_close(together[begin : begin + length], alone[6:], rtol=0, atol=1e-5)
        torch.testing.assert_close(together[:6], alone[:6], rtol=0, atol=1e-5)
        begin += length


def test_a_scalar_head_takes_the_place_of_the_head_of_tokens() -> None:
    for tied in (False, True):
        config = small_config(head="scalar", tie_embeddings=tied)
        names = {name: tuple(value.shape) for name, value in small_model(config).named_parameters()}
        assert list(names.items()) == list(parameter_shapes(config).items())
        assert "lm_head.weight" not in names
        assert names["scalar_head.weight"] == (1, config.d_model)


@pytest.mark.parametrize("chunk_bytes", [0, 3 * 4 * 64])
def test_losses_of_the_tokens_that_count_are_those_of_all(config: ModelConfig, chunk_bytes: int) -> None:
    model, tokens = small_model(config), small_tokens(config, 3, 9)
    mask = (torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    model.chunk_bytes = chunk_bytes
    gradients = []
    for counted in (None, mask.flatten().nonzero().flatten(), torch.empty(0, dtype=torch.long)):
        model.zero_grad()
        batch = replace(Batch.plain(tokens[:, :-1], tokens[:, 1:]), logit_index_N=counted)
        (model.token_losses(batch) * mask).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for whole, chosen in zip(*gradients[:2], strict=True):
        torch.testing.assert_close(chosen, whole, rtol=1e-4, atol=1e-5)
    assert all(bool(gradient.eq(0).all()) for gradient in gradients[2])


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("what", ["scores", "logprobs"])
def test_tokens_that_are_only_attended_to_skip_the_last_feed_forward_and_change_nothing(
    what: str, parallel: bool
) -> None:
    config = small_config(head="scalar" if what == "scores" else "tokens", parallel_residual=parallel)
    model, tokens = small_model(config), small_tokens(config, 3, 9)
    document = torch.tensor([[0] * 4 + [1] * 5] * 3)
    rows: list[int] = []
    model.blocks[-1].feed_forward.register_forward_hook(lambda *call: rows.append(call[2][..., 0].numel()))

    def ask(counted: torch.Tensor | None) -> torch.Tensor:
        batch = replace(Batch.plain(tokens), document_BT=document, logit_index_N=counted)
        if what == "scores":
            return model.scores(batch, counted).flatten()
        return torch.stack(model.logprobs(batch, 0.7, entropy_gradient=True), dim=-1).flatten(0, 1)

    gradients = []
    for counted in (None, torch.tensor([1, 2, 9, 17, 26]), torch.empty(0, dtype=torch.long)):
        model.zero_grad()
        found = ask(counted)
        chosen = torch.tensor([1, 2, 9, 17, 26]) if counted is None else counted
        found[chosen].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        others = torch.ones(len(found), dtype=torch.bool).index_fill_(0, chosen, False)
        assert counted is None or bool(found[others].eq(0).all())
    assert rows == [27, 5, 0]
    for whole, part in zip(*gradients[:2], strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)
    assert all(bool(gradient.eq(0).all()) for gradient in gradients[2])


def test_logits_are_capped_by_a_hyperbolic_tangent_in_logits_losses_and_logprobs():
    plain, model = small_model(small_config()), small_model(small_config(logit_cap=0.5))
    tokens = small_tokens(plain.config, 2, 12)
    wanted = 0.5 * (plain(tokens) / 0.5).tanh()
    torch.testing.assert_close(model(tokens), wanted)
    assert plain(tokens).abs().max() > 1
    targets = small_tokens(plain.config, 2, 12).flip(1)
    zeros = torch.zeros_like(tokens)
    batch = Batch(tokens, targets, torch.ones(2, 12), zeros, torch.arange(12).expand(2, -1), torch.arange(2))
    losses = torch.nn.functional.cross_entropy(wanted.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(model.token_losses(batch), losses)
    torch.testing.assert_close(model.logprobs(batch, 1.0).logprob_BT, -losses)


def test_squared_relu_is_the_activation():
    model = small_model(small_config(ffn="relu2", bias=False))
    network, x = model.blocks[0].feed_forward, torch.randn(1, 3, 40, generator=torch.Generator().manual_seed(0))
    hidden = (x @ network.up.weight.T).clamp(min=0) ** 2
    torch.testing.assert_close(network(x), hidden @ network.down.weight.T)


def test_values_of_a_layer_are_mixed_with_those_of_the_first():
    config = small_config(value_residual=True, n_layers=3, bias=False)
    model, tokens = small_model(config), small_tokens(config, 1, 7)
    plain = Transformer(replace(config, value_residual=False))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "value_mix" not in name})
    mixes = [block.attention.value_mix for block in model.blocks]
    assert mixes[0] is None
    assert initial_value("blocks.1.attention.value_mix", (2,), config, 0).tolist() == [0.5, 0.5]
    for mix in mixes[1:]:
        mix.data.copy_(torch.tensor([1.0, 0.0]))
    assert close(model(tokens), plain(tokens))
    for mix in mixes[1:]:
        mix.data.copy_(torch.tensor([0.0, 1.0]))
    expected = model(tokens)
    for block in model.blocks[1:]:
        block.attention.value.data.zero_()
    assert close(model(tokens), expected)
    model.blocks[0].attention.value.data *= 2
    assert not close(model(tokens), expected)


def test_mixed_values_are_those_of_the_formula():
    config = small_config(value_residual=True, bias=False)
    attention, generator = small_model(config).blocks[1].attention, torch.Generator().manual_seed(0)
    attention.value_mix.data.copy_(torch.tensor([0.25, 2.0]))
    x_TD = torch.randn(7, config.d_model, generator=generator)
    first_TGK = torch.randn(7, config.n_heads, config.d_head, generator=generator)
    at_start = rope_tables(torch.zeros(1, 7, dtype=torch.int64), config, torch.float32)
    q_HTK, k_HTK, v_HTK = (torch.einsum("td,hkd->htk", x_TD, getattr(attention, n)) for n in ("query", "key", "value"))
    v_HTK = 0.25 * v_HTK + 2 * first_TGK.transpose(0, 1)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()
    score_HTS = (q_HTK @ k_HTK.mT / math.sqrt(config.d_head)).masked_fill(~seen, -math.inf)
    wanted_TD = torch.einsum("hts,hsk,hkd->td", score_HTS.softmax(-1), v_HTK, attention.output)
    found_BTD, passed_on = attention(x_TD[None], at_start, CAUSAL, first_TGK[None])
    assert close(found_BTD[0], wanted_TD)
    assert torch.equal(passed_on[0], first_TGK)
