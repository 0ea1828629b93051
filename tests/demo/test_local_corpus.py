"""The whole text of conf/corpus/local.yaml: no val text in train, every language in both splits, the same each time."""

from dataclasses import replace

import pytest

from dist_lm.config.corpus import SPLITS, CorpusConfig
from dist_lm.data.ingest import TextSplits
from dist_lm.data.screening import IngestReport
from dist_lm.data.sources.reader import text_corpora
from dist_lm.document import Document
from dist_lm.prepare.compose import compose_config
from tests.data.reading import read_corpus, seen_texts

SEED = 0
Corpora = dict[str, list[tuple[str, Document]]]


@pytest.fixture(scope="module")
def config() -> CorpusConfig:
    """The corpora of texts."""
    corpus = compose_config(["stage=tokenizer", "corpus=local"]).corpus
    return replace(corpus, corpora={name: corpus.corpora[name] for name in text_corpora(corpus)})


def read(config: CorpusConfig) -> Corpora:
    texts = TextSplits(config, SEED)
    return {name: list(read_corpus(config, name, SEED, IngestReport(), texts)) for name in config.corpora}


@pytest.fixture(scope="module")
def corpora(config) -> Corpora:
    return read(config)


def test_no_val_text_is_inside_a_train_text_of_any_corpus(corpora):
    everything = [(split, document.text) for documents in corpora.values() for split, document in documents]
    train, val = (sorted({text for split, text in everything if split == side}) for side in SPLITS)
    assert len(val) > 50
    assert not set(train) & set(val)
    assert seen_texts(val, train) == set()


def test_every_language_is_in_both_splits(corpora):
    found = {name: {(split, d.language) for split, d in documents} for name, documents in corpora.items()}
    languages = {"language": ["english"], "code": ["python", "bash", "sql", "english"]}
    assert found == {name: {(split, one) for split in SPLITS for one in own} for name, own in languages.items()}


@pytest.mark.heavy
def test_reading_again_gives_the_same_documents(config, corpora):
    assert read(config) == corpora
