"""Lays rankings out as batches for log-probabilities: the prompt once, then every completion as a branch.

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
from dist_lm.data.batch import Batch, logit_indices
from dist_lm.data.order import DocumentSlice
from dist_lm.data.packing import best_fit_decreasing, longest_first
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.rankings.stream import PlacedRanking
from dist_lm.tokenizer.tokenizer import FirstToken


@dataclass(frozen=True, slots=True)
class CompletionBatch(Batch):
    """Trees of tokens, with the segment that each target belongs to."""

    segment_BT: torch.Tensor = field(kw_only=True)  # int64; 1 to C: completions, C + 1 to C + P: prompts; 0: no target
    tokens_S: torch.Tensor = field(kw_only=True)  # float32; targets of each segment; 0 for prompts that are not learned
    prompt_C: torch.Tensor = field(kw_only=True)  # int64; number of the prompt of each completion, from 0
    # float32; log-probability of each completion under the reference, in nats; (0,) without a reference
    reference_C: torch.Tensor = field(kw_only=True)
    # for KTO: the same prompts with completions of other rankings, and their log-probabilities under the reference
    mismatched: "CompletionBatch | None" = field(default=None, kw_only=True)
    mismatched_reference_P: torch.Tensor | None = field(default=None, kw_only=True)  # sum over a prompt's completions
    # statistics of the global batch that a loss needs, set before the passes of a step
    reference_point: torch.Tensor | None = field(default=None, kw_only=True)
    tokens_per_pair: torch.Tensor | None = field(default=None, kw_only=True)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "CompletionBatch":
        changed = cast(CompletionBatch, Batch._each(self, change))
        if self.mismatched is None:
            return changed
        return replace(changed, mismatched=self.mismatched._each(change))


@dataclass(frozen=True)
class SplitReference:
    """Log-probabilities under the reference of all rankings of a split, in nats; NaN where a ranking is too long."""

    logprob: np.ndarray  # (completions of all rankings,) float32, in the order of the corpus
    mismatched: np.ndarray  # (rankings,) float32: sum over the mismatched completions; (0,) if a loss has no use for it


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
        first_token: FirstToken | None = None,
    ) -> tuple[CompletionBatch, list[PlacedRanking]]:
        """Returns a batch, in host memory, and the rankings in it; their `places` are numbers of completions in it.

        Raises:
            ArtefactError: a tar is damaged.
        """
        documents_by_row = [[document for document, _, _ in row] for row in rows]
        documents = [document for row in documents_by_row for document in row]
        trees = [
            [_opened((rankings.tokens(document), rankings.arrays(document).branch), first_token) for document in row]
            for row in documents_by_row
        ]
        batch = batch_of_trees(trees, numbers, seq_len, pad_id, self.learns_prompts)

        # Completions are numbered through the batch, in the order of its rankings.
        ends = np.cumsum([rankings.completions[document] for document in documents], dtype=np.int64)
        placed = [
            PlacedRanking(document, np.arange(end - rankings.completions[document], end))
            for document, end in zip(documents, ends.tolist(), strict=True)
        ]

        if self.reference:
            # The empty array is for a batch of padding alone, which has no ranking to concatenate.
            logprobs = [np.zeros(0, np.float32)]
            logprobs += [self.reference.logprob[rankings.completion_slice(document)] for document in documents]
            batch = replace(batch, reference_C=torch.from_numpy(np.concatenate(logprobs)))

        if self.mismatches:
            mismatched_trees = [_opened(mismatched(rankings, document, seq_len), first_token) for document in documents]
            batch = replace(batch, mismatched=packed_trees(mismatched_trees, seq_len, pad_id))
            if self.reference:
                sums_P = torch.from_numpy(self.reference.mismatched[documents])
                batch = replace(batch, mismatched_reference_P=sums_P)
        return batch, placed


def _opened(tree: tuple[np.ndarray, np.ndarray], first_token: FirstToken | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens, branch) with the first token that the model reads in place of end-of-text."""
    if not first_token:
        return tree
    tokens, branch = tree
    return first_token.put(tokens.copy()), branch


