"""Readers as a user would write them, named by import path: `tests.data.own_readers:read_numbers`."""

from collections.abc import Iterator

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Candidate, Rejected, reader, text_hash
from dist_lm.document import Document

TEXTS = (
    "#!/bin/sh\r\necho one\r\n",
    "#!/bin/sh\necho one\n",  # the same text with other line ends
    "",
    " \n\t\n",
    "#!/bin/sh\n" + "echo long\n" * 200,
    "#!/bin/sh\nprintf '\0'\n",
    *(f"#!/bin/sh\necho number {i} of 20\n" for i in range(20)),
)
REJECTED = ("invalid_utf8", "unreadable")


@reader(keys=("language", "licence", "subset"))
def read_numbers(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Forty texts; `source.subset` is a word in each."""
    for number in range(40):
        text = f"{source.subset or 'text'} number {number} of 40\n"
        yield Document(text, source.language, f"numbers:{number}", source.licence, text_hash(text))


@reader(seeded=True, revision=3)
def read_seeded(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Forty texts of the seed."""
    for number in range(40):
        text = f"seed {seed} number {number} of 40\n"
        yield Document(text, source.language, f"seeded:{seed}:{number}", source.licence, text_hash(text))


def read_mixed(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Texts of which not all are kept, and what is no document."""
    for number, text in enumerate(TEXTS):
        yield Document(text, source.language, f"mixed:{number}", source.licence, text_hash(text))
    for reason in REJECTED:
        yield Rejected(source.language, f"mixed:{reason}", reason)


def read_strings(source: SourceConfig, seed: int) -> Iterator[str]:
    """Not documents."""
    yield "a text"


@reader(form="conversation")
def read_texts_as_conversations(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Documents of another form than declared."""
    yield Document("a text", source.language, "texts", "", text_hash("a text"))
