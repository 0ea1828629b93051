"""Reads a corpus as the tests look at it."""

from collections.abc import Iterator

from dist_lm.config.corpus import CorpusConfig
from dist_lm.data.ingest import Texts, split_documents
from dist_lm.data.screening import IngestReport
from dist_lm.document import Document


def read_corpus(
    config: CorpusConfig, corpus_name: str, seed: int, report: IngestReport, texts: Texts | None = None
) -> Iterator[tuple[str, Document]]:
    """`(split, document)` of every document of a corpus: what `divided` yields, without the sources."""
    for split, document, _ in split_documents(config, corpus_name, seed, report, texts):
        yield split, document
