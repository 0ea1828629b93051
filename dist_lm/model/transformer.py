"""The decoder-only transformer, in plain PyTorch without any idea of ranks.

    tokens -> embedding -> n_layers x Block -> norm -> head -> logits (or a score)
    Block:  x += attention(norm(x));  x += feed_forward(norm(x))          (pre-LN, Radford et al. 2019)
            x += attention(norm(x)) + feed_forward(norm(x))               (parallel residual, Wang & Komatsuzaki 2021)

A new model has no values: build it on the meta device if it is large, and fill it with `keyed_random.initialise`.

Dimensions: B sequences, T tokens, D d_model, V vocabulary.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch import nn

from dist_lm.config.model import ModelConfig
from dist_lm.data.batch import Batch
from dist_lm.model import cross_entropy
from dist_lm.model.attention import CAUSAL, Attention, Visibility, within_documents
from dist_lm.model.cross_entropy import Logprobs, Losses, losses_in_chunks
from dist_lm.model.keyed_random import (
    EMBEDDING_SITE,
    DropoutKey,
    SiteDropout,
    apply_dropout,
    dropout_sites,
    residual_site,
)
from dist_lm.model.layers import FeedForward, RopeTables, build_norm, capped, rope_tables
from dist_lm.model.token_sets import TokenSets


class Block(nn.Module):
    """One layer: attention, then (or beside it) the feed-forward network, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
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
        first_BSGK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The residual stream after the layer, (B, T, D), and the values of the first layer, see `Attention.forward`.

        Args:
            kept_N: int64; places in the flattened batch of the tokens whose output is needed. Then the result is
                (1, N, D), and the feed-forward network skips the other tokens, which are only attended to. None: all.
        """
        a_BTD, first_BSGK = self.attention(self.attention_norm(x_BTD), rope, visibility, first_BSGK)
        input_BTD, x_BTD = x_BTD, x_BTD + apply_dropout(a_BTD, dropout[0])
        if kept_N is not None:
            assert dropout[1] is None, "dropout depends on the place of a token"
            x_BTD = x_BTD.flatten(0, 1).index_select(0, kept_N)[None]
            if self.parallel_residual:
                input_BTD = input_BTD.flatten(0, 1).index_select(0, kept_N)[None]
        f_BTD = self.feed_forward(self.feed_forward_norm(input_BTD if self.parallel_residual else x_BTD))
        return x_BTD + apply_dropout(f_BTD, dropout[1]), first_BSGK


class Transformer(nn.Module):
    """The model as stages, objectives and evaluators see it.

    They ask for `token_losses`, `logprobs` or `scores` of a batch, because no rank may ever hold all logits. The three
    attributes below are set by whoever builds or trains the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.document_mask = True  # attention over a batch stays inside documents
        self.chunk_bytes = 0  # largest block of fp32 logits; 0: no limit
        self.dropout: DropoutKey | None = None  # dropout over a batch, with the sequence numbers of the batch
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = build_norm(config)
        # a tied head reads the weight of the embedding and has no parameter
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
            document_BT: attention stays inside equal numbers; None: all earlier tokens are visible.
            position_BT: int64, for RoPE; None: 0 to T - 1.
            dropout: None: no dropout. Independent of train() and eval().
        """
        return self.head(self.hidden(tokens_BT, document_BT=document_BT, position_BT=position_BT, dropout=dropout))

    def hidden(
        self,
        tokens_BT: torch.Tensor,
        *,
        document_BT: torch.Tensor | None = None,
        position_BT: torch.Tensor | None = None,
        branch_BT: torch.Tensor | None = None,
        boundary: torch.Tensor | None = None,
        dropout: DropoutKey | None = None,
        kept_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The normalised residual stream (B, T, D), the input of `head`. Arguments as in `forward`.

        Args:
            branch_BT, boundary: see `within_documents`; only with `document_BT`.
            kept_N: see `Block.forward`, for the last layer; not with dropout.
        """
        x_BTD = self.embedding(tokens_BT)
        if position_BT is None:
            position_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        rope = rope_tables(position_BT, self.config, x_BTD.dtype)
        visibility = CAUSAL
        if document_BT is not None:
            visibility = within_documents(document_BT, x_BTD.dtype, self.config.d_head, branch_BT, boundary)
        first_token = self.first_token(tokens_BT.shape[1])
        sites = dropout_sites(dropout, self.config.n_layers, self.config.d_model, first_token)
        x_BTD = apply_dropout(x_BTD, sites[EMBEDDING_SITE])
        first_BSGK = None
        for layer, block in enumerate(self.blocks):
            own = (sites[residual_site(layer, 0)], sites[residual_site(layer, 1)])
            kept = kept_N if layer == len(self.blocks) - 1 else None
            x_BTD, first_BSGK = block(x_BTD, rope, visibility, own, kept, first_BSGK)
        return self.final_norm(x_BTD)

    def head(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) from the output of `hidden`."""
        return capped(F.linear(x_BTD, self.head_weight), self.config.logit_cap)

    def token_losses(self, batch: Batch, label_smoothing: float = 0.0, z_loss: float = 0.0) -> torch.Tensor:
        """Cross-entropy of every target in nats, fp32, (B, T); 0 where `batch.counted_N` leaves a token out.

        Arguments are those of `cross_entropy.token_losses`.
        """
        x_ND = self._head_input(batch, batch.counted_N)
        losses = partial(self.losses_of_logits, label_smoothing=label_smoothing, z_loss=z_loss)
        targets_N = _chosen(batch.targets_BT.flatten(), batch.counted_N)
        losses_N = losses_in_chunks(x_ND, self.head_weight, targets_N, self._of_capped(losses), self.chunk_bytes)
        return _spread(losses_N, batch.counted_N, batch)

    def logprobs(
        self, batch: Batch, temperature: float, entropy_gradient: bool = False, sets: TokenSets | None = None
    ) -> Logprobs:
        """Log-probability and entropy of every target if it is sampled at `temperature`; 0 where `batch.counted_N`
        leaves a token out.

        Args:
            entropy_gradient: whether the entropy has a gradient.
            sets: the tokens among which each of `batch.counted_N` was drawn; None: the whole vocabulary.
        """
        x_ND = self._head_input(batch, batch.counted_N)
        targets_N = _chosen(batch.targets_BT.flatten(), batch.counted_N)
        place_N = torch.arange(len(targets_N), device=targets_N.device)

        def both(logits_nV: torch.Tensor, target_and_place_n2: torch.Tensor) -> torch.Tensor:
            target_n, place_n = target_and_place_n2.unbind(-1)
            kept_nV = sets.kept(place_n, self.config.vocab_size, self.own_pieces) if sets else None
            return self.logprobs_of_logits(logits_nV, target_n, temperature, entropy_gradient, kept_nV)

        target_and_place_N2 = torch.stack([targets_N, place_N], dim=-1)
        both_N2 = losses_in_chunks(x_ND, self.head_weight, target_and_place_N2, self._of_capped(both), self.chunk_bytes)
        return Logprobs(*(_spread(column_N, batch.counted_N, batch) for column_N in both_N2.unbind(-1)))

    def scores(self, batch: Batch, read_N: torch.Tensor | None = None, learns_offset: bool = True) -> torch.Tensor:
        """A score of the text up to each token, fp32, (B, T); only with `model.head=scalar`.

        Args:
            read_N: int64; places of the wanted tokens in the flattened batch; other tokens have score 0. None: all.
            learns_offset: False: the gradient of the head's bias is exactly 0. If the loss depends only on differences
                of scores, that gradient would be rounding, and Adam turns rounding into full steps.
        """
        assert self.scalar_head is not None, "model.head=tokens has no scores"
        x_ND = self._head_input(batch, read_N).float()
        weight_D, bias_1 = self.scalar_weights
        bias_1 = bias_1 if learns_offset else bias_1.detach() + 0 * bias_1
        score_N = self.sum_of_parts(x_ND @ weight_D.float()) + bias_1.float()
        return _spread(score_N, read_N, batch)

    def _of_capped(self, losses: Losses) -> Losses:
        """`losses` of products with the head's weight, with `model.logit_cap`."""
        cap = self.config.logit_cap
        return (lambda products, targets: losses(capped(products.float(), cap), targets)) if cap else losses

    def _head_input(self, batch: Batch, chosen_N: torch.Tensor | None) -> torch.Tensor:
        """The input of the head at the chosen tokens (None: at all tokens), (N, D)."""
        # the last feed-forward network skips the other tokens, where this rank has all tokens and dropout has no places
        early = chosen_N is not None and self.holds_all_tokens and self.dropout is None
        x_BTD = self.hidden(
            batch.tokens_BT,
            document_BT=batch.document_BT if self.document_mask else None,
            position_BT=batch.position_BT,
            branch_BT=batch.branch_BT if self.document_mask else None,
            boundary=batch.boundary if self.document_mask else None,
            dropout=replace(self.dropout, sequence_B=batch.sequence_B) if self.dropout else None,
            kept_N=chosen_N if early else None,
        )
        x_ND = self.head_input(x_BTD).flatten(0, 1)
        return x_ND if early else _chosen(x_ND, chosen_N)

    # A model whose layers are shared by several ranks overrides these.

    losses_of_logits = staticmethod(cross_entropy.token_losses)  # logits are products with `head_weight`
    logprobs_of_logits = staticmethod(cross_entropy.logprobs_and_entropy)

    @property
    def head_weight(self) -> torch.Tensor:
        """Weight of the head of tokens, (V, D)."""
        assert self.scalar_head is None, "model.head=scalar has no logits"
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    @property
    def scalar_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (D,) and bias (1,) of the scalar head."""
        assert self.scalar_head is not None
        return self.scalar_head.weight[0], self.scalar_head.bias

    @property
    def own_pieces(self) -> range:
        """The tokens whose logits this rank computes."""
        return range(self.config.vocab_size)

    @property
    def holds_all_tokens(self) -> bool:
        """Whether the residual stream of this rank has all tokens of a sequence."""
        return True

    def sum_of_parts(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that share a layer."""
        return part

    def head_input(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The output of `hidden`, ready for the product with `head_weight`."""
        return x_BTD

    def first_token(self, n_tokens: int) -> int:
        """Index of the first token in the residual stream of this rank, for sequences of `n_tokens`."""
        return 0


def _chosen(value_N: torch.Tensor, chosen_N: torch.Tensor | None) -> torch.Tensor:
    return value_N if chosen_N is None else value_N[chosen_N]


def _spread(value_N: torch.Tensor, chosen_N: torch.Tensor | None, batch: Batch) -> torch.Tensor:
    """Values of the chosen tokens at their places in the batch, (B, T), and 0 elsewhere."""
    shape = batch.tokens_BT.shape
    if chosen_N is None:
        return value_N.view(shape).clone()  # FSDP's hooks do not work on views
    zeros_N = value_N.new_zeros(shape.numel())
    return zeros_N.index_put((chosen_N,), value_N).view(shape).clone()
