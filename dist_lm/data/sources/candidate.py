"""What a reader yields: a document, or the reason why there is none. Nothing is lost uncounted."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dist_lm.config.corpus import SourceConfig
from dist_lm.document import Document


@dataclass(frozen=True, slots=True)
class Rejected:
    """Something that was read and is no document."""

    language: str
    source: str
    reason: str  # empty | invalid_utf8 | unreadable


Candidate = Document | Rejected


def text_hash(text: str) -> str:
    """Hexadecimal SHA-256 of a text, the same for every kind of line end.

    Raises UnicodeEncodeError for a text that is not valid Unicode (a lone surrogate).
    """
    return hashlib.sha256(text.replace("\r\n", "\n").replace("\r", "\n").encode()).hexdigest()


def read_text(path: Path, source: SourceConfig) -> str | Rejected:
    """The text of a file, byte for byte."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return Rejected(source.language, str(path), "invalid_utf8")
    except OSError:
        return Rejected(source.language, str(path), "unreadable")


def read_file_document(path: Path, source: SourceConfig) -> Candidate:
    """A whole file as one document, in a group of its own."""
    text = read_text(path, source)
    if isinstance(text, Rejected):
        return text
    return Document(text, source.language, str(path), source.licence, text_hash(text))