def mismatched(rankings: RankingCorpus, number: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Joins the prompt of ranking `number` with the completions of the next ranking of the corpus.

    The next one of the last is the first, so a corpus of one ranking gives its own completions. Completions that do not
    fit into `seq_len` are left out, with all behind them. If the first one does not fit, it is cut.

    Args:
        seq_len: in tokens; the prompt has at most so many.

    Returns:
        (tokens, branch): (n,) each, as `RankingCorpus.tokens` and `RankingArrays.branch`; n is at most `seq_len + 1`.

    Raises:
        ArtefactError: a tar is damaged.
    """
    next_number = (number + 1) % rankings.corpus.n_documents
    branch, next_branch = rankings.arrays(number).branch, rankings.arrays(next_number).branch
    prompt_ids = rankings.tokens(number)[branch == 0]
    completion_ids = rankings.tokens(next_number)[next_branch > 0]
    completion_branch = next_branch[next_branch > 0]

    room = seq_len - len(prompt_ids) + 1  # a tree has one token fewer than prompt and completions
    ends = np.append(np.flatnonzero(np.diff(completion_branch)) + 1, len(completion_branch))
    fitting_ends = ends[ends <= room]
    end = int(fitting_ends[-1]) if len(fitting_ends) else room

    tokens = np.concatenate([prompt_ids, completion_ids[:end]])
    prompt_branch = np.zeros(len(prompt_ids), completion_branch.dtype)
    return tokens, np.concatenate([prompt_branch, completion_branch[:end]])


def packed_trees(trees: Sequence[tuple[np.ndarray, np.ndarray]], seq_len: int, pad_id: int) -> CompletionBatch:
    """Packs trees into a batch with as few rows as best fit decreasing needs. Prompts are no targets.

    `prompt_C` numbers prompts in the order of `trees`, whatever row they are in. Completions come row by row. Without
    trees the batch is one row of padding.

    Args:
        trees: (tokens, branch) of each ranking, (n,) each, at most `seq_len + 1` tokens.
        seq_len: T, in tokens.
        pad_id: the token that fills rows up.
    """
    lengths = np.array([len(tokens) - 1 for tokens, _ in trees], np.int64)
    order = longest_first(np.arange(len(trees)), lengths)
    rows: list[list[int]] = [[]]
    for number, row in zip(order.tolist(), best_fit_decreasing(lengths[order], seq_len).tolist(), strict=True):
        rows += [[] for _ in range(row + 1 - len(rows))]
        rows[row].append(number)

    trees_by_row = [[trees[number] for number in row] for row in rows]
    batch = batch_of_trees(trees_by_row, range(len(rows)), seq_len, pad_id, learns_prompts=False)
    numbers_in_batch = torch.tensor([number for row in rows for number in row], dtype=torch.int64)
    return replace(batch, prompt_C=numbers_in_batch[batch.prompt_C])


def batch_of_trees(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    numbers: Sequence[int],
    seq_len: int,
    pad_id: int,
    learns_prompts: bool,
) -> CompletionBatch:
    """Returns one batch of `len(rows)` sequences of trees, in host memory; the rest of a row is a document of `pad_id`.

    `reference_C` stays empty. Completions and prompts are numbered row by row.

    Args:
        rows: (tokens, branch) of each ranking. In its tree a ranking has one token fewer; the trees of a row have at
            most `seq_len` tokens in all.
        numbers: the global sequence numbers.
        learns_prompts: whether the tokens of prompts are targets too.
    """
    shape = (len(rows), seq_len)
    tokens = np.full(shape, pad_id, np.int64)
    targets, document, branch, position, segment = (np.zeros(shape, np.int64) for _ in range(5))

    # Segments of prompts are numbered behind those of all completions, which must be counted before.
    n_completions = sum(int(branches.max()) for row in rows for _, branches in row)
    completion_lengths: list[int] = []
    prompt_lengths: list[int] = []
    prompt_of_completion: list[int] = []
    n_tokens = 0

    for b, row in enumerate(rows):
        begin = 0
        for d, (ranking_ids, ranking_branch) in enumerate(row):
            branches = ranking_branch.astype(np.int64)
            n_prompt = int((branches == 0).sum())
            end = begin + len(ranking_ids) - 1
            span = slice(begin, end)

            # Every branch begins with a copy of the prompt's last token, and lacks its own last one.
            branch_inputs = ranking_ids[n_prompt - 1 : -1].copy()
            begins_completion = np.diff(branches[n_prompt - 1 :]) != 0
            branch_inputs[begins_completion] = ranking_ids[n_prompt - 1]

            tokens[b, span] = np.concatenate([ranking_ids[: n_prompt - 1], branch_inputs])
            targets[b, span] = ranking_ids[1:]
            document[b, span] = d
            branch[b, span] = np.concatenate([branches[: n_prompt - 1], branches[n_prompt:]])
            position[b, span] = np.concatenate([np.arange(n_prompt - 1), branch_positions(branches)[n_prompt:] - 1])

            # Segment 0 is no target: completions count from 1, as `branches` does inside a ranking.
            completions_begin = begin + n_prompt - 1
            segment[b, completions_begin:end] = len(completion_lengths) + branches[n_prompt:]
            prompt_of_completion += [len(prompt_lengths)] * int(branches.max())
            completion_lengths += np.bincount(branches)[1:].tolist()
            prompt_lengths.append(n_prompt - 1 if learns_prompts else 0)
            if learns_prompts:
                segment[b, begin:completions_begin] = n_completions + len(prompt_lengths)
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
        logit_index_N=logit_indices(segment),
        branch_BT=torch.from_numpy(branch),
        n_tokens=n_tokens,
        segment_BT=torch.from_numpy(segment),
        tokens_S=torch.tensor([*completion_lengths, *prompt_lengths], dtype=torch.float32),
        prompt_C=torch.tensor(prompt_of_completion, dtype=torch.int64),
        reference_C=torch.zeros(0),
    )
