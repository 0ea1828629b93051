"""A bounded share of the texts of all corpora, read from all sources in turn: what the tokenizer learns from."""

import heapq
from collections.abc import Iterator
from dataclasses import replace

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.ingest import Sides, cleaned, largest_share
from dist_lm.data.screening import IngestReport, Screened, SourceReader, screened
from dist_lm.data.sources.reader import Candidate, corpus_sources, text_corpora
from dist_lm.document import Document


class _LimitReachedError(Exception):
    """The readers have given as much as may be read."""


class _BoundedReader(SourceReader):
    """Ends the reading of all sources before a document as large as the largest one so far could exceed the limit."""

    def __init__(self, seed: int, limit_bytes: int, max_document_bytes: int) -> None:
        super().__init__(seed)
        self._left = limit_bytes
        self._largest, self._most = 0, max_document_bytes

    def read(self, source: SourceConfig) -> Iterator[Candidate]:
        for candidate in super().read(source):
            if isinstance(candidate, Document):
                size = len(candidate.text.encode(errors="surrogatepass"))
                self._left -= size
                self._largest = max(self._largest, min(size, self._most))
            yield candidate
            if self._left < self._largest:
                raise _LimitReachedError


def read_in_turn(config: CorpusConfig, seed: int, limit_bytes: int) -> Iterator[Document]:
    """Documents of all corpora of texts that are in train whatever `val_tokens` is, from at most `limit_bytes` of text.

    The next document comes from the source of which the fewest bytes were kept, so all sources give the same amount
    until they end. Nothing is compared: a document that contains one of a source with `held_out` is among them.

    Raises:
        ConfigError, ArtefactError: as `screening.screened`.
    """
    reader = _BoundedReader(seed, limit_bytes, config.max_document_bytes)
    sides = Sides({name: largest_share(config, name) for name in text_corpora(config)})
    sources: list[tuple[str, Iterator[Screened]]] = []
    for name in sides.held_out:
        texts: set[bytes] = set()
        for source in corpus_sources(config, name):
            if source.held_out:
                continue
            alone = replace(config, corpora={name: [source]})
            sources.append((name, screened(alone, name, reader, texts, IngestReport())))
    waiting = [(0, place) for place in range(len(sources))]  # a heap of (bytes kept, place)
    while waiting:
        n_bytes, place = waiting[0]
        name, items = sources[place]
        try:
            item = next(items, None)
        except _LimitReachedError:
            return
        if item is None:
            heapq.heappop(waiting)
            continue
        heapq.heapreplace(waiting, (n_bytes + item.n_bytes, place))
        if sides.split_of(name, item) == "train":
            yield cleaned(config, item, "train", IngestReport())
