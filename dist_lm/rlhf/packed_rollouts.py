"""Rollouts as micro-batches: packed into rows, several to a row, and dealt to the data-parallel ranks. Pure functions.

The packing depends on which rollouts go together, on their lengths and on the number of ranks, not on how they were
drawn. Every rank gets the same number of micro-batches with the same shapes; a rank without rollouts gets padding.

Log-probabilities and values are read at the token before each completion token, so rows for them omit the last token of
each rollout. Scores are read at the last token, so rows for them hold whole rollouts.

Dimensions: B rollouts in all, T tokens of the longest completion, S rollouts of a batch, N their completion tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from dist_lm.data.batch import Batch
from dist_lm.data.keys import Shuffle, key, permutation
from dist_lm.data.packing import best_fit_decreasing, longest_first
from dist_lm.model.token_sets import TokenSets
from dist_lm.rlhf.rollouts import Rollouts


@dataclass(frozen=True, slots=True)
class RolloutBatch(Batch):
    """Rollouts in rows, each without its last token. `counted_N` are the places whose targets are completion tokens."""

    drawn_N: torch.Tensor = field(kw_only=True)  # int64; place of each completion token in a flattened (B, T)
    sets: TokenSets | None = field(kw_only=True, default=None)  # among which each of N was drawn; None: all tokens

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RolloutBatch":
        changed = cast(RolloutBatch, Batch._each(self, change))
        return replace(changed, sets=self.sets.each(change)) if self.sets else changed


@dataclass(frozen=True, slots=True)
class WholeBatch(Batch):
    """Whole rollouts in rows, without targets."""

    end_S: torch.Tensor = field(kw_only=True)  # int64; places of the last tokens in the flattened batch
    rollout_S: torch.Tensor = field(kw_only=True)  # int64; number of the rollout of each last token


@dataclass(frozen=True)
class Dealing:
    """How rollouts are divided into micro-batches and among ranks."""

    micro_batch_tokens: int  # of a micro-batch, at most (but at least one row)
    dp_rank: int = 0
    dp_size: int = 1
    multiple: int = 1  # the width of a row is a multiple of this


@dataclass(frozen=True)
class Minibatch:
    """The rollouts of one update."""

    batches: list[RolloutBatch]  # this rank's, on the models' device
    rollout_S: np.ndarray  # int64; the rollouts of all ranks


class Passes:
    """The passes over an iteration's rollouts: pass number -> its minibatches in order.

    The first pass is kept, because the forward passes before the first update use its batches too.
    """

    def __init__(
        self, rollouts: Rollouts, dealing: Dealing, device: torch.device, *, seed: int, iteration: int, parts: int
    ) -> None:
        """
        Args:
            parts: minibatches of a pass.
        """
        self._rollouts, self._dealing, self._device = rollouts, dealing, device
        self._order, self._parts = (seed, iteration), parts
        self._first: list[Minibatch] = []

    def __call__(self, number: int) -> list[Minibatch]:
        if self._first and (number == 0 or self._parts == 1):
            return self._first  # one minibatch of all rollouts is the same in every pass
        made = [
            Minibatch(
                [batch.to(self._device) for batch in rollout_batches(self._rollouts, part, self._dealing)],
                part,
            )
            for part in minibatches(*self._order, number, len(self._rollouts), self._parts)
        ]
        if not self._first:
            self._first = made
        return made


def completion_mask(rollouts: Rollouts) -> np.ndarray:
    """(B, T) bool: True on the tokens of each completion, left-aligned."""
    longest = int(rollouts.new_tokens_B.max())
    return np.arange(longest) < rollouts.new_tokens_B[:, None]


def minibatches(seed: int, iteration: int, epoch: int, n_rollouts: int, n_parts: int) -> list[np.ndarray]:
    """Numbers of the rollouts of each update of a pass: disjoint parts of all rollouts, reshuffled every pass."""
    order = permutation(n_rollouts, key(Shuffle.UPDATES, seed, iteration, epoch))
    return np.array_split(order, min(n_parts, n_rollouts))


def rollout_batches(rollouts: Rollouts, chosen_S: np.ndarray, dealing: Dealing) -> list[RolloutBatch]:
    """A rank's micro-batches of the rollouts `chosen_S`, each without its last token.

    Rows are as wide as the longest of all rollouts, so that few different shapes occur.
    """
    rows, turns = _dealt(rollouts, chosen_S, dealing, rollouts.prompt_tokens_B + rollouts.new_tokens_B - 1)
    return [rows.batch(begin, end) for begin, end in turns]


def whole_batches(rollouts: Rollouts, dealing: Dealing) -> list[WholeBatch]:
    """A rank's micro-batches of all rollouts, last tokens included."""
    every_S = np.arange(len(rollouts))
    rows, turns = _dealt(rollouts, every_S, dealing, rollouts.prompt_tokens_B + rollouts.new_tokens_B)
    return [rows.whole_batch(begin, end) for begin, end in turns]


