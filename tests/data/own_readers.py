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


def read_objects(source: SourceConfig, seed: int) -> Iterator[Document]:
    """A document whose text is a JSON object."""
    yield Document({"a": 1}, source.language, "objects:0", "", text_hash("a"))  # type: ignore[arg-type]


@reader(form="conversation")
def read_texts_as_conversations(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Documents of another form than declared."""
    yield Document("a text", source.language, "texts", "", text_hash("a text"))


def read_named_groups(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """A document whose group is a name."""
    yield Document("a text", source.language, "named:0", "", "my_repository")


STORIES: dict[str, list[str]] = {}  # name of a data set -> texts


@reader(keys=("language", "licence", "dataset"))
def read_stories(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """The texts of `STORIES[source.dataset]`; a tab parts a group from its text."""
    for number, story in enumerate(STORIES[source.dataset]):
        group, _, text = story.rpartition("\t")
        yield Document(text, "english", f"{source.dataset}:{number}", "MIT", group or text_hash(text))


@reader(form="conversation", keys=("language", "licence", "dataset"))
def read_talks(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Conversations about the tools that the texts name."""
    for number, story in enumerate(STORIES[source.dataset]):
        yield Document(story, "talk", f"{source.dataset}:{number}", "", text_hash(story.split()[0]), "conversation")
