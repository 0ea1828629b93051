"""Which held-out texts a model has already seen in the texts it trains on."""

from collections.abc import Iterable, Sequence
from itertools import chain, islice

WINDOW = 8  # words
MAX_SHARE = 0.5  # of the windows of a text
Window = tuple[str, ...]


def seen_texts(held_out: Sequence[str], trained: Iterable[str]) -> set[int]:
    """Indices of the texts in `held_out` of which more than half can be read in `trained`, however indented.

    A text counts by its windows of eight words. One that stands whole inside a trained text is always found:
    all of its windows match but at most the first and the last, whose outer words may be cut; one too short
    for that to tell (below 16 words) is looked for letter by letter.
    """
    windows = [list(_windows(text)) for text in held_out]
    wanted = set(chain.from_iterable(windows))
    short = {i: text.strip() for i, text in enumerate(held_out) if len(text.split()) < 2 * WINDOW}
    found: set[Window] = set()
    inside: set[int] = set()
    for text in trained:
        found |= wanted.intersection(_windows(text))
        inside |= {i for i, part in short.items() if part in text}
    return inside | {i for i, own in enumerate(windows) if sum(w in found for w in own) > MAX_SHARE * len(own)}


def _windows(text: str) -> Iterable[Window]:
    words = text.split()
    return zip(*(islice(words, start, None) for start in range(WINDOW)), strict=False)
