"""What a member of a tar has of rankings beside what it has of every document (`data.shard_writer`): plain arrays.

KEY.branch.npy       (tokens,) uint8         0 in the prompt, 1 to K in the completions
KEY.completions.npy  (documents,) uint8      K
KEY.ranks.npy        (sum of K,) uint8       the smallest is the best; zeros of a ranking that has judgements
KEY.judged.npy       (documents,) uint16     judgements; 0: it has ranks
KEY.judgements.npy   (judgements, 2) uint8   places of the better and the worse one, from 0
KEY.margins.npy      (judgements,) float32   0 where nobody said
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_lm.document import Verdict

PARTS = tuple(f"{name}.npy" for name in ("branch", "completions", "ranks", "judged", "judgements", "margins"))


@dataclass(frozen=True)
class VerdictArrays:
    """The arrays of one member, or of several behind each other."""

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
            raise ValueError("its arrays of rankings do not fit each other")


def member_parts(verdicts: Sequence[Verdict]) -> dict[str, np.ndarray]:
    """The parts of a member that holds these rankings, by name."""
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
    """The documents of several members, numbered on."""
    names = VerdictArrays.__dataclass_fields__
    return VerdictArrays(**{name: np.concatenate([getattr(one, name) for one in members]) for name in names})
