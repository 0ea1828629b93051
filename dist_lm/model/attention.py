"""Multi-head attention over whole sequences and packed documents.

Dimensions: B sequences, T queries, S keys, D d_model, H query heads, G key/value heads, K d_head, N = B * T.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from dist_lm.config.model import ModelConfig
from dist_lm.data.batch import document_boundaries
from dist_lm.model.layers import RopeTables, build_head_norms, mix_values, rotate
from dist_lm.model.lora import AdapterDropout, adapted, build_adapters
from dist_lm.model.quantised import QuantisedMatrix
from dist_lm.model.size import flash_window, packs_documents


@dataclass(frozen=True)
class Visibility:
    """Says which keys a query sees; built once per forward pass, shared by all layers with the same window.

    With no field set, attention is causal: as many keys as queries, each query sees the tokens up to its own.
    """

    bias_B1TS: torch.Tensor | None = None  # 0 where visible, -inf elsewhere; for all heads; dtype of the queries
    boundary: torch.Tensor | None = None  # see `document_boundaries`
    window: int | None = None  # see `model.window`; only with `boundary`, a mask has it already


CAUSAL = Visibility()

# On a CPU, one call per document is faster than a mask only above both limits: a mask costs one operation for every
# pair of tokens of a row, a call costs a fixed time.
MIN_TOKENS_PER_CALL = 8  # tokens per document, on average
MIN_PAIRS_PER_CALL = 2048  # pairs of tokens in the mask, per document


def within_documents(
    document_BT: torch.Tensor,
    dtype: torch.dtype,
    d_head: int,
    branch_BT: torch.Tensor | None = None,
    boundary: torch.Tensor | None = None,
) -> Visibility:
    """Returns the visibility of causal attention inside each document: boundaries where the flash kernel runs or, on a
    CPU, where one call per document is faster; otherwise, and always with branches, a mask (B, 1, T, T).

    Args:
        document_BT: int64; equal inside a document, different between neighbouring documents.
        dtype: dtype of queries and keys.
        branch_BT: int64; 0 in the trunk of a document, 1, 2, ... in the branches after it. A branch sees the trunk and
            itself, not other branches.
        boundary: `document_boundaries` of `document_BT`; computed if None, which makes the host wait for the GPU.
    """
    # No kernel knows trees of tokens, so branches always take a mask.
    if branch_BT is not None:
        same_or_trunk_BTS = (branch_BT[:, :, None] == branch_BT[:, None, :]) | (branch_BT == 0)[:, None, :]
        return _masked(_causal_in_document(document_BT) & same_or_trunk_BTS, dtype)

    packs = packs_documents(document_BT.device.type, dtype in (torch.bfloat16, torch.float16), d_head)
    # On a CPU, the choice needs the values of the boundaries, and fake tensors have none.
    chooses = document_BT.device.type == "cpu" and not isinstance(document_BT, FakeTensor)
    if packs or chooses:
        if boundary is None:
            boundary = document_boundaries(document_BT)
        if packs or _favours_calls(boundary.diff(), document_BT.shape[1]):
            return Visibility(boundary=boundary)
    return _masked(_causal_in_document(document_BT), dtype)


def within_window(
    visibility: Visibility, window: int, position_BT: torch.Tensor, shape: torch.Size, dtype: torch.dtype, d_head: int
) -> Visibility:
    """Returns what of `visibility` the layers with a window see: of each query the last `window` positions, its own
    among them.

    Args:
        position_BT: int64, (1, T) if all sequences have the same positions. Tokens of a document that see each other
            have the distance of their positions, also where another branch stands between them.
        shape: (B, T) of the tokens.
    """
    if visibility.boundary is not None:
        return replace(visibility, window=window)

    n_sequences, n_tokens = shape
    if visibility.bias_B1TS is None:
        # A kernel with a window keeps the tensors of causal attention, and fake tensors are there to count them.
        if n_tokens <= window or isinstance(position_BT, FakeTensor):
            return visibility
        # Each sequence is a document where the flash kernel runs; a mask would cost all pairs of tokens.
        if packs_documents(position_BT.device.type, dtype in (torch.bfloat16, torch.float16), d_head):
            ends = torch.arange(n_sequences + 1, dtype=torch.int32, device=position_BT.device)
            return Visibility(boundary=ends * n_tokens, window=window)
        return Visibility(bias_B1TS=_window_bias(n_tokens, window, dtype, position_BT.device)[None, None])

    distance_BTS = position_BT[:, :, None] - position_BT[:, None, :]
    return Visibility(bias_B1TS=visibility.bias_B1TS.masked_fill((distance_BTS >= window)[:, None], float("-inf")))


def _window_bias(n_tokens: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns the mask (T, S) of causal attention with a window over one document."""
    visible_TS = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device).tril_().triu_(1 - window)
    return torch.zeros(visible_TS.shape, dtype=dtype, device=device).masked_fill_(~visible_TS, float("-inf"))


