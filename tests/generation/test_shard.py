"""What ranks hold of a model adds up to the model."""

from dataclasses import replace

import pytest
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ConfigError
from dist_lm.generation.shard import check_tp, cut, part_shapes, share_of
from dist_lm.model.attention import CAUSAL, attend, from_heads, to_heads
from dist_lm.model.layers import activate
from dist_lm.model.size import parameter_shapes

ODD = ModelConfig(name="odd", d_model=50, n_layers=1, n_heads=25, d_ff=72, max_seq_len=8, vocab_size=61)
FIVE = replace(ODD, d_model=40, n_heads=5, d_ff=50)
GROUPS = replace(
    FIVE, n_heads=10, n_kv_heads=2, ffn="swiglu", bias=False, qkv_bias=True, tie_embeddings=True, qk_norm=True
)
ALL_HEADS = replace(GROUPS, qk_norm_span="all")
ONE_KEY = replace(FIVE, n_kv_heads=1, ffn="swiglu")
CUTS = [
    *((ODD, tp) for tp in (1, 2, 4, 8)),
    *((FIVE, tp) for tp in (2, 4)),
    *((ALL_HEADS, tp) for tp in (3, 4)),
    *((GROUPS, tp) for tp in (2, 3, 4, 5)),  # over 4, a rank's query heads read two key heads unequally
    *((ONE_KEY, tp) for tp in (2, 4)),
]


def weights_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in parameter_shapes(config).items()}


def attention(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    def of(name: str) -> torch.Tensor | None:
        return weights.get(f"blocks.0.attention.{name}")

    q, k, v = (to_heads(x, of(name), of(f"{name}_bias")) for name in ("query", "key", "value"))
    return from_heads(attend(q, k, v, CAUSAL), of("output"), of("output_bias"))


def feed_forward(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        prefix = f"blocks.0.feed_forward.{name}"
        return torch.nn.functional.linear(x, weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias"))

    gate = layer("gate", x) if "blocks.0.feed_forward.gate.weight" in weights else None
    return layer("down", activate(layer("up", x), gate, "gelu" if gate is None else "swiglu"))


@pytest.mark.parametrize(("config", "tp"), CUTS)
def test_what_ranks_compute_adds_up_to_what_one_computes(config, tp):
    weights = weights_of(config)
    shares = [share_of(config, tp, rank) for rank in range(tp)]
    parts = [{name: cut(name, value, share) for name, value in weights.items()} for share in shares]
    x = torch.randn(2, 7, config.d_model, dtype=torch.float64)
    for compute in (attention, feed_forward):
        torch.testing.assert_close(sum(compute(part, x) for part in parts), compute(weights, x))
    for name in ("embedding.weight", *(() if config.tie_embeddings else ("lm_head.weight",))):
        pieces = torch.cat([part[name] for part in parts])
        assert torch.equal(pieces[: config.vocab_size], weights[name])
        assert not pieces[config.vocab_size :].any()


@pytest.mark.parametrize(("config", "tp"), CUTS)
def test_every_rank_computes_as_much_and_knows_the_shapes_of_its_parts(config, tp):
    weights = weights_of(config)
    shares = [share_of(config, tp, rank) for rank in range(tp)]
    assert len({(share.n_heads, share.units.held, share.vocab.held) for share in shares}) == 1
    for share in shares:
        assert share.n_heads % share.kv_heads == 0
        found = {name: tuple(cut(name, value, share).shape) for name, value in weights.items()}
        assert found == part_shapes(config, share)
        assert found["blocks.0.attention.query"] == (share.n_heads, config.d_head, config.d_model)
        assert found["blocks.0.attention.key"] == (share.kv_heads, config.d_head, config.d_model)


@pytest.mark.parametrize(
    ("tp", "devices", "words"),
    [
        (0, None, "tp=0: expected a positive integer"),
        (6, None, r"tp=6: expected a degree.*more than model\.n_heads=5"),
        (4, 2, "tp=4: expected at most 2, the GPUs that one node has"),
    ],
)
def test_what_cannot_be_cut_is_refused(tp, devices, words):
    with pytest.raises(ConfigError, match=words):
        check_tp(FIVE, tp, devices)
