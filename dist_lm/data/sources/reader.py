"""What a reader is: a function that yields the documents of one source of a corpus.

A corpus file names the readers of this package (`reader: hub`), or any function by its import path. A reader of your
own:

    from dist_lm.data.sources.reader import Candidate, reader, text_hash

    @reader(form="text")
    def read_notes(source: SourceConfig, seed: int) -> Iterator[Candidate]:
        for path in sorted(Path(source.dataset).glob("*.txt")):
            text = path.read_text(encoding="utf-8")
            yield Document(text, source.language, path.name, source.licence, group=text_hash(text))

and its source in `conf/corpus/NAME.yaml`:

    - {reader: "my_package.my_module:read_notes", language: english, dataset: /data/notes}

The same source and seed must give the same documents in the same order. `Document.group` decides between train and
val: documents that share text get one group.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from dist_lm.config.corpus import SourceConfig
from dist_lm.document import Document, Form


@dataclass(frozen=True, slots=True)
class Rejected:
    """An item that was read but gives no document. The manifest counts it under its reason."""

    language: str
    source: str
    reason: str  # one word, such as invalid_utf8 or unreadable


Candidate = Document | Rejected
Reader = Callable[[SourceConfig, int], Iterator[Candidate]]
AnyReader = TypeVar("AnyReader", bound=Reader)


@dataclass(frozen=True, slots=True)
class Traits:
    """What the stages must know about a reader."""

    form: Form = "text"
    seeded: bool = False  # the documents depend on the seed: a corpus of another seed is refused
    revision: int = 0  # one more with every change to generated documents: a corpus of another revision is refused
    streamed: bool = False  # too large for memory: not compared with the other texts of this machine
    advice: str = "remove the source from the corpus file, or take the data sets of corpus=hub"  # if it gives nothing


def reader(
    form: Form = "text",
    *,
    seeded: bool = False,
    revision: int = 0,
    streamed: bool = False,
    advice: str = Traits.advice,
) -> Callable[[AnyReader], AnyReader]:
    """Declare the traits of a reader. A function without this decorator has the defaults."""

    def declare(function: AnyReader) -> AnyReader:
        function.traits = Traits(form, seeded, revision, streamed, advice)  # type: ignore[attr-defined]
        return function

    return declare


def traits_of(function: Reader) -> Traits:
    """The traits that a reader was declared with."""
    return getattr(function, "traits", Traits())


def text_hash(text: str) -> str:
    """Hexadecimal SHA-256 of a text, the same for every kind of line end.

    Raises UnicodeEncodeError for a text that is not valid Unicode (a lone surrogate).
    """
    return hashlib.sha256(text.replace("\r\n", "\n").replace("\r", "\n").encode()).hexdigest()