def _favours_calls(lengths: torch.Tensor, width: int) -> bool:
    """Returns whether one call per document is faster on a CPU than a mask.

    Args:
        lengths: int64, tokens of each document of all rows.
        width: tokens of a row.
    """
    n_tokens, n_documents = int(lengths.sum()), len(lengths)
    if n_documents * int(lengths[0]) == n_tokens and bool((lengths == lengths[0]).all()):
        return True  # documents of equal length take a single call
    return n_tokens >= MIN_TOKENS_PER_CALL * n_documents and n_tokens * width > MIN_PAIRS_PER_CALL * n_documents


def _causal_in_document(document_BT: torch.Tensor) -> torch.Tensor:
    n_tokens = document_BT.shape[1]
    causal_TS = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=document_BT.device).tril_()
    return (document_BT[:, :, None] == document_BT[:, None, :]) & causal_TS


def _masked(visible_BTS: torch.Tensor, dtype: torch.dtype) -> Visibility:
    # The mask is additive because SDPA would convert a boolean mask to an additive one in every layer.
    bias_BTS = torch.zeros(visible_BTS.shape, dtype=dtype, device=visible_BTS.device)
    return Visibility(bias_B1TS=bias_BTS.masked_fill_(~visible_BTS, float("-inf"))[:, None])


def attend(q_BTHK: torch.Tensor, k_BSGK: torch.Tensor, v_BSGK: torch.Tensor, visibility: Visibility) -> torch.Tensor:
    """Returns softmax(q k^T / sqrt(K)) v over the visible keys: (B, T, H, K), in the dtype of the queries.

    There are B sequences of T queries and S keys with values. G key/value heads divide the H query heads: query head h
    reads the keys and values of head h * G // H. It computes in the dtype of the queries, with one exception: where
    `visibility` has boundaries and the tensors are on a CPU, it computes in fp32 and converts the result back.
    """
    if visibility.boundary is not None:
        kernel = PER_DOCUMENT if q_BTHK.device.type == "cpu" else variable_length
        o_NHK = kernel(
            q_BTHK.flatten(0, 1),
            k_BSGK.flatten(0, 1),
            v_BSGK.flatten(0, 1),
            visibility.boundary,
            q_BTHK.shape[1],
            visibility.window,
        )
        return o_NHK.view_as(q_BTHK)

    o_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=visibility.bias_B1TS,
        is_causal=visibility.bias_B1TS is None,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return o_BHTK.transpose(1, 2)


def variable_length(
    q_NHK: torch.Tensor,
    k_NGK: torch.Tensor,
    v_NGK: torch.Tensor,
    boundary: torch.Tensor,
    longest: int,
    window: int | None = None,
) -> torch.Tensor:
    """Returns causal attention inside each document, (N, H, K), computed in one kernel, on a GPU, in bf16 or fp16.

    Args:
        boundary: `document_boundaries` of the N tokens.
        longest: upper bound of the tokens of a document.
        window: see `model.window`.
    """
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler (2 s), which a CPU does not need

    o_NHK = varlen_attn(
        q_NHK,
        k_NGK,
        v_NGK,
        boundary,
        boundary,
        longest,
        longest,
        window_size=flash_window(window),
        enable_gqa=q_NHK.shape[1] != k_NGK.shape[1],
    )
    assert isinstance(o_NHK, torch.Tensor)
    return o_NHK


