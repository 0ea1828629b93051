"""The transformer as the engine runs it: the arithmetic of `dist_lm.model` over a paged KV cache.

Weights are laid out once for their device, and a step is a short loop over plain tensors. A test holds parity with the
model.

Dimensions: N tokens, B sequences, D d_model, V vocabulary, H query heads, G key/value heads, K d_head.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError
from dist_lm.generation.flash_pages import PAGE_TOKENS, DecodeGraphs, FlashPages, FlashPlan
from dist_lm.generation.linear import VECTOR, Linear, build_linear
from dist_lm.generation.paged_cache import PagedCache, Piece, Plan, pages_for
from dist_lm.generation.plain_pages import PLAIN_PAGE_TOKENS, PlainPages
from dist_lm.generation.shard import Share, build_embedding, gathering, leaving, share_of
from dist_lm.generation.transfer import upload
from dist_lm.model.layers import RopeTables, activate, capped, mix_values, normalise_heads, rope_tables, rotate
from dist_lm.model.size import VALUE_MIX, packs_documents, parameter_shapes
from dist_lm.parallel.tensor_axis import TensorAxis

Norm = Callable[[torch.Tensor], torch.Tensor]
LookUp = Callable[[str], torch.Tensor]  # the parameter of a name, on the device
WeightStream = Iterable[tuple[str, torch.Tensor]]
"""Parameters with their names in the order of `parameter_shapes`; a decoder holds a block of them at a time."""
Weights = Mapping[str, torch.Tensor] | WeightStream
Keep = Callable[[str, torch.Tensor], torch.Tensor]  # the tensor to compute with in place of a new one, see `Decoder`


@dataclass(frozen=True)
class _Layer:
    attention_norm: Norm
    heads: Linear  # queries, keys and values of all heads, concatenated
    head_norm: torch.Tensor | None  # (H + G, K); weights of the norms of queries and keys
    value_mix: torch.Tensor | None  # (2,), see `mix_values`
    output: Linear
    feed_forward_norm: Norm
    up: Linear  # with its activation; of a gated network: gate and up concatenated, without activation
    down: Linear


class Decoder:
    """A model and its cache: a whole model, or one rank's part of it."""

    def __init__(
        self,
        config: ModelConfig,
        n_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        share: Share | None = None,
        axis: TensorAxis | None = None,
    ) -> None:
        """Build the cache; `load` sets the weights.

        Args:
            page_size: tokens of a page.
            share: the part that is computed here; by default the whole model.
            axis: the ranks that compute the other parts; all of them run the same steps.
        """
        self.config = config
        self.share, self.axis = share or share_of(config), axis
        self.cache = build_cache(self.share, n_pages, page_size, dtype, device)
        self._page_size = page_size
        self.dtype, self._device = dtype, device
        position_1T = torch.arange(config.max_seq_len, device=device)[None]
        tables = rope_tables(position_1T, config, dtype)
        self._cos, self._sin = (table[0, :, 0] for table in tables)
        self._layers: list[_Layer] = []
        self._kept: dict[str, torch.Tensor] = {}  # with graphs, which hold addresses: what they read
        self._graphs = self._new_graphs()

    def load(self, weights: Weights) -> None:
        """Replace the weights.

        Raises:
            ArtefactError: names the parameter that is missing or has another shape.
        """
        look_up = looked_up(self.config, weights)
        self.build(lambda name: look_up(name).detach().to(self._device, self.dtype))

    def resize(self, n_pages: int) -> None:
        """Replace the cache by an empty one, and drop the graphs, which hold the addresses of the old one."""
        graphs, self._graphs = self._graphs, None
        del graphs, self.cache
        self.cache = build_cache(self.share, n_pages, self._page_size, self.dtype, self._device)
        self._graphs = self._new_graphs()

    def build(self, look_up: LookUp) -> None:
        """Lay out the weights of this share.

        Args:
            look_up: called once for each parameter, in the same order on every rank; it may receive from another rank.
        """
        config, axis = self.config, self.axis
        # free the old weights first: both may not fit in memory
        self._layers, self._embed, self._head = [], _absent, _absent
        embedding = self._keep("embedding", look_up("embedding.weight").clone())
        self._embed = build_embedding(embedding, self.share.pieces, axis)
        for number in range(config.n_layers):
            self._layers.append(_layer(config, self.share, axis, look_up, self._keep, number))
        self._final_norm = _norm(config, look_up, self._keep, "final_norm")
        head = build_linear(embedding if config.tie_embeddings else self._keep("head", look_up("lm_head.weight")), None)
        self._head = gathering(head, axis, config.vocab_size) if axis else head

    def _new_graphs(self) -> DecodeGraphs | None:
        """Graphs of decode steps, if the device has them; steps with collectives run eagerly."""
        if not isinstance(self.cache, FlashPages) or self._device.type != "cuda" or self.axis is not None:
            return None
        return DecodeGraphs(self._decode, self.cache, pages_for(self.config.max_seq_len, self._page_size))

    def _keep(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """With graphs, the tensor of the first build with these values, so that graphs stay valid."""
        if self._graphs is None:
            return tensor
        if name not in self._kept:
            self._kept[name] = tensor.clone()  # it may be the caller's
            return self._kept[name]
        return self._kept[name].copy_(tensor)

    def prefill(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Compute and cache pieces. Returns fp32 logits (pieces, V) after the last token of each."""
        plan = self.cache.plan_prefill(pieces)
        place_X = self.cache.places(plan.written_N)

        def attend(layer: int, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            self.cache.write(layer, place_X, key, value)
            return self.cache.prefill(layer, q, key, value, plan)

        tokens = [token for piece in pieces for token in piece.tokens]
        ends = [*accumulate(len(piece.tokens) for piece in pieces)]
        token_N, end_P = upload(self._device, torch.tensor(tokens), torch.tensor(ends))
        x_ND = self.hidden(token_N, plan.position_N, attend)
        return self.logits(x_ND[end_P - 1])

    def decode(self, tokens: Sequence[int], plan: Plan) -> torch.Tensor:
        """Compute and cache one token per sequence. Returns fp32 logits (B, V); the next step may overwrite them."""
        (token_B,) = upload(self._device, torch.tensor(tokens))
        if self._graphs is not None and isinstance(plan, FlashPlan):
            return self._graphs(token_B, plan)
        return self._decode(token_B, plan)

    def _decode(self, token_B: torch.Tensor, plan: Plan) -> torch.Tensor:
        place_X = self.cache.places(plan.written_B)

        def attend(layer: int, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            self.cache.write(layer, place_X, key, value)
            return self.cache.decode(layer, q, plan)

        return self.logits(self.hidden(token_B, plan.position_B, attend))

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> Plan:
        """Plan a decode step: sequence b holds `pages[b]` and adds a token at `positions[b]`."""
        return self.cache.plan(pages, positions)

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page to another, in all layers."""
        self.cache.copy_page(source, target)

    def clear(self, pages: Sequence[int]) -> None:
        """Write zeros, so that no nan stays behind for the next holder."""
        self.cache.clear(pages)

    def save(self, pages: Sequence[int]) -> Any:
        """Copy the content of pages to host memory, for `restore` or `forget`."""
        return self.cache.save(pages)

    def restore(self, pages: Sequence[int], content: Any) -> None:
        """Write content that `save` returned to as many pages."""
        self.cache.restore(pages, content)

    def forget(self, content: Any) -> None:
        """Drop content that `save` returned. Nothing to do here; `ShardedDecoder` tells the other ranks."""

    def check(self) -> None:
        """Raise if the last results may be wrong. Nothing to do here; see `ShardedDecoder`."""

    def close(self) -> None:
        """End other processes of the model. Nothing to do here; see `ShardedDecoder`."""

    def hidden(
        self, token_N: torch.Tensor, position_N: torch.Tensor, attend: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """Hidden states (N, D) of tokens at their positions.

        Args:
            attend: (layer, scaled queries (N, H, K), keys (N, G, K), values (N, G, K)) -> attention (N, H, K).
        """
        config, share = self.config, self.share
        rope: RopeTables = (self._cos[position_N][:, None], self._sin[position_N][:, None])
        x_ND, first_NGK = self._embed(token_N), None
        for number, layer in enumerate(self._layers):
            heads_NHK = layer.heads(layer.attention_norm(x_ND)).unflatten(-1, (-1, config.d_head))
            turned_NHK, value_NGK = heads_NHK.split([share.n_heads + share.kv_heads, share.kv_heads], dim=1)
            if layer.head_norm is not None:
                turned_NHK = normalise_heads(turned_NHK, layer.head_norm, config.norm_eps)
            first_NGK = value_NGK if first_NGK is None else first_NGK
            if layer.value_mix is not None:
                value_NGK = mix_values(value_NGK, first_NGK, layer.value_mix)
            q_NHK, key_NGK = rotate(turned_NHK, rope).split([share.n_heads, share.kv_heads], dim=1)
            o_NHK = attend(number, q_NHK, key_NGK, value_NGK)
            input_ND, x_ND = x_ND, layer.output(o_NHK.flatten(1), x_ND)
            hidden = layer.up(layer.feed_forward_norm(input_ND if config.parallel_residual else x_ND))
            if config.ffn != "gelu":
                gate, up = hidden.chunk(2, dim=-1) if config.ffn == "swiglu" else (None, hidden)
                hidden = activate(up, gate, squared=gate is None)
            x_ND = layer.down(hidden, x_ND)
        return x_ND

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """fp32 logits (N, V) of hidden states."""
        return capped(self._head(self._final_norm(x_ND)).float(), self.config.logit_cap)


def build_cache(shape: Share, n_pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> PagedCache:
    """The cache of the flash kernel if that accepts device, dtype, heads and pages, otherwise `PlainPages`."""
    flash = _takes_flash(shape, dtype, device) and page_size % PAGE_TOKENS == 0
    return (FlashPages if flash else PlainPages)(shape, n_pages, page_size, dtype, device)


def best_page_tokens(shape: Share | ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a page: the fewest that the flash kernel accepts where it can run, otherwise smaller pages."""
    return PAGE_TOKENS if _takes_flash(shape, dtype, device) else PLAIN_PAGE_TOKENS


def _takes_flash(shape: Share | ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    return packs_documents(device.type, dtype in (torch.bfloat16, torch.float16), shape.d_head)


def check_weights(
    config: ModelConfig, found: Mapping[str, tuple[int, ...]], names: Iterable[str] | None = None
) -> None:
    """Check that a model has weights of these shapes.

    Args:
        names: that are needed; None: all parameters.

    Raises:
        ArtefactError: names the parameter that is missing or has another shape.
    """
    shapes = parameter_shapes(config)
    for name in shapes if names is None else names:
        shape = shapes[name]
        if name not in found:
            raise ArtefactError(f"weights: {name} is missing; expected {len(shapes)} parameters of this model")
        if found[name] != shape:
            raise ArtefactError(
                f"weights: {name} has shape {found[name]}, expected {shape}: these may be weights of another model"
            )


def checked(config: ModelConfig, weights: Weights) -> Mapping[str, torch.Tensor] | None:
    """A mapping whose names and shapes fit; None for a stream, which is checked while it is read.

    Raises:
        ArtefactError: see `check_weights`.
    """
    if not isinstance(weights, Mapping):
        return None
    mapping = cast("Mapping[str, torch.Tensor]", weights)
    check_weights(config, {name: tuple(value.shape) for name, value in mapping.items()})
    return mapping


def looked_up(config: ModelConfig, weights: Weights) -> LookUp:
    """Looks up each parameter once.

    Raises:
        ArtefactError: names the parameter that is missing or has another shape; for a stream, when it is looked up.
    """
    if mapping := checked(config, weights):
        return mapping.__getitem__
    stream: Iterator[tuple[str, torch.Tensor]] = iter(weights)  # type: ignore[arg-type]
    held: dict[str, torch.Tensor] = {}

    def look_up(name: str) -> torch.Tensor:
        while name not in held and (found := next(stream, None)):
            held[found[0]] = found[1]
        check_weights(config, {name: tuple(value.shape) for name, value in held.items()}, [name])
        return held.pop(name)

    return look_up


def _absent(*_: object) -> torch.Tensor:
    raise RuntimeError("the weights of this model are not complete: load them again")


def _norm(config: ModelConfig, look_up: LookUp, keep: Keep, name: str) -> Norm:
    shape, weight = (config.d_model,), keep(f"{name}.weight", look_up(f"{name}.weight").clone())
    if config.norm == "rmsnorm":
        return partial(F.rms_norm, normalized_shape=shape, weight=weight, eps=config.norm_eps)
    bias = keep(f"{name}.bias", look_up(f"{name}.bias").clone()) if config.bias else None
    return partial(F.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=config.norm_eps)


def _layer(
    config: ModelConfig, share: Share, axis: TensorAxis | None, look_up: LookUp, keep: Keep, number: int
) -> _Layer:
    prefix = f"blocks.{number}."

    def weights(*names: str) -> list[torch.Tensor]:
        return [look_up(prefix + name) for name in names]

    def linear(name: str, weight: torch.Tensor, bias: torch.Tensor | None, *, gelu: bool = False) -> Linear:
        weight = keep(f"{prefix}{name}.weight", weight)
        return build_linear(weight, None if bias is None else keep(f"{prefix}{name}.bias", bias), gelu=gelu)

    def bias(name: str) -> torch.Tensor | None:
        return look_up(prefix + name) if config.bias else None

    query, key, heads_value, output = weights(*(f"attention.{n}" for n in ("query", "key", "value", "output")))
    scale, head_norm = config.d_head**-0.5, None  # the scores' scale, multiplied into the query weights
    if config.qk_norm:
        query_norm_K, key_norm_K = weights("attention.query_norm.weight", "attention.key_norm.weight")
        norms = [(query_norm_K * scale).expand(share.n_heads, -1), key_norm_K.expand(share.kv_heads, -1)]
        head_norm = keep(f"{prefix}head_norm", torch.cat(norms))
        scale = 1.0
    of_heads = torch.cat([one.flatten(0, 1) for one in (query * scale, key, heads_value)])
    of_heads_bias = None
    if config.has_qkv_bias:
        query_bias, *others = weights("attention.query_bias", "attention.key_bias", "attention.value_bias")
        of_heads_bias = torch.cat([one.flatten() for one in (query_bias * scale, *others)])
    mix = keep(prefix + VALUE_MIX, look_up(prefix + VALUE_MIX).clone()) if config.value_residual and number else None
    gated = ("gate", "up") if config.ffn == "swiglu" else ("up",)
    padding = -share.units.held % VECTOR  # hidden units that stay 0
    up = torch.cat([F.pad(one, (0, 0, 0, padding)) for one in weights(*(f"feed_forward.{n}.weight" for n in gated))])
    up_bias = None
    if config.bias:
        up_bias = torch.cat([F.pad(one, (0, padding)) for one in weights(*(f"feed_forward.{n}.bias" for n in gated))])
    (down,) = weights("feed_forward.down.weight")
    to_residual = linear("output", output.flatten(0, 1).t().contiguous(), bias("attention.output_bias"))
    from_units = linear("down", F.pad(down, (0, padding)), bias("feed_forward.down.bias"))
    return _Layer(
        attention_norm=_norm(config, look_up, keep, f"{prefix}attention_norm"),
        heads=linear("heads", of_heads, of_heads_bias),
        head_norm=head_norm,
        value_mix=mix,
        output=leaving(to_residual, axis) if axis else to_residual,
        feed_forward_norm=_norm(config, look_up, keep, f"{prefix}feed_forward_norm"),
        up=linear("up", up, up_bias, gelu=config.ffn == "gelu"),
        down=leaving(from_units, axis) if axis else from_units,
    )
