"""Lays out and reads rankings in shards: the arrays of a member beside those of every document (`data.shard_writer`).

KEY.branch.npy       (tokens,) uint8         0 in the prompt, 1 to K in the completions
KEY.completions.npy  (documents,) uint8      K
KEY.ranks.npy        (sum of K,) uint8       the smallest is the best; zeros for a ranking with judgements. Of one
                                             completion 0: it is wanted, 1: it is not
KEY.judged.npy       (documents,) uint16     judgements; 0: the ranking has ranks
KEY.judgements.npy   (judgements, 2) uint8   numbers of the better and the worse completion, from 0
KEY.margins.npy      (judgements,) float32   0: no margin was given
"""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from dist_lm.data.index import members
from dist_lm.data.manifest import BUILD_COMMAND, read_manifest
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import RankingArrays
from dist_lm.errors import ArtefactError

PARTS = ("branch.npy", "completions.npy", "ranks.npy", "judged.npy", "judgements.npy", "margins.npy")


@dataclass(frozen=True)
class MemberArrays:
    """The arrays of one member, or of several members end to end. The head of this file gives their shapes."""

    completions: np.ndarray
    ranks: np.ndarray
    judged: np.ndarray
    judgements: np.ndarray
    margins: np.ndarray

    def __post_init__(self) -> None:
        is_consistent = (
            len(self.completions) == len(self.judged)
            and len(self.ranks) == self.completions.sum(dtype=np.int64)
            and self.judgements.shape == (self.judged.sum(dtype=np.int64), 2)
            and len(self.margins) == len(self.judgements)
        )
        if not is_consistent:
            raise ValueError("the arrays of its rankings have different lengths")


def member_parts(rankings: Sequence[RankingArrays]) -> dict[str, np.ndarray]:
    """Returns the arrays of a member that holds these rankings, by the names of `PARTS`, with types as the module says.

    A ranking with judgements has zeros for ranks there.

    Args:
        rankings: at least one.
    """
    completions = [int(arrays.branch.max()) for arrays in rankings]
    # A ranking with judgements has zeros for ranks, so that each completion has one rank in the file.
    ranks = [
        arrays.ranks if len(arrays.ranks) else np.zeros(n, np.uint8)
        for arrays, n in zip(rankings, completions, strict=True)
    ]

    parts = (
        np.concatenate([arrays.branch for arrays in rankings]),
        np.array(completions, np.uint8),
        np.concatenate(ranks),
        np.array([len(arrays.judgements) for arrays in rankings], "<u2"),
        np.concatenate([arrays.judgements for arrays in rankings]),
        np.concatenate([arrays.margins for arrays in rankings]).astype("<f4", copy=False),
    )
    return dict(zip(PARTS, parts, strict=True))


class RankingCorpus:
    """The rankings of one split: tokens, ranks and judgements of every document, numbered as in `corpus`.

    Branches, ranks and judgements of the whole split are in memory, mainly one byte a token.
    """

    def __init__(self, corpus: TokenCorpus, branch: np.ndarray, arrays: MemberArrays) -> None:
        """Use `open` instead.

        Args:
            branch: (tokens of the split,) uint8.
            arrays: those of all members of the split.
        """
        self.corpus = corpus
        self.completions = arrays.completions.astype(np.int64)  # (documents,) K

        self._branch = branch
        self._arrays = arrays
        self._token_ends = np.cumsum(corpus.lengths)
        self._rank_ends = np.cumsum(self.completions)
        self._judgement_ends = np.cumsum(arrays.judged, dtype=np.int64)

    @classmethod
    def open(cls, directory: Path, split: str) -> "RankingCorpus":
        """Returns the rankings of a split, after every member was read and checked; their arrays stay in memory.

        A missing or old index is built and saved.

        Raises:
            ArtefactError: the corpus is missing or damaged, or the split holds no rankings.
            OSError: a tar cannot be read, or an index cannot be written.
        """
        corpus = TokenCorpus.open(directory, split)
        if corpus.is_remote:
            raise ArtefactError(
                f"corpus {directory} is attached, and rankings are read from local tars: copy its files into another "
                "folder of work/corpora"
            )
        # The arrays of every member are read now, so checksums cannot wait for the first use of a member.
        corpus.check()

        branches, arrays_by_member = [], []
        for shard in read_manifest(directory).splits[split].shards:
            try:
                for branch, arrays in _members(directory / shard.name):
                    branches.append(branch)
                    arrays_by_member.append(arrays)
            except (ValueError, tarfile.TarError) as error:
                raise ArtefactError(
                    f"{directory / shard.name}: {error}: build the corpus again with `{BUILD_COMMAND}`"
                ) from error

        all_branches = np.concatenate(branches)
        if len(all_branches) != corpus.n_tokens:
            raise ArtefactError(f"corpus {directory}: {len(all_branches)} of {corpus.n_tokens} tokens have a branch")
        all_arrays = MemberArrays(
            **{
                name: np.concatenate([getattr(arrays, name) for arrays in arrays_by_member])
                for name in MemberArrays.__dataclass_fields__
            }
        )
        return cls(corpus, all_branches, all_arrays)

    def tokens(self, document: int) -> np.ndarray:
        """Returns all tokens of a ranking: (n,) uint16 or uint32.

        Raises:
            ArtefactError: the tar is damaged.
        """
        return self.corpus.tokens(document, 0, int(self.corpus.lengths[document]))

    def completion_slice(self, document: int) -> slice:
        """Returns where the completions of a ranking are in an array over all completions of the split."""
        end = int(self._rank_ends[document])
        return slice(end - int(self.completions[document]), end)

    def source(self, document: int) -> str:
        """Returns the name of the source of a ranking: what the manifest calls its language."""
        return self.corpus.languages[self.corpus.language_codes[document]]

    def arrays(self, document: int) -> RankingArrays:
        """Returns branch, ranks and judgements of a ranking, as views of the arrays in memory.

        `ranks` is empty if the ranking has judgements.
        """
        token_end = int(self._token_ends[document])
        token_begin = token_end - int(self.corpus.lengths[document])
        judgement_end = int(self._judgement_ends[document])
        n_judgements = int(self._arrays.judged[document])
        judgements = slice(judgement_end - n_judgements, judgement_end)

        # The zeros in the file of a ranking with judgements are no ranks.
        ranks = slice(0) if n_judgements else self.completion_slice(document)
        return RankingArrays(
            branch=self._branch[token_begin:token_end],
            ranks=self._arrays.ranks[ranks],
            judgements=self._arrays.judgements[judgements],
            margins=self._arrays.margins[judgements],
        )


def _members(tar: Path) -> list[tuple[np.ndarray, MemberArrays]]:
    """Returns (branch, other arrays) of every member of a tar, in order.

    Raises:
        ArtefactError: a member holds no rankings.
        ValueError, tarfile.TarError: the tar is damaged.
        OSError: it cannot be read.
    """
    arrays_by_member = []
    with tar.open("rb") as file:
        for key, parts in members(tar):
            if missing := [part for part in PARTS if part not in parts]:
                raise ArtefactError(f"{tar}: member {key} has no {missing[0]}: it holds no rankings")
            branch, *arrays = (_array(file, parts[part]) for part in PARTS)
            arrays_by_member.append((branch, MemberArrays(*arrays)))
    return arrays_by_member


def _array(file: io.BufferedReader, info: tarfile.TarInfo) -> np.ndarray:
    file.seek(info.offset_data)
    return npy.read_array(io.BytesIO(file.read(info.size)), allow_pickle=False)
