"""A text, conversation or ranking with its origin, before and after tokenizing: the value that packages exchange."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Form = Literal["text", "conversation", "ranking"]
NO_STARS, NO_TIME = -math.inf, math.inf  # of a document whose row tells none


@dataclass(frozen=True, slots=True)
class Document:
    """One text, one conversation, or one ranking.

    `group` decides the split: documents cut from one file share it, conversations about one set of tools, and rankings
    of one prompt. All documents of a group go to the same split, so none leaks from train to val.
    """

    text: str  # the text; the JSON of a conversation or a ranking (`chat.documents`)
    language: str  # the kind of a conversation; the source of a ranking
    source: str  # path or data set id and row
    licence: str
    group: str  # hexadecimal hash; empty: the hash of the text alone
    form: Form = "text"
    repository: str = ""  # files of one repository stay next to each other in every epoch; empty: no repository
    own_licence: bool = False  # its row gave the licence: a corrected licence of the source does not replace it
    # JSON of the columns of its row that are no part of the text, for reward functions; empty: nothing is kept of a row
    row: str = ""
    # Of equal and of nearly equal texts the one with most stars stays, of these the earliest, of these the first. Only
    # read where a source names `stars_column` or `time_column`.
    stars: float = NO_STARS
    time: float = NO_TIME  # seconds since 1970


@dataclass(frozen=True, slots=True)
class RankingArrays:
    """The K completions of a tokenized ranking: which tokens they are, and how they were judged."""

    branch: np.ndarray  # (n,) uint8, for each token: 0 in the prompt, 1 to K in the completions
    # (K,) uint8; the smallest is the best, equal ones are ties; of one completion 0: it is wanted, 1: it is not.
    # shape (0,): see `judgements`
    ranks: np.ndarray
    judgements: np.ndarray  # (J, 2) uint8: indices, from 0, of the better and the worse completion
    margins: np.ndarray  # (J,) float32: by how much it is better, 0 where the data do not say


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """A document as it is stored in the shards."""

    tokens: np.ndarray  # (n,) uint16, or uint32 for a vocabulary past 65,536; the first is end-of-text
    n_bytes: int  # UTF-8 bytes of the text that the other tokens stand for
    language: str
    source: str
    licence: str
    loss_mask: np.ndarray | None = None  # (n,) uint8: 1 where the token is learned or in a completion; None: a text
    ranking: RankingArrays | None = None  # only for rankings
    repository: str = ""  # as in `Document`
    own_licence: bool = False  # as in `Document`
    row: str = ""  # JSON of `{"document": the text of `Document`, "columns": its row}`; empty: nothing is kept
