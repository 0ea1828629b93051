"""The decoder-only transformer, in plain PyTorch without any idea of ranks.

    tokens -> embedding -> n_layers x Block -> norm -> head -> logits (or a score)
    Block:  x += attention(norm(x));  x += feed_forward(norm(x))          (pre-LN, Radford et al. 2019)
            x += attention(norm(x)) + feed_forward(norm(x))               (parallel residual, Wang & Komatsuzaki 2021)
            x += norm(attention(x));  x += norm(feed_forward(x))          (norm after, OLMo Team 2024)

A new model has no values: build it on the meta device if it is large, and fill it with `keyed_random.initialise`.

Dimensions: B sequences, T tokens (t those of this rank), N some tokens of a batch, n a chunk of these, D d_model, V
vocabulary, S keys, G key/value heads, K d_head.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import nn

from dist_lm.config.model import ModelConfig
from dist_lm.data.batch import Batch
from dist_lm.model import cross_entropy
from dist_lm.model.attention import CAUSAL, Attention, Visibility, within_documents, within_window
from dist_lm.model.cross_entropy import Logprobs, LossFn, losses_in_chunks
from dist_lm.model.keyed_random import (
    EMBEDDING_SITE,
    DropoutKey,
    SiteDropout,
    adapter_sites,
    apply_dropout,
    dropout_sites,
    residual_site,
)
from dist_lm.model.layers import FeedForward, RopeTables, build_norm, capped, rope_tables
from dist_lm.model.lora import AdapterDropout
from dist_lm.model.token_sets import TokenSets


class Block(nn.Module):
    """One layer: attention, then (or beside it) the feed-forward network, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        # The order of modules is the order of parameters in checkpoints, and in weights that are streamed to engines
        # (`size.parameter_shapes`).
        self.parallel_residual = config.parallel_residual
        self.residual_scale = config.residual_scale
        self.norm_after = config.norm_place == "after"
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
        index_N: torch.Tensor | None = None,
        v1_BSGK: torch.Tensor | None = None,
        adapter_dropout: AdapterDropout = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the residual stream after the layer, (B, T, D), and `v1_BSGK` as returned by `Attention.forward`.

        Args:
            dropout: after attention, and after the feed-forward network.
            adapter_dropout: of the inputs of adapters.
            index_N: int64; indices into the flattened batch of the tokens whose output is needed. The output is then
                (1, N, D): the other tokens are only attended to, the feed-forward network skips them. None: all tokens.
        """
        input_BTD = x_BTD
        h_BTD = x_BTD if self.norm_after else self.attention_norm(x_BTD)
        a_BTD, v1_BSGK = self.attention(h_BTD, rope, visibility, v1_BSGK, adapter_dropout)
        if self.norm_after:
            a_BTD = self.attention_norm(a_BTD)
        if self.residual_scale != 1:
            a_BTD = a_BTD * self.residual_scale
        x_BTD = x_BTD + apply_dropout(a_BTD, dropout[0])

        # Attention was the last use of the tokens that are not selected.
        if index_N is not None:
            assert dropout[1] is adapter_dropout is None, "dropout depends on the place of a token"
            x_BTD = x_BTD.flatten(0, 1).index_select(0, index_N)[None]
            if self.parallel_residual:
                input_BTD = input_BTD.flatten(0, 1).index_select(0, index_N)[None]

        # The parallel residual feeds both branches from the same input; otherwise the feed-forward network reads the
        # residual stream with the output of attention added.
        if not self.parallel_residual:
            input_BTD = x_BTD
        h_BTD = input_BTD if self.norm_after else self.feed_forward_norm(input_BTD)
        f_BTD = self.feed_forward(h_BTD, adapter_dropout)
        if self.norm_after:
            f_BTD = self.feed_forward_norm(f_BTD)
        if self.residual_scale != 1:
            f_BTD = f_BTD * self.residual_scale
        return x_BTD + apply_dropout(f_BTD, dropout[1]), v1_BSGK


class TokenAxis(Protocol):
    """The ranks that share the tokens of their sequences (`parallel.context_axis`)."""

    def held(self, n_tokens: int) -> slice:
        """Returns which of the `n_tokens` tokens of a sequence this rank holds."""
        ...

    def whole(self, part_Bt: torch.Tensor) -> torch.Tensor:
        """Returns the numbers of all tokens, (B, T), from the part of each rank (collective)."""
        ...


class Transformer(nn.Module):
    """The model as stages, objectives and evaluators see it.

    They ask for `token_losses`, `logprobs` or `scores` of a batch and never for logits, which no rank may hold whole.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

        # Settings of a run, set by the code that builds or trains the model.
        self.document_mask = True  # attention over a batch stays inside documents
        self.chunk_bytes = 0  # largest block of fp32 logits; 0: no limit
        self.dropout: DropoutKey | None = None  # dropout over a batch, with the sequence numbers of the batch
        # ids of the tokens whose rows of the embedding and the head are trained, (N,); None: those of all tokens
        self.trained_tokens: torch.Tensor | None = None
        # The ranks that share the tokens of a batch, which is the same on all of them; None: this rank has all tokens.
        self.token_axis: TokenAxis | None = None

        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = build_norm(config)
        self.windows = config.windows
        self.head_product = cross_entropy.product_of(config.head_dtype)

        self.lm_head = self.scalar_head = None
        if config.head == "scalar":
            self.scalar_head = nn.Linear(config.d_model, 1)
        # A tied head reads the weight of the embedding and has no parameter.
        elif not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        *,
        document_BT: torch.Tensor | None = None,
        position_BT: torch.Tensor | None = None,
        dropout: DropoutKey | None = None,
    ) -> torch.Tensor:
        """Returns logits (B, T, V) in the dtype of the parameters, or that of `model.head_dtype`.

        Args:
            tokens_BT: int64.
            document_BT: int64; attention stays inside equal numbers; None: all earlier tokens are visible.
            position_BT: int64, for RoPE; None: 0 to T - 1.
            dropout: None: no dropout; else a key with its sequence numbers. Independent of train() and eval().
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
        index_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the residual stream after the final norm, (B, T, D), the input of `head`, in the dtype of the
        parameters; with a token head it is divided by `model.logit_divisor`. Other arguments as in `forward`.

        If ranks share the tokens, T counts those of this rank in the result, and all of them in the arguments.

        Args:
            branch_BT, boundary: see `within_documents`; only with `document_BT`.
            index_N: see `Block.forward`, for the last layer, of the tokens of this rank; the output is then (1, N, D).
                Not with dropout.
        """
        held_tokens = self._held(tokens_BT.shape[1])
        x_BTD = self.embedding(tokens_BT[:, held_tokens])
        if self.config.embedding_scale != 1:
            x_BTD = x_BTD * self.config.embedding_scale

        # All layers share the rotation tables, and the attention mask of their kind.
        if position_BT is None:
            position_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        rope = rope_tables(position_BT[:, held_tokens], self.config, x_BTD.dtype)
        visibility = CAUSAL  # of layers without a window
        if document_BT is not None:
            visibility = within_documents(document_BT, x_BTD.dtype, self.config.d_head, branch_BT, boundary)
        visibility_of: dict[int | None, Visibility] = {None: visibility}
        if (window := self.config.window) is not None:
            visibility_of[window] = within_window(
                visibility, window, position_BT, tokens_BT.shape, x_BTD.dtype, self.config.d_head
            )

        # Dropout is keyed by the index of a token in its sequence, also where a rank holds a part of the sequence.
        n_held = held_tokens.stop - held_tokens.start
        first_index = held_tokens.start + self.first_held_index(n_held)
        sites = dropout_sites(dropout, self.config.n_layers, self.config.d_model, first_index)
        x_BTD = apply_dropout(x_BTD, sites[EMBEDDING_SITE])
        widest = max(self.config.d_model, self.config.n_heads * self.config.d_head, self.config.d_ff)
        sites_of_adapters = adapter_sites(dropout, self.config.n_layers, widest, held_tokens.start)

        v1_BSGK = None  # values of the first layer, with `model.value_residual`
        for layer, block in enumerate(self.blocks):
            is_last = layer == len(self.blocks) - 1
            residual_dropout = (sites[residual_site(layer, 0)], sites[residual_site(layer, 1)])
            visibility = visibility_of[self.windows[layer]]
            x_BTD, v1_BSGK = block(
                x_BTD,
                rope,
                visibility,
                residual_dropout,
                index_N if is_last else None,
                v1_BSGK,
                sites_of_adapters[layer],
            )
        x_BTD = self.final_norm(x_BTD)
        # Scores have no divisor.
        if self.config.logit_divisor != 1 and self.scalar_head is None:
            x_BTD = x_BTD / self.config.logit_divisor
        return x_BTD

    def head(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns logits (..., V) for the output of `hidden`."""
        return capped(self.head_product(x_BTD, self.head_weight), self.config.logit_cap)

    def token_losses(self, batch: Batch, label_smoothing: float = 0.0, z_loss: float = 0.0) -> torch.Tensor:
        """Returns the cross-entropy of every target in nats, fp32, (B, T); 0 for tokens that are not in
        `batch.logit_index_N`.

        Arguments are those of `cross_entropy.token_losses`.
        """
        index_N = self._index_of_held(batch, batch.logit_index_N)
        x_ND = self._hidden_of_batch(batch, index_N)
        targets_N = self._targets(batch, index_N)

        loss_fn = partial(self.losses_of_logits, label_smoothing=label_smoothing, z_loss=z_loss)
        loss_fn = self._with_logit_cap(loss_fn)
        losses_N = losses_in_chunks(x_ND, self.head_weight, targets_N, loss_fn, self.chunk_bytes, self.head_product)
        return self._scatter(losses_N, index_N, batch)

    def logprobs(
        self, batch: Batch, temperature: float, entropy_gradient: bool = False, sets: TokenSets | None = None
    ) -> Logprobs:
        """Returns log-probability and entropy, in nats, of every target if it is sampled at `temperature`; 0 for tokens
        that are not in `batch.logit_index_N`.

        Both are of softmax(logits / temperature), renormalised over the set of each token: the distribution that an
        engine draws from with the same settings.

        Args:
            entropy_gradient: whether the entropy has a gradient.
            sets: the tokens among which each of `batch.logit_index_N` was drawn; None: the whole vocabulary.
        """
        assert sets is None or self.token_axis is None, "sets are numbered by the tokens of whole sequences"
        index_N = self._index_of_held(batch, batch.logit_index_N)
        x_ND = self._hidden_of_batch(batch, index_N)
        targets_N = self._targets(batch, index_N)

        # Logits are computed in chunks, so each target carries the index of its set with it.
        set_N = torch.arange(len(targets_N), device=targets_N.device)
        target_and_set_N2 = torch.stack([targets_N, set_N], dim=-1)

        def logprob_and_entropy(logits_nV: torch.Tensor, target_and_set_n2: torch.Tensor) -> torch.Tensor:
            target_n, set_n = target_and_set_n2.unbind(-1)
            allowed_nV = None
            if sets:
                allowed_nV = sets.mask(set_n, self.config.vocab_size, self.vocab_range)
            return self.logprobs_of_logits(logits_nV, target_n, temperature, entropy_gradient, allowed_nV)

        loss_fn = self._with_logit_cap(logprob_and_entropy)
        columns_N2 = losses_in_chunks(
            x_ND, self.head_weight, target_and_set_N2, loss_fn, self.chunk_bytes, self.head_product
        )
        return Logprobs(*(self._scatter(column_N, index_N, batch) for column_N in columns_N2.unbind(-1)))

    def scores(self, batch: Batch, index_N: torch.Tensor | None = None, learns_offset: bool = True) -> torch.Tensor:
        """Returns a score of the text up to each token, fp32, (B, T); only with `model.head=scalar` (asserted).

        Args:
            index_N: int64; indices into the flattened batch of the tokens to score; other tokens get 0. None: all.
            learns_offset: False: the gradient of the head's bias is exactly 0. If the loss depends only on differences
                of scores, that gradient would be rounding, and Adam turns rounding into full steps.
        """
        assert self.scalar_head is not None, "model.head=tokens has no scores"
        index_N = self._index_of_held(batch, index_N)
        x_ND = self._hidden_of_batch(batch, index_N).float()

        weight_D, bias_1 = self.scalar_weights
        if not learns_offset:
            bias_1 = bias_1.detach() + 0 * bias_1  # a gradient of zero and not none, so that FSDP reduces it

        score_N = self.sum_over_ranks(x_ND @ weight_D.float()) + bias_1.float()
        return self._scatter(score_N, index_N, batch)

    def _with_logit_cap(self, loss_fn: LossFn) -> LossFn:
        """Returns a function of uncapped logits that caps them and then calls `loss_fn`; without a cap, `loss_fn`."""
        cap = self.config.logit_cap
        if not cap:
            return loss_fn
        return lambda logits_NV, targets: loss_fn(capped(logits_NV.float(), cap), targets)

    def _hidden_of_batch(self, batch: Batch, index_N: torch.Tensor | None) -> torch.Tensor:
        """Runs the model on a batch and returns the input of the head, (N, D), for the tokens at `index_N` of the
        flattened tokens of this rank (int64; None: all)."""
        # Selecting before the last feed-forward network saves its work for the other tokens. This needs all tokens of a
        # sequence on this rank and no dropout, which is keyed by the position of a token.
        selects_early = index_N is not None and self.holds_all_tokens and self.dropout is None

        document_BT = branch_BT = boundary = None
        if self.document_mask:
            document_BT, branch_BT, boundary = batch.document_BT, batch.branch_BT, batch.boundary
        x_BTD = self.hidden(
            batch.tokens_BT,
            document_BT=document_BT,
            position_BT=batch.position_BT,
            branch_BT=branch_BT,
            boundary=boundary,
            dropout=self.dropout and replace(self.dropout, sequence_B=batch.sequence_B),
            index_N=index_N if selects_early else None,
        )

        x_ND = self.head_input(x_BTD).flatten(0, 1)
        if selects_early:
            return x_ND
        return _select(x_ND, index_N)

    def _held(self, n_tokens: int) -> slice:
        """Returns which of the `n_tokens` tokens of a sequence this rank holds."""
        return slice(0, n_tokens) if self.token_axis is None else self.token_axis.held(n_tokens)

    def _index_of_held(self, batch: Batch, index_N: torch.Tensor | None) -> torch.Tensor | None:
        """Translates indices into the flattened batch to indices into this rank's flattened tokens, and drops those of
        tokens that other ranks hold; None (all) stays None. If ranks share the tokens, the host waits for the GPU."""
        if self.token_axis is None or index_N is None:
            return index_N
        n_tokens = batch.tokens_BT.shape[1]
        held_tokens = self._held(n_tokens)

        row_N, column_N = index_N // n_tokens, index_N % n_tokens
        is_held_N = (column_N >= held_tokens.start) & (column_N < held_tokens.stop)
        return (row_N * (held_tokens.stop - held_tokens.start) + column_N - held_tokens.start)[is_held_N]

    def _targets(self, batch: Batch, index_N: torch.Tensor | None) -> torch.Tensor:
        """Returns the targets (N,) at `index_N` of the flattened tokens of this rank."""
        held_tokens = self._held(batch.targets_BT.shape[1])
        return _select(batch.targets_BT[:, held_tokens].flatten(), index_N)

    def _scatter(self, x_N: torch.Tensor, index_N: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Returns a (B, T) tensor of zeros with `x_N` written at `index_N` of this rank's flattened tokens (None:
        everywhere). If ranks share the tokens, their parts are gathered (collective)."""
        n_sequences, n_tokens = batch.tokens_BT.shape
        held_tokens = self._held(n_tokens)
        shape = (n_sequences, held_tokens.stop - held_tokens.start)
        if index_N is not None:
            x_N = x_N.new_zeros(math.prod(shape)).index_put((index_N,), x_N)
        x_Bt = x_N.view(shape)
        if self.token_axis is not None:
            x_Bt = self.token_axis.whole(x_Bt)
        return x_Bt.clone()  # FSDP's hooks do not work on views

    # The tensor-parallel model, whose layers are split over several ranks, overrides everything below
    # (`dist_lm.parallel.tensor_parallel`).

    losses_of_logits = staticmethod(cross_entropy.token_losses)
    logprobs_of_logits = staticmethod(cross_entropy.logprobs_and_entropy)

    @property
    def head_weight(self) -> torch.Tensor:
        """Weight of the token head, (V, D)."""
        assert self.scalar_head is None, "model.head=scalar has no logits"
        if self.lm_head is None:  # tied
            return self.embedding.weight
        return self.lm_head.weight

    @property
    def scalar_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (D,) and bias (1,) of the scalar head."""
        assert self.scalar_head is not None
        return self.scalar_head.weight[0], self.scalar_head.bias

    @property
    def vocab_range(self) -> range:
        """The token ids whose logits this rank computes."""
        return range(self.config.vocab_size)

    @property
    def holds_all_tokens(self) -> bool:
        """Whether the residual stream of this rank has all tokens of a sequence."""
        return True

    def sum_over_ranks(self, part: torch.Tensor) -> torch.Tensor:
        """Returns the sum of `part` over the ranks that share a layer, in its shape."""
        return part

    def head_input(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the output of `hidden`, ready for the product with `head_weight`."""
        return x_BTD

    def first_held_index(self, n_tokens: int) -> int:
        """Returns the index, in its sequence of `n_tokens`, of the first token that this rank holds in its residual
        stream."""
        return 0


def _select(x_N: torch.Tensor, index_N: torch.Tensor | None) -> torch.Tensor:
    return x_N if index_N is None else x_N[index_N]
