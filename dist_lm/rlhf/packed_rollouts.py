"""Rollouts as micro-batches: packed into rows, several to a row, and dealt to the data-parallel ranks. Pure functions.

The packing depends on which rollouts go together, on their lengths and on the number of ranks, not on how they were
drawn. Every rank gets the same number of micro-batches with the same shapes; a rank without rollouts gets padding.

Log-probabilities and values are read at the token before each completion token, so rows for them omit the last token of
each rollout. Scores are read at the last token, so rows for them hold whole rollouts.

Of conversations, the completion tokens are those that the model drew, one turn after the other. A conversation is one
sequence of tokens (a sample), or several if its template writes earlier turns otherwise. Each sample is placed by
itself, as a rollout is. A minibatch holds all samples of its conversations.

Dimensions: B rollouts in all, T tokens of the longest completion, S some of the rollouts (of conversations: samples), N
completion tokens of a micro-batch, M completion tokens of all rollouts. Fields of other files keep their own letters:
in a `Batch`, B are rows and T is their width; in `Rollouts.tokens_N`, N are the tokens of all prompts and completions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from dist_lm.data.batch import Batch
from dist_lm.data.order import Shuffle, key, permutation
from dist_lm.data.packing import best_fit_decreasing, longest_first
from dist_lm.model.token_sets import TokenSets
from dist_lm.rlhf.rollouts import Rollouts

SetsOf = Callable[[np.ndarray], TokenSets | None]
"""Indices of K completion tokens in M -> the sets they were drawn from; None: the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class RolloutBatch(Batch):
    """Rollouts in rows, each without its last token.

    `logit_index_N` are indices in the flattened batch of the tokens that predict a completion token.
    """

    # int64; where each completion token stands in a flattened (B, T) tensor such as `Experience.logprob_BT`: number of
    # its rollout * T + its number in the completion
    column_N: torch.Tensor = field(kw_only=True)
    # the tokens among which each completion token was drawn; None: the whole vocabulary
    sets: TokenSets | None = field(kw_only=True, default=None)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RolloutBatch":
        changed = cast(RolloutBatch, Batch._each(self, change))
        if not self.sets:
            return changed
        return replace(changed, sets=self.sets.each(change))


@dataclass(frozen=True, slots=True)
class ScoringBatch(Batch):
    """Whole rollouts in rows, without targets."""

    end_S: torch.Tensor = field(kw_only=True)  # int64; places of the last tokens in the flattened batch
    rollout_S: torch.Tensor = field(kw_only=True)  # int64; number of the rollout of each last token


@dataclass(frozen=True)
class Dealing:
    """How rollouts are divided into micro-batches and among ranks."""

    micro_batch_tokens: int  # largest micro-batch; it has at least one row
    dp_rank: int = 0
    dp_size: int = 1
    multiple: int = 1  # the width of a row is a multiple of this


@dataclass(frozen=True)
class Minibatch:
    """The rollouts of one update."""

    batches: list[RolloutBatch]  # this rank's micro-batches, on the models' device
    rollout_S: np.ndarray  # int64; the rollouts of all ranks


class Passes:
    """The passes over an iteration's rollouts: pass number (0 to rlhf.epochs - 1) -> its minibatches in order.

    The minibatches of pass 0 are packed once and kept: the forward passes before the first update use them too.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        dealing: Dealing,
        device: torch.device,
        *,
        seed: int,
        iteration: int,
        minibatches: int,
        sets_of: SetsOf | None = None,
    ) -> None:
        """
        Args:
            minibatches: number of minibatches of a pass.
            sets_of: None: the sets that came with the rollouts.
        """
        self._sets_of = sets_of
        self._rollouts, self._dealing, self._device = rollouts, dealing, device
        self._order, self._n_minibatches = (seed, iteration), minibatches
        self._first: list[Minibatch] = []

    def __call__(self, pass_number: int) -> list[Minibatch]:
        # One minibatch of all rollouts is the same in every pass.
        if self._first and (pass_number == 0 or self._n_minibatches == 1):
            return self._first

        result = []
        for rollout_S in minibatches(*self._order, pass_number, len(self._rollouts), self._n_minibatches):
            batches = rollout_batches(self._rollouts, rollout_S, self._dealing, self._sets_of)
            result.append(Minibatch([batch.to(self._device) for batch in batches], rollout_S))
        if not self._first:
            self._first = result
        return result


def completion_mask(rollouts: Rollouts) -> np.ndarray:
    """Returns True on the tokens of each completion, left-aligned, (B, T) bool."""
    longest = int(rollouts.new_tokens_B.max())
    return np.arange(longest) < rollouts.new_tokens_B[:, None]


def minibatches(seed: int, iteration: int, pass_number: int, n_rollouts: int, n: int) -> list[np.ndarray]:
    """Returns the numbers of the rollouts of each of the `n` minibatches of a pass, int64: disjoint, reshuffled every
    pass. Fewer rollouts give fewer minibatches.
    """
    order = permutation(n_rollouts, key(Shuffle.UPDATES, seed, iteration, pass_number))
    return np.array_split(order, min(n, n_rollouts))


def rollout_batches(
    rollouts: Rollouts, chosen_S: np.ndarray, dealing: Dealing, sets_of: SetsOf | None = None
) -> list[RolloutBatch]:
    """Returns a rank's micro-batches of the rollouts `chosen_S`, each without its last token.

    Rows are as wide as the longest of all rollouts.

    Args:
        sets_of: None: the sets that came with the rollouts.
    """
    rows, spans = _dealt(rollouts, chosen_S, dealing, n_omitted=1)
    return [rows.batch(begin, end, sets_of or rollouts.sets_of) for begin, end in spans]


def scoring_batches(rollouts: Rollouts, dealing: Dealing) -> list[ScoringBatch]:
    """Returns a rank's micro-batches of all rollouts, last tokens included; none may be a conversation."""
    assert not rollouts.are_conversations, "a conversation of several samples has no single last token"
    rows, spans = _dealt(rollouts, np.arange(len(rollouts)), dealing, n_omitted=0)
    return [rows.scoring_batch(begin, end) for begin, end in spans]