def per_document(
    q_NHK: torch.Tensor,
    k_NGK: torch.Tensor,
    v_NGK: torch.Tensor,
    boundary: torch.Tensor,
    longest: int,
    window: int | None = None,
) -> torch.Tensor:
    """Returns the same as `variable_length` by one call per document, or a single call if all documents have one
    length.

    It computes in fp32 and returns the dtype of the queries: bf16 kernels are compiled for every new length.
    """
    lengths, dtype = boundary.diff().tolist(), q_NHK.dtype
    assert max(lengths) <= longest
    wide = torch.promote_types(dtype, torch.float32)
    q_NHK, k_NGK, v_NGK = q_NHK.to(wide), k_NGK.to(wide), v_NGK.to(wide)

    # Documents that are no longer than the window need no mask.
    bias_TS = None
    if window is not None and max(lengths) > window:
        bias_TS = _window_bias(max(lengths), window, wide, q_NHK.device)

    # Documents of equal length are the rows of one batch.
    if min(lengths) == max(lengths):
        rows = (len(lengths), lengths[0])
        visibility = CAUSAL if bias_TS is None else Visibility(bias_B1TS=bias_TS[None, None])
        o_BTHK = attend(q_NHK.unflatten(0, rows), k_NGK.unflatten(0, rows), v_NGK.unflatten(0, rows), visibility)
        return o_BTHK.flatten(0, 1).to(dtype)

    documents = zip(*(x_NHK.transpose(0, 1).split(lengths, dim=1) for x_NHK in (q_NHK, k_NGK, v_NGK)), strict=True)
    grouped = q_NHK.shape[1] != k_NGK.shape[1]
    if bias_TS is not None:
        outputs_HTK = [
            F.scaled_dot_product_attention(
                q_HTK[None],
                k_GTK[None],
                v_GTK[None],
                attn_mask=bias_TS[: q_HTK.shape[1], : q_HTK.shape[1]],
                enable_gqa=grouped,
            )[0]
            for q_HTK, k_GTK, v_GTK in documents
        ]
    else:
        outputs_HTK = [
            F.scaled_dot_product_attention(q_HTK[None], k_GTK[None], v_GTK[None], is_causal=True, enable_gqa=grouped)[0]
            for q_HTK, k_GTK, v_GTK in documents
        ]
    return torch.cat(outputs_HTK, dim=1).transpose(0, 1).to(dtype)


# The number of calls varies with the batch, so the compiler must not specialise on it.
PER_DOCUMENT = cast(Callable[..., torch.Tensor], torch.compiler.disable(per_document))


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Visibility], torch.Tensor]
"""A function like `attend`."""


