"""Reads a bounded share of the texts of all corpora, from all sources in turn: the training text of the tokenizer."""

import heapq
from collections.abc import Iterator
from dataclasses import replace

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.ingest import SplitRule, cleaned, largest_share
from dist_lm.data.screening import IngestReport, Screened, SourceReader, screened
from dist_lm.data.sources.reader import Candidate, corpus_sources, tokenizer_corpora
from dist_lm.document import Document


class _LimitReachedError(Exception):
    """The readers have given as much as may be read."""


class _BoundedReader(SourceReader):
    """Ends the reading of all sources before a document as large as the largest one so far could exceed the limit."""

    def __init__(self, seed: int, limit_bytes: int, max_document_bytes: int) -> None:
        super().__init__(seed)
        self._bytes_left = limit_bytes
        self._largest = 0  # bytes of the largest document so far
        self._max_document_bytes = max_document_bytes  # larger ones are dropped later

    def read(self, source: SourceConfig) -> Iterator[Candidate]:
        """Yields what the reader yields, and counts the bytes of its texts over all sources.

        Raises:
            _LimitReachedError: the next document would probably exceed the limit.
            ConfigError: as `SourceReader.read`. What the reader raises passes.
        """
        for candidate in super().read(source):
            if isinstance(candidate, Document):
                size = len(candidate.text.encode(errors="surrogatepass"))
                self._bytes_left -= size
                self._largest = max(self._largest, min(size, self._max_document_bytes))
            yield candidate
            # Nobody knows the size of the next document; the largest one so far is the best guess.
            if self._bytes_left < self._largest:
                raise _LimitReachedError

    def require_same(self, corpus_name: str, number: int, source: SourceConfig, documents: bytes) -> None:
        """Refuses nothing: each source is read once, so there is no earlier reading to compare with."""


def read_in_turn(config: CorpusConfig, seed: int, limit_bytes: int) -> Iterator[Document]:
    """Yields documents of all `tokenizer_corpora` that are in train whatever `val_tokens` is, with placeholders for
    secrets and addresses. Those of conversations are their JSON.

    Sources with `held_out` are not read. The next document comes from the source of which the fewest bytes were read,
    so all sources give the same amount until they end. Nothing is compared: a document that contains one of a source
    with `held_out` is among them. Duplicates inside a corpus are dropped.

    Args:
        seed: of generated sources.
        limit_bytes: of text in UTF-8 that is read, of all sources together, dropped documents included. Reading ends,
            without an error, before a document as large as the largest one so far could exceed it.

    Raises:
        ConfigError, ArtefactError: as `screening.screened`; sources that the limit cuts short are not judged.
    """
    reader = _BoundedReader(seed, limit_bytes, config.max_document_bytes)
    # With the largest share, a document that is train here is train whatever `val_tokens` is.
    rule = SplitRule({name: largest_share(config, name) for name in tokenizer_corpora(config)})
    sources: list[tuple[str, Iterator[Screened]]] = []
    for name in rule.held_out:
        keys: set[bytes] = set()  # all sources of a corpus share it, so that duplicates across sources are dropped
        for source in corpus_sources(config, name):
            if source.held_out:
                continue
            one_source = replace(config, corpora={name: [source]})
            sources.append((name, screened(one_source, name, reader, keys, IngestReport())))

    queue = [(0, index) for index in range(len(sources))]  # a heap of (bytes read, index in `sources`)
    while queue:
        n_bytes, index = queue[0]
        name, records = sources[index]
        try:
            record = next(records, None)
        except _LimitReachedError:
            return
        if record is None:
            heapq.heappop(queue)
            continue

        # Val documents count too, because they were read; the tokenizer must not learn from them.
        heapq.heapreplace(queue, (n_bytes + record.n_bytes, index))
        if rule.split_of(name, record) == "train":
            yield cleaned(config, record, "train", IngestReport())
