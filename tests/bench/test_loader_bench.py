"""The benchmark of the loader: its made-up corpus opens as a real one, and its figures count what they say."""

from pathlib import Path

import pytest

from dist_lm.bench.loader import (
    EPOCH,
    NODE,
    OPEN,
    READ,
    TAR_DOCUMENTS,
    UNITS_STREAM,
    facts_of_opening,
    reading_trial,
    write_without_content,
)
from dist_lm.data.split_index import UNIT
from dist_lm.data.token_corpus import TokenCorpus

MANY = 200_000_000


@pytest.mark.heavy
def test_a_corpus_without_content_opens_as_it_was_made(tmp_path: Path) -> None:
    """Finds a benchmark that times the making of an index again, or fewer documents."""
    n_documents = 2 * TAR_DOCUMENTS + 100
    write_without_content(tmp_path, n_documents)
    corpus = TokenCorpus.open(tmp_path, "train")
    assert corpus.n_documents == len(corpus.lengths) == n_documents
    assert corpus.n_tokens == int(corpus.lengths.sum())
    assert len(corpus.units.documents) >= n_documents // UNIT


@pytest.mark.bars
@pytest.mark.timeout(1200)
def test_200_m_documents_take_at_most_30_bytes_each_on_a_node(tmp_path: Path) -> None:
    """Finds arrays of documents that every rank has for itself."""
    write_without_content(tmp_path, MANY)
    facts = facts_of_opening(tmp_path, MANY)
    print(facts)
    assert set(facts) > {OPEN, EPOCH}
    assert facts[NODE] <= 30


@pytest.mark.heavy
def test_ranks_read_an_epoch_once_in_the_order_of_units(tmp_path: Path) -> None:
    """Finds a loader that asks for more than 1.3 x the corpus."""
    trial = reading_trial(UNITS_STREAM, tmp_path, 2_000_000)
    assert 1 < trial.facts()[READ] <= 1.3