class Attention(nn.Module):
    """Multi-head attention; weights are (heads, d_head, d_model), so a slice of heads is a slice of dim 0."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        query_shape = (config.n_heads, config.d_head, config.d_model)
        key_shape = (config.kv_heads, config.d_head, config.d_model)

        def build_matrix(shape: tuple[int, ...]) -> Any:  # a parameter, or a QuantisedMatrix
            return QuantisedMatrix(shape) if config.is_in_4bit else nn.Parameter(torch.empty(shape))

        self.query = build_matrix(query_shape)
        self.key = build_matrix(key_shape)
        self.value = build_matrix(key_shape)
        self.output = build_matrix(query_shape)

        def build_vector(is_used: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape)) if is_used else None

        self.query_bias = build_vector(config.has_qkv_bias, *query_shape[:2])
        self.key_bias = build_vector(config.has_qkv_bias, *key_shape[:2])
        self.value_bias = build_vector(config.has_qkv_bias, *key_shape[:2])
        self.output_bias = build_vector(config.has_output_bias, config.d_model)

        # Kernels divide by the root of d_head.
        self.scales_queries = config.attention_scale is not None
        self.query_scale = config.score_scale * config.d_head**0.5
        self.is_rotated = layer not in config.rope_free_layers
        self.value_residual = config.value_residual
        self.value_mix = build_vector(config.value_residual and layer > 0, 2)  # the first layer has nothing to mix in
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            self.query_norm, self.key_norm = build_head_norms(config)
        self.adapters = build_adapters(config, "attention")
        self.attend: Attend = attend  # another one where ranks share the tokens of a sequence

    def forward(
        self,
        x_BTD: torch.Tensor,
        rope: RopeTables,
        visibility: Visibility,
        v1_BSGK: torch.Tensor | None = None,
        dropout: AdapterDropout = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the attention output (B, T, D), and the values of the first layer with `model.value_residual` (else
        None), which every later layer mixes into its own.

        Args:
            v1_BSGK: values of the first layer; None: this is the first layer.
            dropout: of the inputs of adapters.
        """
        q_BTHK = adapted(to_heads(x_BTD, self.query, self.query_bias), x_BTD, self.adapters, "query", dropout)
        k_BSGK = adapted(to_heads(x_BTD, self.key, self.key_bias), x_BTD, self.adapters, "key", dropout)
        v_BSGK = adapted(to_heads(x_BTD, self.value, self.value_bias), x_BTD, self.adapters, "value", dropout)

        v_BSGK, v1_BSGK = self.mix_first_values(v_BSGK, v1_BSGK, self.value_mix)

        # Norm before rotation: its weights differ between the entries of a head, which rotation would mix.
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK, k_BSGK = self.query_norm(q_BTHK), self.key_norm(k_BSGK)
        if self.scales_queries:
            q_BTHK = q_BTHK * self.query_scale
        if self.is_rotated:
            q_BTHK, k_BSGK = rotate(q_BTHK, rope), rotate(k_BSGK, rope)
        o_BTHK = self.attend(q_BTHK, k_BSGK, v_BSGK, visibility)
        o_BTD = adapted(from_heads(o_BTHK, self.output, self.output_bias), o_BTHK, self.adapters, "output", dropout)
        return o_BTD, v1_BSGK

    def mix_first_values(
        self, v_BSGK: torch.Tensor, v1_BSGK: torch.Tensor | None, mix_2: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the values to attend to, and the values of the first layer for the next layer.

        Without `model.value_residual` these are `v_BSGK` and None; in the first layer (`v1_BSGK` None) both are
        `v_BSGK`.
        """
        if not self.value_residual:
            return v_BSGK, None  # later layers need no values of the first
        if v1_BSGK is None or mix_2 is None:
            return v_BSGK, v_BSGK
        return mix_values(v_BSGK, v1_BSGK, mix_2), v1_BSGK


def to_heads(
    x_BTD: torch.Tensor, weight_HKD: torch.Tensor | QuantisedMatrix, bias_HK: torch.Tensor | None
) -> torch.Tensor:
    """Projects x to heads: (B, T, H, K)."""
    flat_bias = None if bias_HK is None else bias_HK.flatten()
    if isinstance(weight_HKD, QuantisedMatrix):
        return weight_HKD.product(x_BTD, flat_bias).unflatten(-1, weight_HKD.shape[:2])
    return F.linear(x_BTD, weight_HKD.flatten(0, 1), flat_bias).unflatten(-1, weight_HKD.shape[:2])


def from_heads(
    o_BTHK: torch.Tensor, weight_HKD: torch.Tensor | QuantisedMatrix, bias_D: torch.Tensor | None
) -> torch.Tensor:
    """Projects heads back to the residual stream: (B, T, D)."""
    if isinstance(weight_HKD, QuantisedMatrix):
        return weight_HKD.product(o_BTHK.flatten(2), bias_D, input_first=True)
    return F.linear(o_BTHK.flatten(2), weight_HKD.flatten(0, 1).t(), bias_D)
