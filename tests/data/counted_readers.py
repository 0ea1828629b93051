"""Readers that count what they give."""

from collections import Counter
from collections.abc import Iterator
from itertools import count

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Candidate, Rejected, reader, text_hash
from dist_lm.document import Document

GIVEN: Counter[str] = Counter()  # bytes that the readers gave, by dataset


@reader(keys=("language", "dataset"))
def read_endless(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Documents of 250 to 50 bytes without end, some of them equal, some rejected."""
    for number in count():
        words = text_hash(f"{source.dataset} {number - number % 7 // 6}") * 4  # every seventh is a duplicate
        text = f"{source.dataset} {words[: 250 - 40 * (number % 6)]}"
        GIVEN[source.dataset] += len(text.encode())
        yield Document(text, source.language, f"{source.dataset}:{number}", "", text_hash(text))
        if number % 5 == 0:
            yield Rejected(source.language, f"{source.dataset}:{number}", "unreadable")


@reader(keys=("language", "dataset"))
def read_repeating(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """One document without end."""
    for _ in count():
        GIVEN[source.dataset] += 100
        yield Document("a" * 100, source.language, "r", "", "f" * 64)


@reader(keys=("language", "dataset"))
def read_short(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Sixty documents."""
    for number in range(60):
        text = f"{source.dataset} {number} words of a short source"
        GIVEN[source.dataset] += len(text)
        yield Document(text, source.language, f"{source.dataset}:{number}", "", text_hash(text))


@reader(keys=("language", "dataset"))
def read_copies(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Documents that contain those of `read_short`."""
    for one in read_short(source, seed):
        assert isinstance(one, Document)
        text = f"a copy: {one.text}"
        yield Document(text, one.language, f"copy of {one.source}", "", text_hash(text))


@reader()
def read_nothing(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """No document."""
    yield from ()


def source(dataset: str, function: str = "read_endless", **options) -> SourceConfig:
    """A source of one of these readers."""
    return SourceConfig(f"tests.data.counted_readers:{function}", "english", dataset=dataset, **options)