@dataclass(frozen=True)
class _Sequences:
    """Content of rows: rollouts, or the samples of conversations. Here S counts all of them, also those of other
    minibatches."""

    rollout_S: np.ndarray  # int64; the rollout of each
    begin_S: np.ndarray  # int64; index of its first token in `Rollouts.tokens_N`
    length_S: np.ndarray  # int64; its tokens
    new_begin_S: np.ndarray  # int64; index in M of its first completion token
    new_S: np.ndarray  # int64; its completion tokens
    place_M: np.ndarray  # int64; index of each completion token in `tokens_N`

    @classmethod
    def of(cls, rollouts: Rollouts) -> "_Sequences":
        """Returns a sequence for each rollout, or of conversations one for each sample, in the order of `rollouts`."""
        if rollouts.are_conversations:
            length_S = rollouts.sample_tokens_S
            rollout_S = np.repeat(np.arange(len(rollouts)), rollouts.samples_B)
            place_M = np.flatnonzero(rollouts.drawn_N)
            end_S = np.cumsum(length_S)
            new_end_S = np.searchsorted(place_M, end_S)
            new_S = np.diff(new_end_S, prepend=0)
            return cls(rollout_S, end_S - length_S, length_S, new_end_S - new_S, new_S, place_M)

        prompt_B, new_B = rollouts.prompt_tokens_B, rollouts.new_tokens_B
        length_B = prompt_B + new_B
        begin_B = np.cumsum(length_B) - length_B
        place_M = np.repeat(begin_B + prompt_B, new_B) + _ranges(new_B)
        return cls(np.arange(len(rollouts)), begin_B, length_B, np.cumsum(new_B) - new_B, new_B, place_M)


