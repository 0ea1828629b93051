"""A text, conversation or ranking with its origin, before and after tokenizing: the value that packages exchange."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Form = Literal["text", "conversation", "ranking"]


@dataclass(frozen=True, slots=True)
class Document:
    """One text, one conversation, or one ranking.

    `group` decides the split: documents cut from one file share it, conversations about one set of tools, and rankings
    of one prompt, so none leaks from train to val.
    """

    text: str  # of a conversation or a ranking its JSON (`chat.documents`)
    language: str  # of a conversation its kind; of a ranking its source
    source: str  # path or data set id and row
    licence: str
    group: str  # hexadecimal hash; empty: of the text alone
    form: Form = "text"
    repository: str = ""  # its files stay next to each other in every epoch; empty: none
    own_licence: bool = False  # its row gave the licence: a corrected one of the source does not replace it


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of the K completions of a tokenized ranking: where they lie, and how they were judged."""

    branch: np.ndarray  # (n,) uint8, a number a token: 0 in the prompt, 1 to K in the completions
    ranks: np.ndarray  # (K,) uint8; the smallest is the best, equal ones are ties. (0,): there are judgements
    judgements: np.ndarray  # (J, 2) uint8: places, from 0, of the better and the worse one
    margins: np.ndarray  # (J,) float32: by how much, 0 where nobody said


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """A document as the shards hold it."""

    tokens: np.ndarray  # (n,) uint16, or uint32 for a vocabulary past 65,536; the first is end-of-text
    n_bytes: int  # UTF-8 bytes of the text that the other tokens stand for
    language: str
    source: str
    licence: str
    loss_mask: np.ndarray | None = None  # (n,) uint8, not of texts: 1 where the token is learned, or of a completion
    verdict: Verdict | None = None  # rankings only
    repository: str = ""  # of the document
    own_licence: bool = False  # of the document
