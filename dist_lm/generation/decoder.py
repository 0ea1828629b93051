"""The transformer as the engine runs it: the arithmetic of `dist_lm.model` over a paged KV cache.

Weights are laid out once for their device, and a step is a short loop over plain tensors. Tests compare it with the
model.

Dimensions: N tokens, P pieces (of prompts, or of answers with forced tokens), n some tokens, B sequences, D d_model, V
vocabulary, H query heads, G key/value heads, K d_head, T positions, R entries of a head that RoPE rotates, F hidden
units (twice as many before a gate), X the dimension that an index of the cache flattens.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.config.model import WIDE_LOGITS, ModelConfig
from dist_lm.errors import ArtefactError
from dist_lm.generation.adapters import AdaptedLinear, AdapterWeights, RowAdapters, Run, layer_factors, runs_of
from dist_lm.generation.flash_pages import PAGE_TOKENS, DecodeGraphs, FlashDecodePlan, FlashPages
from dist_lm.generation.linear import GELUS, VECTOR, Linear, build_linear, wide_linear
from dist_lm.generation.paged_cache import PLAIN_PAGE_TOKENS, DecodePlan, PagedCache, Piece, PlainPages, pages_for
from dist_lm.generation.sampling import token_logprobs
from dist_lm.generation.shard import Share, build_embedding, gathering, leaving, share_of
from dist_lm.generation.transfer import upload
from dist_lm.model.layers import RopeTables, activate, capped, mix_values, normalise_heads, rope_tables, rotate
from dist_lm.model.size import ADAPTERS, VALUE_MIX, packs_documents, parameter_shapes
from dist_lm.parallel.host_copies import HostCopies
from dist_lm.parallel.mesh import use_flash_attention_3
from dist_lm.parallel.tensor_axis import TensorAxis

WeightStream = Iterable[tuple[str, torch.Tensor]]
"""Parameters with their names in the order of `parameter_shapes`; a decoder holds a block of them at a time. The
tensors belong to the receiver, and nobody else changes them (see `parallel.values.stream_weights`)."""

Weights = Mapping[str, torch.Tensor] | WeightStream

SCORED_ROWS = 64  # tokens whose logits `Decoder.extend` holds at a time

Norm = Callable[[torch.Tensor], torch.Tensor]

LookUp = Callable[[str], torch.Tensor]
"""Returns the parameter of a name, on the device."""

Place = Callable[[str, torch.Tensor], torch.Tensor]
"""(name, new value) -> the tensor that layers compute with. With CUDA graphs, the new value is copied into the tensor
of the first build, which is returned."""


@dataclass(frozen=True)
class _Layer:
    attention_norm: Norm
    qkv: Linear  # queries, keys and values of all heads, concatenated
    qk_norm: torch.Tensor | None  # (H + G, K); weights of the norms of queries and keys
    value_mix: torch.Tensor | None  # (2,), see `mix_values`
    is_rotated: bool  # whether RoPE turns queries and keys
    # A `Linear` adds its second argument to the product: `output` and `down` add the residual stream.
    output: Linear
    feed_forward_norm: Norm
    up: Linear  # with its activation; in a gated network: gate and up concatenated, without activation
    down: Linear


class Decoder:
    """A model and its cache: a complete model, or one rank's part of it."""

    def __init__(
        self,
        config: ModelConfig,
        n_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        share: Share | None = None,
        axis: TensorAxis | None = None,
    ) -> None:
        """Builds the cache; `load` sets the weights.

        Args:
            page_tokens: tokens of a page.
            share: the part that is computed here; by default the complete model.
            axis: the ranks that share the model; all of them run the same steps.
        """
        self.config = config
        self._is_gated = config.is_gated
        self._norm_after = config.norm_place == "after"
        self.share = share or share_of(config)
        self.axis = axis
        self.dtype = dtype
        self._device = device
        self._page_tokens = page_tokens
        use_flash_attention_3(device)
        self.weight_scale, self.score_scale = scales_of(config, dtype)
        self.cache = self._new_cache(n_pages)

        if config.qk_norm_span == "all":
            # For a norm over the heads of all ranks; padded heads have no share.
            shares = [*[1.0] * self.share.n_heads, *self.share.key_shares]
            shares += [0.0] * (self.share.n_heads + self.share.kv_heads - len(shares))
            self._root_share_H1 = torch.tensor(shares, device=device).sqrt()[:, None]
            self._n_entries_2 = torch.tensor([config.n_heads, config.kv_heads], device=device) * config.d_head
            self._counts_2 = torch.tensor([self.share.n_heads, self.share.kv_heads], device=device)

        # Tables of all positions once; a step only looks its positions up.
        position_1T = torch.arange(config.max_seq_len, device=device)[None]
        self._cos_TR, self._sin_TR = (table[0, :, 0] for table in rope_tables(position_1T, config, dtype))

        self._layers: list[_Layer] = []
        self._row_adapters = RowAdapters()
        self._stored: dict[str, torch.Tensor] = {}  # on a GPU the tensors of the weights, whose addresses are in graphs
        self._host_copies = HostCopies()
        self._graphs = self._new_graphs()

    def load(self, weights: Weights) -> None:
        """Replaces the weights.

        Raises:
            ArtefactError: names the parameter that is missing or has another shape.
        """
        look_up = looked_up(self.config, weights)
        self.build(lambda name: look_up(name).detach().to(self._device, self.dtype))

    def resize(self, n_pages: int) -> None:
        """Replaces the cache by an empty one, and drops the graphs, which hold the addresses of the old one."""
        # Both the cache and the graphs must be free before the new cache is allocated.
        self._graphs = None
        del self.cache
        self.cache = self._new_cache(n_pages)
        self._graphs = self._new_graphs()

    def sleep(self) -> None:
        """Frees the cache, and on a GPU the memory of the weights, whose values wait on the host for `wake`."""
        self.resize(0)
        if not self._host_copies.n_bytes:
            self._host_copies.move(self._stored.values())

    def wake(self) -> None:
        """Brings the weights back; the cache stays empty."""
        self._host_copies.restore()

    def build(self, look_up: LookUp) -> None:
        """Lays out the weights of this share; the old ones are dropped first, so after an error the decoder has none.

        Args:
            look_up: called once for each parameter, in the same order on every rank; it may receive from another rank.

        Raises:
            ArtefactError: from `look_up`, if a parameter is missing or has another shape.
        """
        config, axis = self.config, self.axis
        # Free the old weights first: both may not fit in memory.
        self._layers, self._embed, self._lm_head = [], _absent, _absent
        # Only CUDA graphs need the old tensors. While the cache and weights sleep there are no graphs, so that stored
        # tensors may be dropped.
        if self._graphs is None or self._host_copies.n_bytes:
            self._host_copies.forget()
            self._stored.clear()

        # Cloned, because the memory may be the caller's.
        embedding = self._in_place("embedding", look_up("embedding.weight").clone())
        self._embed = build_embedding(embedding, self.share.vocab, axis)
        for number in range(config.n_layers):
            self._layers.append(_layer(config, self.share, axis, look_up, self._in_place, number, self.weight_scale))
        # A tied head shares the weight of the embedding, so the divisor of logits is folded into the norm before it.
        self._final_norm = _norm(config, look_up, self._in_place, "final_norm", 1 / config.logit_divisor)

        head_weight = embedding
        if not config.tie_embeddings:
            head_weight = self._in_place("lm_head", look_up("lm_head.weight"))
        self._lm_head = build_linear(head_weight, None)
        if config.head_dtype == WIDE_LOGITS and self.dtype != torch.float32:
            self._lm_head = wide_linear(head_weight)
        if axis:
            self._lm_head = gathering(self._lm_head, axis, config.vocab_size)

    def add_adapter(self, adapter: AdapterWeights) -> None:
        """Adds an adapter beside the weights, until `build` replaces them; only with one rank.

        Raises:
            ArtefactError: a factor is missing or has another shape.
        """
        assert self.axis is None, "each rank would need its part of the factors"
        config = adapter.config
        shapes = {name: tuple(factor.shape) for name, factor in adapter.factors.items()}
        check_weights(config, shapes, [name for name in parameter_shapes(config) if ADAPTERS in name])

        # The same factors as `_layer` has multiplied into the weights.
        query_scale = 1.0 if config.qk_norm else self.weight_scale
        residual_scale = 1.0 if self._norm_after else config.residual_scale
        factors = {name: factor.detach().to(self._device, self.dtype) for name, factor in adapter.factors.items()}
        for number, layer in enumerate(self._layers):
            adapted = layer_factors(config, self.share, factors, number, query_scale, residual_scale)
            changed: dict[str, AdaptedLinear] = {}
            for part in ("qkv", "output", "up", "down"):
                linear, pair = getattr(layer, part), getattr(adapted, part)
                if pair is None:
                    continue
                if not isinstance(linear, AdaptedLinear):
                    has_activation = part == "up" and config.ffn in GELUS
                    linear = AdaptedLinear(linear, len(pair[1]), self._row_adapters, has_activation)
                linear.add(adapter.name, *pair)
                changed[part] = linear
            self._layers[number] = replace(layer, **changed)

    def _new_cache(self, n_pages: int) -> PagedCache:
        cache = build_cache(self.share, n_pages, self._page_tokens, self.dtype, self._device)
        cache.score_scale = self.score_scale
        return cache

    def _new_graphs(self) -> DecodeGraphs | None:
        """Returns graphs of decode steps, if the device has them; steps with collectives run eagerly."""
        if not isinstance(self.cache, FlashPages) or self._device.type != "cuda" or self.axis is not None:
            return None
        return DecodeGraphs(self._decode, self.cache, pages_for(self.config.max_seq_len, self._page_tokens))

    def _in_place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensor to compute with for a named weight: on a GPU one with memory of its own.

        CUDA graphs hold addresses, so with graphs new weights are copied into the tensor of the first build.
        """
        if self._device.type == "cpu":
            return tensor
        if self._graphs is None or name not in self._stored:
            self._stored[name] = tensor.clone()  # it may be the caller's
            return self._stored[name]
        return self._stored[name].copy_(tensor)

    def prefill(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Runs the model on pieces of prompts and writes their keys and values to the cache (collective with several
        ranks). Returns fp32 logits (P, V) after the last token of each piece, on the device."""
        x_ND, end_P = self._piece_states(pieces)
        # Only the last token of a piece needs logits, and the vocabulary is the largest product.
        return self.logits(x_ND[end_P - 1])

    def _piece_states(self, pieces: Sequence[Piece], *further: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Runs the layers on concatenated pieces, whose keys and values are then in the cache.

        Args:
            further: arrays that the caller needs on the device; they travel with the tokens, in one copy.

        Returns:
            hidden states (N, D), the end of each piece among the N tokens, int64 (P,), and each of `further`.
        """
        plan = self.cache.plan_prefill(pieces)
        index_X = self.cache.write_index(plan.cell_N)

        # `hidden` knows no cache: this writes keys and values to it, then attends to it.
        def attend(layer: int, q_NHK: torch.Tensor, k_NGK: torch.Tensor, v_NGK: torch.Tensor) -> torch.Tensor:
            self.cache.write(layer, index_X, k_NGK, v_NGK)
            return self.cache.prefill(layer, q_NHK, k_NGK, v_NGK, plan)

        token_N, end_P, *uploaded = upload(
            self._device,
            torch.tensor([token for piece in pieces for token in piece.tokens]),
            torch.tensor([*accumulate(len(piece.tokens) for piece in pieces)]),
            *further,
        )
        runs = runs_of([piece.adapter for piece in pieces], [len(piece.tokens) for piece in pieces])
        return self.hidden(token_N, plan.position_N, attend, runs), end_P, *uploaded

    def extend(self, pieces: Sequence[Piece], next_tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Does the same as `prefill` for pieces of answers whose tokens are known (collective with several ranks).

        Args:
            next_tokens: (N,), the token that follows each token of the concatenated pieces.

        Returns:
            (log-probability of each of `next_tokens` under the model, fp32 (N,), nats; fp32 logits (P, V) after the
            last token of each piece), on the device. With several ranks, those of the first rank count.
        """
        x_ND, end_P, next_N = self._piece_states(pieces, torch.tensor(next_tokens))
        # The logits of all tokens at once may be larger than the model.
        logprob_N = torch.cat(
            [
                self._logprobs(self.logits(x_nD), next_n)
                for x_nD, next_n in zip(x_ND.split(SCORED_ROWS), next_N.split(SCORED_ROWS), strict=True)
            ]
        )
        return logprob_N, self.logits(x_ND[end_P - 1])

    def _logprobs(self, logits_nV: torch.Tensor, token_n: torch.Tensor) -> torch.Tensor:
        """Returns the log-probability of one token of each row; zeros on a rank that holds only its part of the
        logits."""
        if logits_nV.shape[1] < self.config.vocab_size:
            return torch.zeros(len(token_n), device=logits_nV.device)
        return token_logprobs(logits_nV, token_n)

    def decode(self, tokens: Sequence[int], plan: DecodePlan, adapters: Sequence[str] = ()) -> torch.Tensor:
        """Runs the model on one token per sequence and writes its keys and values to the cache (collective with several
        ranks). Returns fp32 logits (B, V), on the device; the next step may overwrite them.

        Args:
            adapters: name of each sequence's adapter, empty without one; none at all: no sequence has one.
        """
        # The plan is on the device already; only the tokens are new in a step.
        (token_B,) = upload(self._device, torch.tensor(tokens))
        runs = runs_of(adapters)
        # A graph has the products of the base alone, since every batch divides among adapters in its own way.
        if self._graphs is not None and isinstance(plan, FlashDecodePlan) and not runs:
            return self._graphs(token_B, plan)
        return self._decode(token_B, plan, runs)

    def _decode(self, token_B: torch.Tensor, plan: DecodePlan, runs: Sequence[Run] = ()) -> torch.Tensor:
        index_X = self.cache.write_index(plan.cell_B)

        def attend(layer: int, q_BHK: torch.Tensor, k_BGK: torch.Tensor, v_BGK: torch.Tensor) -> torch.Tensor:
            self.cache.write(layer, index_X, k_BGK, v_BGK)
            return self.cache.decode(layer, q_BHK, plan)

        return self.logits(self.hidden(token_B, plan.position_B, attend, runs))

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> DecodePlan:
        """Plans a decode step: sequence b holds `pages[b]` and adds a token at `positions[b]`."""
        return self.cache.plan(pages, positions)

    def copy_page(self, source: int, target: int, n_tokens: int) -> None:
        """Copies the first `n_tokens` tokens of one page to another, in all layers."""
        self.cache.copy_page(source, target, n_tokens)

    def clear(self, pages: Sequence[int]) -> None:
        """Writes zeros, so that no nan stays behind for the next holder."""
        self.cache.clear(pages)

    def save(self, pages: Sequence[int]) -> Any:
        """Copies the content of pages to host memory, for `restore` or `forget`."""
        return self.cache.save(pages)

    def restore(self, pages: Sequence[int], content: Any) -> None:
        """Writes content that `save` returned to as many pages."""
        self.cache.restore(pages, content)

    def forget(self, content: Any) -> None:
        """Drops content that `save` returned. Nothing to do here; `ShardedDecoder` tells the other ranks."""

    def check(self) -> None:
        """Raises if the last logits may be wrong. Nothing to do here; see `ShardedDecoder`."""

    def close(self) -> None:
        """Ends the other processes of the model. Nothing to do here; see `ShardedDecoder`."""

    def hidden(
        self,
        token_N: torch.Tensor,
        position_N: torch.Tensor,
        attend: Callable[..., torch.Tensor],
        runs: Sequence[Run] = (),
    ) -> torch.Tensor:
        """Runs all layers. Returns the residual stream (N, D), in the decoder's dtype, of tokens at their positions
        (collective with several ranks).

        It is not normalised yet, unlike the output of `Transformer.hidden`: `logits` and `normalised` apply the final
        norm.

        Args:
            token_N: int64, as is position_N.
            attend: a function (layer, queries (N, H, K), keys (N, G, K), values (N, G, K)) -> attention (N, H, K) with
                scores times `score_scale`; it may write the cache.
            runs: the adapters of all tokens; empty: none has one.
        """
        config, share = self.config, self.share
        self._row_adapters.runs = runs
        rope: RopeTables = (self._cos_TR[position_N][:, None], self._sin_TR[position_N][:, None])
        x_ND = self._embed(token_N)
        if config.embedding_scale != 1:
            x_ND = x_ND * config.embedding_scale
        v1_NGK = None

        for number, layer in enumerate(self._layers):
            # Attention. Queries and keys pass through norm and rotation as one tensor, which saves kernels.
            input_ND = x_ND
            h_ND = x_ND if self._norm_after else layer.attention_norm(x_ND)
            qkv_NHK = layer.qkv(h_ND).unflatten(-1, (-1, config.d_head))
            # `split_with_sizes` is `split` without its Python wrapper, which costs a microsecond.
            qk_NHK, v_NGK = qkv_NHK.split_with_sizes([share.n_heads + share.kv_heads, share.kv_heads], dim=1)
            if layer.qk_norm is not None:
                qk_NHK = self._normalise(qk_NHK, layer.qk_norm)
            if v1_NGK is None:
                v1_NGK = v_NGK
            if layer.value_mix is not None:
                v_NGK = mix_values(v_NGK, v1_NGK, layer.value_mix)
            if layer.is_rotated:
                qk_NHK = rotate(qk_NHK, rope)
            q_NHK, k_NGK = qk_NHK.split_with_sizes([share.n_heads, share.kv_heads], dim=1)
            o_NHK = attend(number, q_NHK, k_NGK, v_NGK)
            if self._norm_after:
                x_ND = x_ND + layer.attention_norm(layer.output(o_NHK.flatten(1)))
            else:
                x_ND = layer.output(o_NHK.flatten(1), x_ND)  # adds the residual stream

            # Feed-forward network. Without a gate, the activation is a part of the linear layer `up`.
            if not config.parallel_residual:
                input_ND = x_ND
            h_NF = layer.up(input_ND if self._norm_after else layer.feed_forward_norm(input_ND))
            if self._is_gated:
                gate_NF, up_NF = h_NF.chunk(2, dim=-1)
                # Exact GELU has another kernel for rows that lie apart, which rounds differently than that for one row.
                if config.ffn == "geglu":
                    gate_NF = gate_NF.contiguous()
                h_NF = activate(up_NF, gate_NF, config.ffn)
            elif config.ffn not in GELUS:
                h_NF = activate(h_NF, None, config.ffn)
            if self._norm_after:
                x_ND = x_ND + layer.feed_forward_norm(layer.down(h_NF))
            else:
                x_ND = layer.down(h_NF, x_ND)  # adds the residual stream
        return x_ND

    def _normalise(self, qk_NHK: torch.Tensor, weight_HK: torch.Tensor) -> torch.Tensor:
        """Returns queries and keys after the RMSNorm that `model.qk_norm_span` names, (N, H, K), in their dtype.

        With the span `head` the mean square is taken over the K entries of each head. With `all` it is taken over all
        query heads of a token, and separately over all its key heads; ranks that share the model then add their sums,
        so the call is collective.

        Args:
            qk_NHK: the query heads of this rank and behind them its key heads, for N tokens.
            weight_HK: the weights of the norms, of the same heads.
        """
        config, share = self.config, self.share
        if config.qk_norm_span == "head":
            return normalise_heads(qk_NHK, weight_HK, config.norm_eps)

        counts = [share.n_heads, share.kv_heads]
        if self.axis is None:
            parts = zip(qk_NHK.split(counts, dim=1), weight_HK.split(counts), strict=True)
            normalised = [
                F.rms_norm(x_NHK.flatten(1), (weight.numel(),), weight.flatten(), config.norm_eps).view_as(x_NHK)
                for x_NHK, weight in parts
            ]
            return torch.cat(normalised, dim=1)

        # Each rank adds its part of the squares; of a key head that several ranks hold, a share.
        part_NHK = qk_NHK.to(torch.promote_types(qk_NHK.dtype, torch.float32)) * self._root_share_H1
        lengths = [torch.linalg.vector_norm(x_NHK.flatten(1), dim=1) for x_NHK in part_NHK.split(counts, dim=1)]
        sum_N2 = self.axis.sum(torch.stack(lengths, dim=1).square())
        scale_N2 = torch.rsqrt(sum_N2 / self._n_entries_2 + config.norm_eps).to(qk_NHK.dtype)
        scale_NH = scale_N2.repeat_interleave(self._counts_2, dim=1, output_size=qk_NHK.shape[1])
        return qk_NHK * scale_NH[..., None] * weight_HK

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Returns fp32 logits (N, V) of the output of `hidden`."""
        return capped(self._lm_head(self._final_norm(x_ND)).float(), self.config.logit_cap)

    def normalised(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Returns the output of `hidden` after the final norm, (N, D), in the decoder's dtype, as `Transformer.hidden`
        does."""
        return self._final_norm(x_ND)


def scales_of(config: ModelConfig, dtype: torch.dtype) -> tuple[float, float]:
    """Splits the scale of attention scores into two factors: the first is multiplied into the weights of queries, the
    second is left to the kernels of attention.

    Half-precision weights take in powers of two alone: any other factor would round every weight again, which the
    trainer does not do.
    """
    scale = config.score_scale
    is_power_of_two = math.frexp(scale)[0] == 0.5
    if is_power_of_two or dtype in (torch.float32, torch.float64):
        return scale, 1.0
    return 1.0, scale


def build_cache(share: Share, n_pages: int, page_tokens: int, dtype: torch.dtype, device: torch.device) -> PagedCache:
    """Builds the cache of the flash kernel if that accepts device, dtype, heads and pages, otherwise `PlainPages`."""
    if _flash_kernel_fits(share, dtype, device) and page_tokens % PAGE_TOKENS == 0:
        return FlashPages(share, n_pages, page_tokens, dtype, device)
    return PlainPages(share, n_pages, page_tokens, dtype, device)


def best_page_tokens(share: Share | ModelConfig, dtype: torch.dtype, device: torch.device) -> int:
    """Returns the tokens of a page: the fewest that the flash kernel accepts if it can run, otherwise fewer."""
    return PAGE_TOKENS if _flash_kernel_fits(share, dtype, device) else PLAIN_PAGE_TOKENS


def _flash_kernel_fits(share: Share | ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether the flash kernel runs: the one that training uses for packed documents, with the same limits."""
    return packs_documents(device.type, dtype in (torch.bfloat16, torch.float16), share.d_head)


def check_weights(
    config: ModelConfig, weight_shapes: Mapping[str, tuple[int, ...]], names: Iterable[str] | None = None
) -> None:
    """Refuses weights that lack a parameter of a model or have it in another shape; further names are accepted.

    Args:
        weight_shapes: shapes of the weights by name.
        names: the parameters that are needed; None: all.

    Raises:
        ArtefactError: names the parameter that is missing or has another shape.
    """
    shapes = parameter_shapes(config)
    for name in names or shapes:
        shape = shapes[name]
        if name not in weight_shapes:
            raise ArtefactError(f"weights: {name} is missing; expected {len(shapes)} parameters of this model")
        if weight_shapes[name] != shape:
            raise ArtefactError(
                f"weights: {name} has shape {weight_shapes[name]}, expected {shape}: these may be weights of "
                "another model"
            )


def checked(config: ModelConfig, weights: Weights) -> Mapping[str, torch.Tensor] | None:
    """Returns a mapping after checking its names and shapes; None for a stream, which is checked while it is read.

    Raises:
        ArtefactError: see `check_weights`.
    """
    if not isinstance(weights, Mapping):
        return None
    mapping = cast("Mapping[str, torch.Tensor]", weights)
    check_weights(config, {name: tuple(tensor.shape) for name, tensor in mapping.items()})
    return mapping


def looked_up(config: ModelConfig, weights: Weights) -> LookUp:
    """Returns a function that returns each parameter once, by its name.

    A mapping is checked now. A stream is read as far as the name that is looked up, and checked there; tensors that
    come earlier wait in memory until they are looked up.

    Raises:
        ArtefactError: names the parameter that is missing or has another shape; for a stream, when it is looked up.
    """
    if mapping := checked(config, weights):
        return mapping.__getitem__

    # A stream is read only as far as needed, so one block of it is in memory at a time.
    stream: Iterator[tuple[str, torch.Tensor]] = iter(weights)  # type: ignore[arg-type]
    unread: dict[str, torch.Tensor] = {}

    def look_up(name: str) -> torch.Tensor:
        while name not in unread and (pair := next(stream, None)):
            unread[pair[0]] = pair[1]
        check_weights(config, {name: tuple(tensor.shape) for name, tensor in unread.items()}, [name])
        return unread.pop(name)

    return look_up


def _absent(*_: object) -> torch.Tensor:
    raise RuntimeError("the weights of this model are not complete: load them again")


def _norm(config: ModelConfig, look_up: LookUp, in_place: Place, name: str, scale: float = 1.0) -> Norm:
    """Returns `scale` times the norm over D of the parameters `NAME.weight` and, if the model has it, `NAME.bias`, as a
    function; both are looked up and copied."""
    shape = (config.d_model,)
    weight = in_place(f"{name}.weight", look_up(f"{name}.weight") * scale)
    if config.norm == "rmsnorm":
        return partial(F.rms_norm, normalized_shape=shape, weight=weight, eps=config.norm_eps)
    bias = None
    if config.bias:
        bias = in_place(f"{name}.bias", look_up(f"{name}.bias") * scale)
    return partial(F.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=config.norm_eps)


def _layer(
    config: ModelConfig,
    share: Share,
    axis: TensorAxis | None,
    look_up: LookUp,
    in_place: Place,
    number: int,
    query_scale: float,
) -> _Layer:
    """Returns one block with its weights, this rank's share of them, laid out for the device.

    `model.residual_scale`, the factor of what a branch adds to the residual stream, is multiplied into the weights that
    end a branch. The order of look-ups is part of the protocol between ranks.

    Args:
        number: index of the block, from 0.
        query_scale: factor of queries.
    """
    prefix = f"blocks.{number}."

    def weights(*names: str) -> list[torch.Tensor]:
        return [look_up(prefix + name) for name in names]

    def linear(name: str, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "") -> Linear:
        weight = in_place(f"{prefix}{name}.weight", weight)
        if bias is not None:
            bias = in_place(f"{prefix}{name}.bias", bias)
        return build_linear(weight, bias, activation)

    # `residual_scale` multiplies what ends a branch: the norm where it comes last (it would undo a scale of its input),
    # else the output weight.
    norm_scale, residual_scale = 1.0, config.residual_scale
    if config.norm_place == "after":
        norm_scale, residual_scale = residual_scale, 1.0

    def output_bias(name: str, is_used: bool) -> torch.Tensor | None:
        return look_up(prefix + name) * residual_scale if is_used else None

    # The factor of queries is multiplied into their weights, or into those of their norm.
    query, key, value, output = weights("attention.query", "attention.key", "attention.value", "attention.output")
    scale = query_scale
    qk_norm = None
    if config.qk_norm:
        query_norm_K, key_norm_K = weights("attention.query_norm.weight", "attention.key_norm.weight")
        # A norm over all heads has weights of each head already.
        norms = [(query_norm_K * scale).expand(share.n_heads, -1), key_norm_K.expand(share.kv_heads, -1)]
        qk_norm = in_place(f"{prefix}qk_norm", torch.cat(norms))
        scale = 1.0

    # One product computes queries, keys and values.
    qkv_weight = torch.cat([weight.flatten(0, 1) for weight in (query * scale, key, value)])
    qkv_bias = None
    if config.has_qkv_bias:
        query_bias, key_bias, value_bias = weights("attention.query_bias", "attention.key_bias", "attention.value_bias")
        qkv_bias = torch.cat([bias.flatten() for bias in (query_bias * scale, key_bias, value_bias)])

    value_mix = None
    if config.value_residual and number > 0:
        value_mix = in_place(prefix + VALUE_MIX, look_up(prefix + VALUE_MIX).clone())

    # Padded hidden units stay 0.
    padding = -share.units.held % VECTOR
    parts = ("gate", "up") if config.is_gated else ("up",)
    up_weights = weights(*(f"feed_forward.{part}.weight" for part in parts))
    up_weight = torch.cat([F.pad(weight, (0, 0, 0, padding)) for weight in up_weights])
    up_bias = None
    if config.has_ffn_bias:
        up_biases = weights(*(f"feed_forward.{part}.bias" for part in parts))
        up_bias = torch.cat([F.pad(bias, (0, padding)) for bias in up_biases])
    (down_weight,) = weights("feed_forward.down.weight")

    attention_bias = output_bias("attention.output_bias", config.has_output_bias)
    output = output * residual_scale
    output_linear = linear("output", output.flatten(0, 1).t().contiguous(), attention_bias)
    down_bias = output_bias("feed_forward.down.bias", config.has_ffn_bias)
    down_linear = linear("down", F.pad(down_weight * residual_scale, (0, padding)), down_bias)
    if axis:
        output_linear, down_linear = leaving(output_linear, axis), leaving(down_linear, axis)
    return _Layer(
        attention_norm=_norm(config, look_up, in_place, f"{prefix}attention_norm", norm_scale),
        qkv=linear("qkv", qkv_weight, qkv_bias),
        qk_norm=qk_norm,
        value_mix=value_mix,
        is_rotated=number not in config.rope_free_layers,
        output=output_linear,
        feed_forward_norm=_norm(config, look_up, in_place, f"{prefix}feed_forward_norm", norm_scale),
        up=linear("up", up_weight, up_bias, config.ffn if config.ffn in GELUS else ""),
        down=down_linear,
    )
