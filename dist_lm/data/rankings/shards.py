"""Rankings in shards: the arrays of a member beside those of every document (`data.shard_writer`), and their reader.

KEY.branch.npy       (tokens,) uint8         0 in the prompt, 1 to K in the completions
KEY.completions.npy  (documents,) uint8      K
KEY.ranks.npy        (sum of K,) uint8       the smallest is the best; zeros for a ranking with judgements
KEY.judged.npy       (documents,) uint16     judgements; 0: the ranking has ranks
KEY.judgements.npy   (judgements, 2) uint8   places of the better and the worse completion, from 0
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
from dist_lm.document import Verdict
from dist_lm.errors import ArtefactError

PARTS = ("branch.npy", "completions.npy", "ranks.npy", "judged.npy", "judgements.npy", "margins.npy")


@dataclass(frozen=True)
class VerdictArrays:
    """The arrays of one member, or of several members end to end."""

    completions: np.ndarray
    ranks: np.ndarray
    judged: np.ndarray
    judgements: np.ndarray
    margins: np.ndarray

    def __post_init__(self) -> None:
        whole = (
            len(self.completions) == len(self.judged)
            and len(self.ranks) == self.completions.sum(dtype=np.int64)
            and self.judgements.shape == (self.judged.sum(dtype=np.int64), 2)
            and len(self.margins) == len(self.judgements)
        )
        if not whole:
            raise ValueError("the arrays of its rankings have different lengths")


def member_parts(verdicts: Sequence[Verdict]) -> dict[str, np.ndarray]:
    """The arrays of a member that holds these rankings, by part."""
    completions = [int(one.branch.max()) for one in verdicts]
    ranks = [
        one.ranks if len(one.ranks) else np.zeros(n, np.uint8) for one, n in zip(verdicts, completions, strict=True)
    ]
    arrays = (
        np.concatenate([one.branch for one in verdicts]),
        np.array(completions, np.uint8),
        np.concatenate(ranks),
        np.array([len(one.judgements) for one in verdicts], "<u2"),
        np.concatenate([one.judgements for one in verdicts]),
        np.concatenate([one.margins for one in verdicts]).astype("<f4", copy=False),
    )
    return dict(zip(PARTS, arrays, strict=True))


def joined(members: Sequence[VerdictArrays]) -> VerdictArrays:
    """The arrays of several members end to end."""
    names = VerdictArrays.__dataclass_fields__
    return VerdictArrays(**{name: np.concatenate([getattr(one, name) for one in members]) for name in names})


class RankingCorpus:
    """The rankings of one split: tokens and a verdict on every document, numbered as in `corpus`."""

    def __init__(self, corpus: TokenCorpus, branch: np.ndarray, verdicts: VerdictArrays) -> None:
        """Use `open`. `branch`: the branches of all tokens of the split."""
        self.corpus = corpus
        self.completions = verdicts.completions.astype(np.int64)  # (documents,) K
        self._branch = branch
        self._verdicts = verdicts
        self._token_ends = np.cumsum(corpus.lengths)
        self._rank_ends = np.cumsum(self.completions)
        self._judgement_ends = np.cumsum(verdicts.judged, dtype=np.int64)

    @classmethod
    def open(cls, directory: Path, split: str) -> "RankingCorpus":
        """The rankings of a corpus.

        Raises:
            ArtefactError: the corpus is missing or damaged, or holds no rankings.
        """
        corpus = TokenCorpus.open(directory, split)
        corpus.check()  # the verdicts of every member are read now
        branches, verdicts = [], []
        for shard in read_manifest(directory).splits[split].shards:
            try:
                for branch, verdict in _members(directory / shard.name):
                    branches.append(branch)
                    verdicts.append(verdict)
            except (ValueError, tarfile.TarError) as error:
                raise ArtefactError(
                    f"{directory / shard.name}: {error}: build the corpus again with `{BUILD_COMMAND}`"
                ) from error
        branch = np.concatenate(branches)
        if len(branch) != corpus.n_tokens:
            raise ArtefactError(f"corpus {directory}: {len(branch)} of {corpus.n_tokens} tokens have a branch")
        return cls(corpus, branch, joined(verdicts))

    def tokens(self, document: int) -> np.ndarray:
        """All tokens of a ranking, (n,) uint16."""
        return self.corpus.tokens(document, 0, int(self.corpus.lengths[document]))

    def places(self, document: int) -> slice:
        """Where the completions of a ranking are in an array over all completions of the split."""
        end = int(self._rank_ends[document])
        return slice(end - int(self.completions[document]), end)

    def source(self, document: int) -> str:
        """Where a ranking comes from: what the manifest calls its language."""
        return self.corpus.languages[self.corpus.language_codes[document]]

    def verdict(self, document: int) -> Verdict:
        """How the completions of a ranking were judged; views."""
        judgement_end, places = int(self._judgement_ends[document]), self.places(document)
        judged, end = int(self._verdicts.judged[document]), int(self._token_ends[document])
        return Verdict(
            branch=self._branch[end - int(self.corpus.lengths[document]) : end],
            ranks=self._verdicts.ranks[slice(0) if judged else places],
            judgements=self._verdicts.judgements[judgement_end - judged : judgement_end],
            margins=self._verdicts.margins[judgement_end - judged : judgement_end],
        )


def _members(tar: Path) -> list[tuple[np.ndarray, VerdictArrays]]:
    """(branch, verdicts) of every member."""
    found = []
    with tar.open("rb") as file:
        for key, parts in members(tar):
            if missing := [part for part in PARTS if part not in parts]:
                raise ArtefactError(f"{tar}: member {key} has no {missing[0]}: it holds no rankings")
            branch, *arrays = (_array(file, parts[part]) for part in PARTS)
            found.append((branch, VerdictArrays(*arrays)))
    return found


def _array(file: io.BufferedReader, info: tarfile.TarInfo) -> np.ndarray:
    file.seek(info.offset_data)
    return npy.read_array(io.BytesIO(file.read(info.size)), allow_pickle=False)
