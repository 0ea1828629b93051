"""Chooses which of several equal or nearly equal texts of a corpus stays: the one with most stars, of these the
earliest, of these the first in the order of reading. Stars and times are those of rows (`sources.stars_and_time`).

The order of reading alone decides where no source of a corpus names a column for them.
"""

import itertools
from array import array

import numpy as np

from dist_lm.config.corpus import CorpusConfig
from dist_lm.data.screening import RowErrors, SourceReader, screen
from dist_lm.data.sources.reader import Rejected, corpus_sources
from dist_lm.document import Document


def is_by_rule(config: CorpusConfig, corpus_name: str) -> bool:
    """Returns whether a source of a corpus has columns for stars or times.

    Raises:
        ConfigError: as `corpus_sources`.
    """
    return any(source.has_precedence for source in corpus_sources(config, corpus_name))


def precedence_of(document: Document) -> tuple[float, float]:
    """Returns two numbers that order documents: the one with the smallest pair stays."""
    return -document.stars, document.time


def order_of_precedence(precedences: np.ndarray) -> np.ndarray:
    """Returns the numbers of texts, the one that stays before all others first: (T,) int64.

    Args:
        precedences: (T, n): the first of n numbers that differs decides; texts with equal ones keep their order.
    """
    return np.lexsort(precedences.T[::-1])


def exchanged_copies(config: CorpusConfig, corpus_name: str, reader: SourceReader, keys: set[bytes]) -> frozenset[int]:
    """Returns which documents of a corpus change places with an equal text: the first one, which leaves, and the one
    that stays in its place. Reads the corpus once, with 34 bytes in memory for each document.

    Args:
        keys: as for `screening.screened`: a text that an earlier corpus has does not stay, whatever its precedence.

    Returns:
        Numbers of documents, counted over all that pass the checks, copies included.

    Raises:
        ConfigError, ArtefactError: as `SourceReader.read`.
    """
    held_out: set[bytes] = set()
    all_keys, is_new, is_held_out, precedences = bytearray(), bytearray(), bytearray(), array("d")
    for source in corpus_sources(config, corpus_name):
        earlier_keys = held_out if source.held_out else keys
        n_new = 0
        for candidate in RowErrors(source, config.max_bad_fraction).counted(reader.read(source)):
            if isinstance(candidate, Rejected):
                continue
            record, reason = screen(candidate, source, config, earlier_keys)
            if reason not in ("", "duplicate"):
                continue

            earlier_keys.add(record.key)
            all_keys += record.key
            is_new.append(not reason)
            is_held_out.append(source.held_out)
            precedences.extend(precedence_of(record.document))
            n_new += not reason
            if not reason and n_new == source.limit:
                break

    high, low = np.frombuffer(all_keys, np.uint64).reshape(-1, 2).T
    text_classes = np.stack([np.frombuffer(is_held_out, np.uint8), high, low])
    stars, times = np.frombuffer(precedences).reshape(-1, 2).T
    return _exchanged(text_classes, np.frombuffer(is_new, bool), np.lexsort([times, stars, *text_classes]))


def _exchanged(text_classes: np.ndarray, is_new: np.ndarray, order: np.ndarray) -> frozenset[int]:
    """Returns the numbers of the texts that change places: of each class of copies the best one and the first one.

    A class is left out if its first text is its best one, or is not new. Without texts the result is empty.

    Args:
        text_classes: (n, T): texts with equal columns are copies.
        is_new: (T,) bool: no text before it, in any corpus, is equal.
        order: numbers of the texts, copies next to each other, the best first.
    """
    ordered = text_classes[:, order]
    is_first = np.append(True, (ordered[:, 1:] != ordered[:, :-1]).any(axis=0))[: len(order)]
    begins = np.flatnonzero(is_first)
    if not len(begins):
        return frozenset()
    best, first = order[begins], np.minimum.reduceat(order, begins)
    # The first one is no new text if an earlier corpus has it.
    is_exchanged = (best != first) & is_new[first]
    return frozenset(itertools.chain(best[is_exchanged].tolist(), first[is_exchanged].tolist()))
