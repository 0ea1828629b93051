"""Broken rows: counted for each source up to `corpus.max_bad_fraction`, and written to rejected.jsonl."""

import json
from collections.abc import Iterable, Iterator
from typing import TextIO

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.reader import Candidate, Rejected
from dist_lm.errors import ArtefactError

REJECTED = "rejected.jsonl"  # in the folder of a corpus: the place of every broken row, the reason and what is wrong
NAMED = 3  # broken rows that a message names
HOPELESS = 1000  # broken rows after which a source that is mostly broken ends


class RowErrors:
    """Counts the broken rows of one source."""

    def __init__(self, source: SourceConfig, max_bad_fraction: float, rejected: TextIO | None = None) -> None:
        """`rejected`: gets a line for each broken row."""
        self._source = source
        self._most = max_bad_fraction
        self._rejected = rejected
        self._first: list[Rejected] = []
        self._n_bad = self._n_rows = 0

    def counted(self, candidates: Iterable[Candidate]) -> Iterator[Candidate]:
        """The same candidates; those of a source whose first rows are mostly broken end early."""
        for candidate in candidates:
            self._n_rows += 1
            if isinstance(candidate, Rejected) and candidate.error:
                self._count(candidate)
                if self._n_bad >= HOPELESS and self._n_bad > self._n_rows / 2:
                    return
            yield candidate

    def check(self) -> None:
        """To be called when enough of the source was read.

        Raises:
            ArtefactError: too many of the rows were broken; the message names the first ones and the key.
        """
        if self._n_bad > self._most * self._n_rows:
            named = "; ".join(f"{one.source}: {one.error}" for one in self._first)
            raise ArtefactError(
                f"corpus source reader={self._source.reader}: {self._n_bad:,} of {self._n_rows:,} rows are broken, "
                f"more than corpus.max_bad_fraction={self._most:g}: mend them, or raise that key. The first: {named}"
            )

    def _count(self, one: Rejected) -> None:
        self._n_bad += 1
        if len(self._first) < NAMED:
            self._first.append(one)
        if self._rejected:
            line = {"place": one.source, "reason": one.reason, "error": one.error, "language": one.language}
            self._rejected.write(json.dumps(line) + "\n")
