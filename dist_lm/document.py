"""A text or a conversation with where it comes from, before and after tokenizing: what the rooms hand to each other."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or one conversation.

    `group` decides the split: documents cut from one file share it, and conversations about one set of tools, so none
    leaks from train to val.
    """

    text: str  # of a conversation its JSON (`chat.documents`)
    language: str  # of a conversation its kind
    source: str  # path or data set id and row
    licence: str
    group: str  # hexadecimal hash
    is_conversation: bool = False


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """A document as the shards hold it."""

    tokens: np.ndarray  # (n,) uint16; the first is end-of-text, which opens every document
    n_bytes: int  # UTF-8 bytes of the text that the other tokens stand for
    language: str
    source: str
    licence: str
    loss_mask: np.ndarray | None = None  # (n,) uint8, conversations only: 1 where the token is learned
