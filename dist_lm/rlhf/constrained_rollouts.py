"""The tokens that constraints allowed in rollouts, computed again by the rank that trains on them.

Which tokens may come next is a function of the grammar and the tokens so far, so rollouts carry no sets: each rank
follows the grammars through its own rollouts. Rollouts carry the version of the library and the digest of the grammar
that the engine followed, because another version may allow other tokens.

With top-k or top-p, rollouts carry their sets (`model.token_sets`), which the constraint has made smaller already.

Dimensions: B rollouts, M the tokens of all completions, K some of these, G bytes that identify a grammar.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_lm.errors import ArtefactError
from dist_lm.generation.grammar import Grammars, allows, library_version
from dist_lm.model.token_sets import TokenSets, packed
from dist_lm.rlhf.packed_rollouts import SetsOf
from dist_lm.rlhf.rollouts import ConstraintOrder, Rollout, Rollouts, library_of, packed_record

WAY_OUT = "or choose another run_id, which draws new rollouts"


@dataclass(frozen=True)
class RolloutConstraints:
    """The constraints of all prompts, on a rank that trains."""

    grammars: Grammars
    constraint_at: ConstraintOrder
    ends: tuple[int, ...]  # tokens that end a completion, end-of-text included
    vocab_size: int

    def sets_of(self, rollouts: Rollouts) -> SetsOf:
        """Returns a function that gives the sets from which tokens of these rollouts were drawn.

        The function raises ArtefactError if a rollout followed another grammar, or has a token that its constraint
        does not allow.

        Raises:
            ArtefactError: the rollouts have no constraint, or followed another version of the library.
        """
        if not len(rollouts.grammar_BG):
            raise ArtefactError(f"rlhf.constraint: the rollouts were drawn without one: leave it out, {WAY_OUT}")

        installed = library_version()
        for record_G in np.unique(rollouts.grammar_BG, axis=0):
            if library_of(record_G) != installed:
                raise ArtefactError(
                    f"rlhf.constraint: the rollouts followed llguidance {library_of(record_G)} and this rank has "
                    f"{installed}, which may allow other tokens: install llguidance=={library_of(record_G)}, {WAY_OUT}"
                )
        if len(rollouts.set_size_M):
            return rollouts.sets_of
        return AllowedSets(rollouts, self)


class AllowedSets:
    """The sets that constraints allowed. A `SetsOf`.

    A rollout is followed once, at its first use. Equal sets are held once, and so is their copy in a batch: a text
    without constraints inside has few different ones.
    """

    def __init__(self, rollouts: Rollouts, constraints: RolloutConstraints) -> None:
        self._rollouts, self._constraints = rollouts, constraints
        self._completions = list(rollouts)
        self._end_B = np.cumsum(rollouts.new_tokens_B)
        self._set_M = np.full(len(rollouts.logprobs_M), -1, np.int64)  # number of each token's set; -1: not computed
        self._sets: list[bytes] = []
        self._number_of_bits: dict[bytes, int] = {}

    def __call__(self, place_K: np.ndarray) -> TokenSets:
        """Returns the sets of K completion tokens, in host memory.

        Raises:
            ArtefactError: a rollout followed another grammar, or has a token that its constraint does not allow.
        """
        unknown_K = place_K[self._set_M[place_K] < 0]
        for number in np.unique(np.searchsorted(self._end_B, unknown_K, side="right")).tolist():
            end = int(self._end_B[number])
            begin = end - int(self._rollouts.new_tokens_B[number])
            self._set_M[begin:end] = self._follow(number, self._completions[number])

        # Tokens with equal sets read the same bytes.
        used_numbers, index_K = np.unique(self._set_M[place_K], return_inverse=True)
        used_sets = [self._sets[number] for number in used_numbers.tolist()]
        size_U = np.array([len(token_set) for token_set in used_sets], np.int64)
        begin_U = np.cumsum(size_U) - size_U
        bytes_X = np.array(bytearray().join(used_sets), np.uint8)
        return TokenSets(
            torch.from_numpy(bytes_X), torch.from_numpy(begin_U[index_K]), torch.from_numpy(size_U[index_K])
        )

    def _follow(self, number: int, rollout: Rollout) -> Sequence[int]:
        """Returns the number of the set of each token of a completion.

        Raises:
            ArtefactError: as `__call__`.
        """
        constraint = self._constraints.constraint_at(rollout.position)
        matcher = self._constraints.grammars.matcher(constraint, self._constraints.ends)
        if packed_record(matcher.record) != self._rollouts.grammar_BG[number].tobytes():
            raise ArtefactError(
                f"rlhf.constraint: a rollout of prompt {rollout.position} followed another grammar than this rank "
                f"makes for it: give the constraint, prompts and tokenizer that the run began with, {WAY_OUT}"
            )

        numbers = []
        tokens = rollout.completion.tolist()
        for place, token in enumerate(tokens):
            allowed_U = matcher.allowed()
            if not allows(allowed_U, token):
                raise ArtefactError(
                    f"rlhf.constraint: token {place} of a rollout of prompt {rollout.position} is {token}, which its "
                    "constraint does not allow there: the rollouts were not drawn under it"
                )
            numbers.append(self._number(allowed_U))
            # The last token may be one that ends the answer, which no grammar takes.
            if place + 1 < len(tokens):
                matcher.take(token)
        return numbers

    def _number(self, allowed_U: np.ndarray) -> int:
        """Returns the number of a set, which is stored at its first use."""
        bits = allowed_U.tobytes()
        if bits not in self._number_of_bits:
            vocab_size = self._constraints.vocab_size
            allowed_ids = np.flatnonzero(np.unpackbits(allowed_U, bitorder="little", count=vocab_size))
            self._number_of_bits[bits] = len(self._sets)
            self._sets.append(packed(allowed_ids, vocab_size))
        return self._number_of_bits[bits]
