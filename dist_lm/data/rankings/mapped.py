"""A split of a corpus of rankings: its tokens mapped as of any corpus, and the verdict on every document."""

import io
import tarfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from dist_lm.data.index import BUILD_COMMAND, members
from dist_lm.data.manifest import read_manifest
from dist_lm.data.mapped import MappedCorpus
from dist_lm.data.rankings.arrays import PARTS, VerdictArrays, joined
from dist_lm.document import Verdict
from dist_lm.errors import ArtefactError


class MappedRankings:
    """The rankings of one split, numbered as `corpus` numbers its documents."""

    def __init__(self, corpus: MappedCorpus, branch: np.ndarray, verdicts: VerdictArrays) -> None:
        """Use `open`. `branch`: of all tokens of the split, one document behind the other."""
        self.corpus = corpus
        self.completions = verdicts.completions.astype(np.int64)  # (documents,) K
        self._branch = branch
        self._verdicts = verdicts
        self._token_ends = np.cumsum(corpus.lengths)
        self._rank_ends = np.cumsum(self.completions)
        self._judgement_ends = np.cumsum(verdicts.judged, dtype=np.int64)

    @classmethod
    def open(cls, directory: Path, split: str) -> "MappedRankings":
        """The rankings of a corpus.

        Raises:
            ArtefactError: the corpus is missing or damaged, or holds something else.
        """
        corpus = MappedCorpus.open(directory, split)
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

    def source(self, document: int) -> str:
        """Where a ranking comes from: what the manifest calls its language."""
        return self.corpus.languages[self.corpus.language_codes[document]]

    def verdict(self, document: int) -> Verdict:
        """How the completions of a ranking were judged; views."""
        rank_end, judgement_end = int(self._rank_ends[document]), int(self._judgement_ends[document])
        judged, end = int(self._verdicts.judged[document]), int(self._token_ends[document])
        ranked = 0 if judged else int(self.completions[document])
        first = rank_end - int(self.completions[document])
        return Verdict(
            branch=self._branch[end - int(self.corpus.lengths[document]) : end],
            ranks=self._verdicts.ranks[first : first + ranked],
            judgements=self._verdicts.judgements[judgement_end - judged : judgement_end],
            margins=self._verdicts.margins[judgement_end - judged : judgement_end],
        )


def _members(tar: Path) -> list[tuple[np.ndarray, VerdictArrays]]:
    """(branch, verdicts) of every member."""
    found = []
    with tar.open("rb") as file:
        for key, parts in members(tar):
            if missing := [part for part in PARTS if part not in parts]:
                raise ArtefactError(f"{tar}: member {key} has no {missing[0]}: that is no corpus of rankings")
            branch, *arrays = (_array(file, parts[part]) for part in PARTS)
            found.append((branch, VerdictArrays(*arrays)))
    return found


def _array(file: io.BufferedReader, info: tarfile.TarInfo) -> np.ndarray:
    file.seek(info.offset_data)
    return npy.read_array(io.BytesIO(file.read(info.size)), allow_pickle=False)
