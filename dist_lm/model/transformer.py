"""The decoder-only transformer, in plain PyTorch: it knows nothing of ranks.

    tokens -> embedding -> n_layers x Block -> norm -> head -> logits (or a score)
    Block:  x += attention(norm(x));  x += feed_forward(norm(x))          (pre-LN, Radford et al. 2019)

A new model is uninitialised (build it on the meta device if it is large); `dist_lm.model.initialise` gives
the values.

Dimensions: B sequences, T tokens, D d_model, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch import nn

from dist_lm.config.model import ModelConfig
from dist_lm.model.attention import CAUSAL, Attention, Visibility, within_documents
from dist_lm.model.cross_entropy import Losses, logprobs_and_entropy, losses_in_chunks, token_losses
from dist_lm.model.dropout import (
    EMBEDDING_SITE,
    DropoutKey,
    SiteDropout,
    apply_dropout,
    dropout_sites,
    residual_site,
)
from dist_lm.model.feed_forward import FeedForward
from dist_lm.model.norm import build_norm
from dist_lm.model.rope import RopeTables, rope_tables


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rope: RopeTables,
        visibility: Visibility,
        dropout: tuple[SiteDropout | None, SiteDropout | None] = (None, None),
        kept_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The stream behind the layer.

        Args:
            kept_N: int64; the tokens, in the flattened batch, that anybody reads behind it: (1, N, D) is returned, and
                the others, which are only attended to, do without the feed-forward network. None: all.
        """
        a_BTD = self.attention(self.attention_norm(x_BTD), rope, visibility)
        x_BTD = x_BTD + apply_dropout(a_BTD, dropout[0])
        if kept_N is not None:
            assert dropout[1] is None, "dropout goes by the place of a token"
            x_BTD = x_BTD.flatten(0, 1).index_select(0, kept_N)[None]
        f_BTD = self.feed_forward(self.feed_forward_norm(x_BTD))
        return x_BTD + apply_dropout(f_BTD, dropout[1])


