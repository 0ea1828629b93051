"""Rankings as batches for log-probabilities: the prompt once, then every completion as a branch.

The prompt's last token has as many next tokens as the prompt has completions, so each branch begins with a copy of it.
The last token of a completion predicts nothing and is left out.

    ranking   <|endoftext|> a b c   x y <|im_end|>   z <|im_end|>
    tree      <|endoftext|> a b     c x y            c z
    branch    0             0 0     1 1 1            2 2
    target                          x y <|im_end|>   z <|im_end|>

A branch sees the trunk and itself, at the positions that it would have alone, so its log-probabilities are those of a
pass over prompt and completion alone.

Dimensions: B sequences, T tokens, C completions of P prompts, S = C + P segments (a completion or a prompt).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch

from dist_lm.chat.ranking import branch_positions
from dist_lm.data.batch import Batch, counted_places
from dist_lm.data.order import DocumentSlice
from dist_lm.data.packing import best_fit_decreasing, longest_first
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.rankings.stream import PlacedRanking
from dist_lm.tokenizer.tokenizer import Opening


@dataclass(frozen=True, slots=True)
class CompletionBatch(Batch):
    """Trees of tokens, with the segment that each target belongs to."""

    segment_BT: torch.Tensor = field(kw_only=True)  # int64; 1 to C: completions, C + 1 to C + P: prompts; 0: no target
    tokens_S: torch.Tensor = field(kw_only=True)  # float32; targets of each segment; 0 for prompts that are not learned
    prompt_C: torch.Tensor = field(kw_only=True)  # int64; number of the prompt of each completion, from 0
    reference_C: torch.Tensor = field(kw_only=True)  # float32; log-probability under the reference; (0,): not asked
    # for KTO: the same prompts with completions of other rankings, and their log-probabilities under the reference
    mismatched: "CompletionBatch | None" = field(default=None, kw_only=True)
    mismatched_reference_P: torch.Tensor | None = field(default=None, kw_only=True)  # sum over a prompt's completions
    # what a loss needs of the global batch, put in before the passes of a step
    reference_point: torch.Tensor | None = field(default=None, kw_only=True)
    tokens_per_pair: torch.Tensor | None = field(default=None, kw_only=True)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "CompletionBatch":
        made = cast(CompletionBatch, Batch._each(self, change))
        return replace(made, mismatched=self.mismatched._each(change)) if self.mismatched else made


@dataclass(frozen=True)
class SplitReference:
    """Log-probabilities under the reference of all rankings of a split, in nats; NaN where a ranking is too long."""

    logprob: np.ndarray  # (completions of all rankings,) float32, in the order of the corpus
    mismatched: np.ndarray  # (rankings,) float32: sum over the mismatched completions; (0,): not asked


@dataclass(frozen=True)
class Trees:
    """Makes batches of the rankings of one split; called as `assemble_rankings` is."""

    reference: SplitReference | None = None
    learns_prompts: bool = False  # whether prompts have targets too
    mismatches: bool = False  # whether a batch has the prompts with other completions too

    def __call__(
        self,
        rankings: RankingCorpus,
        rows: Sequence[Sequence[DocumentSlice]],
        numbers: Sequence[int],
        seq_len: int,
        pad_id: int,
        opening: Opening | None = None,
    ) -> tuple[CompletionBatch, list[PlacedRanking]]:
        """A batch, and the rankings in it; their places are numbers of completions in the batch."""
        documents = [[number for number, _, _ in row] for row in rows]
        chosen = [number for row in documents for number in row]
        made = [[_opened((rankings.tokens(n), rankings.verdict(n).branch), opening) for n in row] for row in documents]
        batch = batch_of_trees(made, numbers, seq_len, pad_id, self.learns_prompts)
        ends = np.cumsum([rankings.completions[number] for number in chosen], dtype=np.int64)
        placed = [
            PlacedRanking(number, np.arange(end - rankings.completions[number], end))
            for number, end in zip(chosen, ends.tolist(), strict=True)
        ]
        if self.reference:
            own = [self.reference.logprob[rankings.places(number)] for number in chosen]
            batch = replace(batch, reference_C=torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *own])))
        if self.mismatches:
            others = [_opened(mismatched(rankings, number, seq_len), opening) for number in chosen]
            batch = replace(batch, mismatched=packed_trees(others, seq_len, pad_id))
            if self.reference:
                batch = replace(batch, mismatched_reference_P=torch.from_numpy(self.reference.mismatched[chosen]))
        return batch, placed


def _opened(tree: tuple[np.ndarray, np.ndarray], opening: Opening | None) -> tuple[np.ndarray, np.ndarray]:
    return (opening.put(tree[0].copy()), tree[1]) if opening else tree


def mismatched(rankings: RankingCorpus, number: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and branches of a prompt with the completions of the next ranking of the corpus.

    Completions that do not fit into `seq_len` are left out; of the first, the beginning is kept.
    """
    other = (number + 1) % rankings.corpus.n_documents
    own, others = rankings.verdict(number).branch, rankings.verdict(other).branch
    prompt, answers = rankings.tokens(number)[own == 0], rankings.tokens(other)[others > 0]
    branch = others[others > 0]
    room = seq_len - len(prompt) + 1  # a tree has one token fewer than prompt and completions
    ends = np.append(np.flatnonzero(np.diff(branch)) + 1, len(branch))
    whole = ends[ends <= room]
    kept = int(whole[-1]) if len(whole) else room
    tokens = np.concatenate([prompt, answers[:kept]])
    return tokens, np.concatenate([np.zeros(len(prompt), branch.dtype), branch[:kept]])