def _dealt(
    rollouts: Rollouts, chosen_S: np.ndarray, dealing: Dealing, n_omitted: int
) -> tuple["_Rows", list[tuple[int, int]]]:
    """Returns this rank's rows, and (begin row, end row) of each micro-batch; every rank has equally many of each.

    Args:
        chosen_S: numbers of the rollouts. Below, S counts sequences, of which a conversation has several: its samples.
        n_omitted: tokens at the end of each rollout, or sample, that are not placed.
    """
    sequences = _Sequences.of(rollouts)
    placed_S = sequences.length_S - n_omitted
    # The width depends on all rollouts, not on the chosen ones: compiled kernels see few different shapes.
    width = -(-int(placed_S.max()) // dealing.multiple) * dealing.multiple
    number_S = longest_first(np.flatnonzero(np.isin(sequences.rollout_S, chosen_S)), placed_S)
    row_S = best_fit_decreasing(placed_S[number_S], width)

    # Rows go to the ranks in turns. Every rank gets the same number, so that all ranks take part in every pass.
    rows_per_rank = -(-(int(row_S.max()) + 1) // dealing.dp_size)
    is_own_S = row_S % dealing.dp_size == dealing.dp_rank
    own_row_S = row_S[is_own_S] // dealing.dp_size
    rows = _Rows(rollouts, sequences, number_S[is_own_S], own_row_S, width, rows_per_rank, n_omitted)

    rows_per_batch = max(1, dealing.micro_batch_tokens // width)
    starts = range(0, rows_per_rank, rows_per_batch)
    return rows, [(begin, min(begin + rows_per_batch, rows_per_rank)) for begin in starts]


class _Rows:
    """A rank's rows as one grid of tokens."""

    def __init__(
        self,
        rollouts: Rollouts,
        sequences: _Sequences,
        number_S: np.ndarray,
        row_S: np.ndarray,
        width: int,
        rows: int,
        n_omitted: int,
    ) -> None:
        """
        Args:
            number_S: numbers of the sequences.
            row_S: the row of each.
            width: tokens of a row.
            rows: number of rows.
            n_omitted: tokens at the end of each that are not placed.
        """
        order = np.argsort(row_S, kind="stable")
        number_S, row_S = number_S[order], row_S[order]
        length_S, new_S = sequences.length_S[number_S] - n_omitted, sequences.new_S[number_S]
        rollout_S, source_S = sequences.rollout_S[number_S], sequences.begin_S[number_S]
        longest = int(rollouts.new_tokens_B.max())

        # A sequence starts at row * width + the tokens of earlier ones in the same row.
        is_first_S = np.diff(row_S, prepend=-1) > 0
        row_index_S = np.cumsum(is_first_S) - 1  # number of its row among the rows that are used
        before_S = np.cumsum(length_S) - length_S
        begin_S = row_S * width + before_S - before_S[is_first_S][row_index_S]
        document_S = np.arange(len(row_S)) - np.flatnonzero(is_first_S)[row_index_S]

        self.width = width
        self.tokens = np.zeros(rows * width, np.int64)
        self.targets = np.zeros(rows * width, np.int64)
        self.mask = np.zeros(rows * width, np.float32)
        self.document = np.full(rows * width, len(number_S), np.int64)  # padding is a separate document
        self.position = np.zeros(rows * width, np.int64)

        # Copy the tokens: `source_S` is where each sequence begins in `rollouts.tokens_N`.
        offset = _ranges(length_S)
        index = np.repeat(begin_S, length_S) + offset
        self.tokens[index] = rollouts.tokens_N[np.repeat(source_S, length_S) + offset]
        self.document[index] = np.repeat(document_S, length_S)
        self.position[index] = offset

        # A completion token is predicted at the token before it.
        self.place_in_M = np.repeat(sequences.new_begin_S[number_S], new_S) + _ranges(new_S)
        place_in_N = sequences.place_M[self.place_in_M]
        self.logit_index = np.repeat(begin_S - source_S, new_S) + place_in_N - 1
        self.targets[self.logit_index] = rollouts.tokens_N[place_in_N]
        self.mask[self.logit_index] = 1

        # Columns count the completion tokens of a rollout, over all its samples.
        first_in_M = (np.cumsum(rollouts.new_tokens_B) - rollouts.new_tokens_B)[rollout_S]
        self.column = np.repeat(rollout_S * longest - first_in_M, new_S) + self.place_in_M
        self.end = begin_S + length_S - 1
        self.number = rollout_S

    def batch(self, begin_row: int, end_row: int, sets_of: SetsOf) -> RolloutBatch:
        """Returns rows `begin_row` to `end_row` - 1 as a batch on the host, with targets and the sets they were drawn
        from."""
        begin = begin_row * self.width
        is_inside = (self.logit_index >= begin) & (self.logit_index < end_row * self.width)
        return RolloutBatch(
            **self._tokens(begin_row, end_row),
            targets_BT=self._grid(self.targets, begin_row, end_row),
            loss_mask_BT=self._grid(self.mask, begin_row, end_row),
            logit_index_N=torch.from_numpy(self.logit_index[is_inside] - begin),
            column_N=torch.from_numpy(self.column[is_inside]),
            sets=sets_of(self.place_in_M[is_inside]),
        )

    def scoring_batch(self, begin_row: int, end_row: int) -> ScoringBatch:
        """Returns rows `begin_row` to `end_row` - 1 as a batch on the host, with the places of last tokens; targets and
        loss mask are 0."""
        begin = begin_row * self.width
        is_inside = (self.end >= begin) & (self.end < end_row * self.width)
        tokens = self._tokens(begin_row, end_row)
        return ScoringBatch(
            **tokens,
            targets_BT=torch.zeros_like(tokens["tokens_BT"]),
            loss_mask_BT=torch.zeros(tokens["tokens_BT"].shape),
            end_S=torch.from_numpy(self.end[is_inside] - begin),
            rollout_S=torch.from_numpy(self.number[is_inside]),
        )

    def _tokens(self, begin_row: int, end_row: int) -> dict[str, Any]:
        return {
            "tokens_BT": self._grid(self.tokens, begin_row, end_row),
            "document_BT": self._grid(self.document, begin_row, end_row),
            "position_BT": self._grid(self.position, begin_row, end_row),
            "sequence_B": torch.arange(begin_row, end_row),
        }

    def _grid(self, values: np.ndarray, begin_row: int, end_row: int) -> torch.Tensor:
        return torch.from_numpy(values[begin_row * self.width : end_row * self.width].reshape(-1, self.width))


def _ranges(length_S: np.ndarray) -> np.ndarray:
    """Returns 0 to length - 1 for each length, concatenated."""
    total = int(length_S.sum())
    return np.arange(total) - np.repeat(np.cumsum(length_S) - length_S, length_S)