class Transformer(nn.Module):
    """Next-token logits for sequences of tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = build_norm(config)
        # tied: the head reads the embedding's weight, so there is no second parameter to keep in step
        scalar, own_head = config.head == "scalar", not config.tie_embeddings and config.head == "tokens"
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False) if own_head else None
        self.scalar_head = nn.Linear(config.d_model, 1) if scalar else None

    def forward(
        self,
        tokens_BT: torch.Tensor,
        *,
        document_BT: torch.Tensor | None = None,
        position_BT: torch.Tensor | None = None,
        dropout: DropoutKey | None = None,
    ) -> torch.Tensor:
        """Logits (B, T, V) in the dtype of the parameters.

        Args:
            tokens_BT: int64.
            document_BT: attention stays inside one number; none: all earlier tokens are visible.
            position_BT: int64, for RoPE; none: 0 to T - 1.
            dropout: none: no dropout. It does not hang on train() and eval().
        """
        return self.head(self.hidden(tokens_BT, document_BT=document_BT, position_BT=position_BT, dropout=dropout))

    def hidden(
        self,
        tokens_BT: torch.Tensor,
        *,
        document_BT: torch.Tensor | None = None,
        position_BT: torch.Tensor | None = None,
        branch_BT: torch.Tensor | None = None,
        dropout: DropoutKey | None = None,
        kept_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The normalised residual stream (B, T, D) that `head` makes logits of; arguments as in `forward`.

        Args:
            branch_BT: see `within_documents`; only with `document_BT`.
            kept_N: see `Block.forward`, of the last layer; not with dropout.
        """
        x_BTD = self.embedding(tokens_BT)
        if position_BT is None:
            position_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        rope = rope_tables(position_BT, self.config.d_head, self.config.rope_base, x_BTD.dtype)
        visibility = CAUSAL
        if document_BT is not None:
            visibility = within_documents(document_BT, x_BTD.dtype, self.config.d_head, branch_BT)
        first_token = self.first_token(tokens_BT.shape[1])
        sites = dropout_sites(dropout, self.config.n_layers, self.config.d_model, first_token)
        x_BTD = apply_dropout(x_BTD, sites[EMBEDDING_SITE])
        for layer, block in enumerate(self.blocks):
            own = (sites[residual_site(layer, 0)], sites[residual_site(layer, 1)])
            x_BTD = block(x_BTD, rope, visibility, own, kept_N if layer == len(self.blocks) - 1 else None)
        return self.final_norm(x_BTD)

    def head(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of the output of `hidden`."""
        return F.linear(x_BTD, self.head_weight)

    def token_losses(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        *,
        document_BT: torch.Tensor | None = None,
        position_BT: torch.Tensor | None = None,
        dropout: DropoutKey | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        chunk_bytes: int = 0,
        counted_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy of every token in nats, fp32, (B * T,).

        Arguments are those of `forward` and of `cross_entropy.token_losses`.

        Args:
            chunk_bytes: the largest block of logits in fp32; the tokens go through the head in as many parts as that
                takes. 0: all at once.
            counted_N: int64; the tokens, in the flattened batch, whose losses are wanted: no logits are computed of the
                others, whose losses are 0. None: all.
        """
        x_ND = self._read_of(counted_N, tokens_BT, document_BT=document_BT, position_BT=position_BT, dropout=dropout)

        def losses(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
            return self.losses_of_logits(logits_NV, targets_N, label_smoothing, z_loss)

        return self._in_chunks(x_ND, targets_BT, losses, chunk_bytes, counted_N)

    def logprobs_and_entropy(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        *,
        temperature: float,
        entropy_gradient: bool,
        document_BT: torch.Tensor | None = None,
        position_BT: torch.Tensor | None = None,
        chunk_bytes: int = 0,
        counted_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Log-probability of every target and entropy of what it was drawn from, nats, fp32, (B * T, 2).

        Arguments are those of `token_losses` and of `cross_entropy.logprobs_and_entropy`; no dropout.
        """
        x_ND = self._read_of(counted_N, tokens_BT, document_BT=document_BT, position_BT=position_BT)

        def of_logits(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
            return self.logprobs_and_entropy_of_logits(logits_NV, targets_N, temperature, entropy_gradient)

        return self._in_chunks(x_ND, targets_BT, of_logits, chunk_bytes, counted_N)

    def _read_of(self, counted_N: torch.Tensor | None, tokens_BT: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """What the head reads of these tokens (none: of all), (N, D); `arguments` are those of `hidden`."""
        if counted_N is None or not self.holds_all_tokens or arguments.get("dropout"):
            x_ND = self.head_input(self.hidden(tokens_BT, **arguments)).flatten(0, 1)
            return x_ND if counted_N is None else x_ND[counted_N]
        return self.head_input(self.hidden(tokens_BT, kept_N=counted_N, **arguments)).flatten(0, 1)

    def _in_chunks(
        self,
        x_ND: torch.Tensor,
        targets_BT: torch.Tensor,
        losses: Losses,
        chunk_bytes: int,
        counted_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """`losses` of the logits, (B * T, ...); 0 where `counted_N` leaves a token out.

        Args:
            x_ND: of the tokens in `counted_N`.
        """
        targets_N = targets_BT.flatten()
        if counted_N is None:
            return losses_in_chunks(x_ND, self.head_weight, targets_N, losses, chunk_bytes)
        of_these = losses_in_chunks(x_ND, self.head_weight, targets_N[counted_N], losses, chunk_bytes)
        return _spread(of_these, counted_N, len(targets_N))

    def scores(
        self,
        tokens_BT: torch.Tensor,
        *,
        document_BT: torch.Tensor | None = None,
        position_BT: torch.Tensor | None = None,
        branch_BT: torch.Tensor | None = None,
        dropout: DropoutKey | None = None,
        counted_N: torch.Tensor | None = None,
        learns_offset: bool = True,
    ) -> torch.Tensor:
        """A score for every token, of what is read up to it, fp32, (B * T,): where `model.head` is scalar.

        Arguments are those of `hidden`.

        Args:
            counted_N: int64; the tokens, in the flattened batch, whose scores are wanted; others have 0. None: all.
            learns_offset: whether the head's bias has a gradient; otherwise it is exactly 0. Where only differences of
                scores matter it would be rounding, and Adam makes whole steps of that.
        """
        assert self.scalar_head is not None, "model.head=tokens has no scores"
        x_ND = self._read_of(
            counted_N,
            tokens_BT,
            document_BT=document_BT,
            position_BT=position_BT,
            branch_BT=branch_BT,
            dropout=dropout,
        ).float()
        weight_D, bias_1 = self.scalar_weights
        bias_1 = bias_1 if learns_offset else bias_1.detach() + 0 * bias_1
        score_N = self.sum_of_parts(x_ND @ weight_D.float()) + bias_1.float()
        return score_N if counted_N is None else _spread(score_N, counted_N, tokens_BT.numel())

    # what a model whose layers are spread over ranks does otherwise

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, D)."""
        assert self.scalar_head is None, "model.head=scalar has no logits"
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    @property
    def scalar_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(D,) and (1,)."""
        assert self.scalar_head is not None
        return self.scalar_head.weight[0], self.scalar_head.bias

    @property
    def holds_all_tokens(self) -> bool:
        """Whether the residual stream has every token of a sequence here."""
        return True

    def sum_of_parts(self, part: torch.Tensor) -> torch.Tensor:
        """Over the ranks that share a layer."""
        return part

    def head_input(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The output of `hidden` as `head_weight` multiplies it."""
        return x_BTD

    def losses_of_logits(
        self, logits_NV: torch.Tensor, targets_N: torch.Tensor, label_smoothing: float, z_loss: float
    ) -> torch.Tensor:
        """Cross-entropy of the products with `head_weight`, fp32, (N,)."""
        return token_losses(logits_NV, targets_N, label_smoothing, z_loss)

    def logprobs_and_entropy_of_logits(
        self, logits_NV: torch.Tensor, targets_N: torch.Tensor, temperature: float, entropy_gradient: bool
    ) -> torch.Tensor:
        """Of the products with `head_weight`, fp32, (N, 2)."""
        return logprobs_and_entropy(logits_NV, targets_N, temperature, entropy_gradient)

    def first_token(self, n_tokens: int) -> int:
        """Index of the first token that the residual stream holds, in sequences of `n_tokens`."""
        return 0


def _spread(value_N: torch.Tensor, place_N: torch.Tensor, size: int) -> torch.Tensor:
    """Values at their places among `size`, (size, ...), and zeros."""
    return value_N.new_zeros(size, *value_N.shape[1:]).index_put((place_N,), value_N)