def packed_trees(trees: Sequence[tuple[np.ndarray, np.ndarray]], seq_len: int, pad_id: int) -> CompletionBatch:
    """A batch with as many rows as the trees need; prompts and completions are numbered in the order of `trees`."""
    lengths = np.array([len(tokens) - 1 for tokens, _ in trees], np.int64)
    order = longest_first(np.arange(len(trees)), lengths)
    rows: list[list[int]] = [[] for _ in range(1)]
    for number, row in zip(order.tolist(), best_fit_decreasing(lengths[order], seq_len).tolist(), strict=True):
        rows += [[] for _ in range(row + 1 - len(rows))]
        rows[row].append(number)
    made = [[trees[number] for number in row] for row in rows]
    batch = batch_of_trees(made, range(len(rows)), seq_len, pad_id, learns_prompts=False)
    in_batch = torch.tensor([number for row in rows for number in row], dtype=torch.int64)
    return replace(batch, prompt_C=in_batch[batch.prompt_C])


def batch_of_trees(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    numbers: Sequence[int],
    seq_len: int,
    pad_id: int,
    learns_prompts: bool,
) -> CompletionBatch:
    """One batch of `len(rows)` sequences.

    Args:
        rows: (tokens, branch) of each ranking; the trees of a row have at most `seq_len` tokens in all.
        numbers: the global sequence numbers.
    """
    shape = (len(rows), seq_len)
    tokens, targets = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    document, branch, position, segment = (np.zeros(shape, np.int64) for _ in range(4))
    n_completions = sum(int(branches.max()) for row in rows for _, branches in row)
    counts, prompt_of, prompt_counts, n_tokens = [], [], [], 0
    for b, row in enumerate(rows):
        begin = 0
        for d, (own, own_branch) in enumerate(row):
            branches = own_branch.astype(np.int64)
            n_prompt, end = int((branches == 0).sum()), begin + len(own) - 1
            place = slice(begin, end)
            first = np.diff(branches[n_prompt - 1 :]) != 0  # whether a completion begins here
            before = own[n_prompt - 1 : -1].copy()
            before[first] = own[n_prompt - 1]
            tokens[b, place] = np.concatenate([own[: n_prompt - 1], before])
            targets[b, place] = own[1:]
            document[b, place] = d
            branch[b, place] = np.concatenate([branches[: n_prompt - 1], branches[n_prompt:]])
            position[b, place] = np.concatenate([np.arange(n_prompt - 1), branch_positions(branches)[n_prompt:] - 1])
            answers = slice(begin + n_prompt - 1, end)
            segment[b, answers] = len(counts) + branches[n_prompt:]
            prompt_of += [len(prompt_counts)] * int(branches.max())
            counts += np.bincount(branches)[1:].tolist()
            prompt_counts.append(n_prompt - 1 if learns_prompts else 0)
            if learns_prompts:
                segment[b, begin : answers.start] = n_completions + len(prompt_counts)
            begin = end
        n_tokens += begin
        document[b, begin:] = len(row)
        position[b, begin:] = np.arange(seq_len - begin)
    return CompletionBatch(
        tokens_BT=torch.from_numpy(tokens),
        targets_BT=torch.from_numpy(targets),
        loss_mask_BT=torch.from_numpy((segment > 0).astype(np.float32)),
        document_BT=torch.from_numpy(document),
        position_BT=torch.from_numpy(position),
        sequence_B=torch.tensor(list(numbers), dtype=torch.int64),
        counted_N=counted_places(segment),
        branch_BT=torch.from_numpy(branch),
        n_tokens=n_tokens,
        segment_BT=torch.from_numpy(segment),
        tokens_S=torch.tensor([*counts, *prompt_counts], dtype=torch.float32),
        prompt_C=torch.tensor(prompt_of, dtype=torch.int64),
        reference_C=torch.zeros(0),
    )
