"""Reads a corpus, and finds held-out texts in train, as the tests look at them."""

from collections.abc import Iterable, Iterator, Sequence

from dist_lm.config.corpus import CorpusConfig
from dist_lm.data.containment import Comparison, HeldOutIndex
from dist_lm.data.ingest import TextSplits, split_documents
from dist_lm.data.screening import IngestReport
from dist_lm.document import Document


def read_corpus(
    config: CorpusConfig, corpus_name: str, seed: int, report: IngestReport, texts: TextSplits | None = None
) -> Iterator[tuple[str, Document]]:
    """`(split, document)` of every document of a corpus: what `divided` yields, without the sources."""
    for split, document, _ in split_documents(config, corpus_name, seed, report, texts):
        yield split, document


def seen_texts(held_out: Sequence[str], trained: Iterable[str]) -> set[int]:
    """The indices of the texts in `held_out` that the texts of `trained` contain."""
    index = HeldOutIndex(held_out)
    comparison = Comparison(index)
    for text in trained:
        comparison.add(b"", text)
    comparison.finish()
    return index.contained()