def _dealt(
    rollouts: Rollouts, chosen_S: np.ndarray, dealing: Dealing, length_B: np.ndarray
) -> tuple["_Placed", list[tuple[int, int]]]:
    """This rank's rows of the first `length_B` tokens of each rollout, and (begin row, end row) of each micro-batch."""
    width = -(-int(length_B.max()) // dealing.multiple) * dealing.multiple
    chosen_S = longest_first(np.sort(chosen_S), length_B)
    row_S = best_fit_decreasing(length_B[chosen_S], width)
    rows = -(-(int(row_S.max()) + 1) // dealing.dp_size)  # per rank
    at_a_time = max(1, dealing.micro_batch_tokens // width)
    own = row_S % dealing.dp_size == dealing.dp_rank
    placed = _Placed(rollouts, chosen_S[own], row_S[own] // dealing.dp_size, width, rows, length_B)
    return placed, [(begin, min(begin + at_a_time, rows)) for begin in range(0, rows, at_a_time)]


class _Placed:
    """A rank's rows as one grid of tokens."""

    def __init__(
        self,
        rollouts: Rollouts,
        number_S: np.ndarray,
        row_S: np.ndarray,
        width: int,
        rows: int,
        length_B: np.ndarray,
    ) -> None:
        order = np.argsort(row_S, kind="stable")
        number_S, row_S = number_S[order], row_S[order]
        prompt_S, new_S = rollouts.prompt_tokens_B[number_S], rollouts.new_tokens_B[number_S]
        length_S = length_B[number_S]
        longest = int(rollouts.new_tokens_B.max())
        begins_row_S = np.diff(row_S, prepend=-1) > 0
        # start of a rollout in its row: the tokens before it, minus the tokens before its row
        before_S = np.cumsum(length_S) - length_S
        begin_S = row_S * width + before_S - before_S[begins_row_S][np.cumsum(begins_row_S) - 1]
        document_S = np.arange(len(row_S)) - np.flatnonzero(begins_row_S)[np.cumsum(begins_row_S) - 1]
        all_lengths_B = rollouts.prompt_tokens_B + rollouts.new_tokens_B
        source_S = (np.cumsum(all_lengths_B) - all_lengths_B)[number_S]

        self.width = width
        self.tokens = np.zeros(rows * width, np.int64)
        self.targets = np.zeros(rows * width, np.int64)
        self.mask = np.zeros(rows * width, np.float32)
        self.document = np.full(rows * width, len(number_S), np.int64)  # padding is a separate document
        self.position = np.zeros(rows * width, np.int64)
        within = _ranges(length_S)
        place = np.repeat(begin_S, length_S) + within
        self.tokens[place] = rollouts.tokens_N[np.repeat(source_S, length_S) + within]
        self.document[place] = np.repeat(document_S, length_S)
        self.position[place] = within
        new_within = _ranges(new_S)
        # a completion token is predicted at the token before it
        self.counted = np.repeat(begin_S + prompt_S - 1, new_S) + new_within
        self.targets[self.counted] = rollouts.tokens_N[np.repeat(source_S + prompt_S, new_S) + new_within]
        self.mask[self.counted] = 1
        self.drawn = np.repeat(number_S * longest, new_S) + new_within
        all_new_B = rollouts.new_tokens_B
        self.place_in_M = np.repeat((np.cumsum(all_new_B) - all_new_B)[number_S], new_S) + new_within
        self.rollouts = rollouts
        self.end, self.number = begin_S + length_S - 1, number_S

    def batch(self, begin_row: int, end_row: int) -> RolloutBatch:
        """Rows `begin_row` to `end_row` - 1, with targets."""
        begin = begin_row * self.width
        counted = (self.counted >= begin) & (self.counted < end_row * self.width)
        return RolloutBatch(
            **self._tokens(begin_row, end_row),
            targets_BT=self._grid(self.targets, begin_row, end_row),
            loss_mask_BT=self._grid(self.mask, begin_row, end_row),
            counted_N=torch.from_numpy(self.counted[counted] - begin),
            drawn_N=torch.from_numpy(self.drawn[counted]),
            sets=self.rollouts.sets_of(self.place_in_M[counted]),
        )

    def whole_batch(self, begin_row: int, end_row: int) -> WholeBatch:
        """Rows `begin_row` to `end_row` - 1, with the places of last tokens."""
        begin = begin_row * self.width
        ends = (self.end >= begin) & (self.end < end_row * self.width)
        tokens = self._tokens(begin_row, end_row)
        return WholeBatch(
            **tokens,
            targets_BT=torch.zeros_like(tokens["tokens_BT"]),
            loss_mask_BT=torch.zeros(tokens["tokens_BT"].shape),
            end_S=torch.from_numpy(self.end[ends] - begin),
            rollout_S=torch.from_numpy(self.number[ends]),
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
    """0 to length - 1 for each length, concatenated."""
    total = int(length_S.sum())
    return np.arange(total) - np.repeat(np.cumsum(length_S) - length_S, length_S)
