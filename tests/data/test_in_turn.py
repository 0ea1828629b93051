"""What the tokenizer reads: a bounded amount, from all sources and corpora alike, and nothing that is held out."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.config.corpus import CorpusConfig, SourceConfig
from dist_lm.data.in_turn import read_in_turn
from dist_lm.data.ingest import IngestReport
from dist_lm.errors import ArtefactError
from tests.data.counted_readers import GIVEN, source
from tests.data.reading import read_corpus


def config_of(**corpora: list[SourceConfig]) -> CorpusConfig:
    return CorpusConfig("test", dict(corpora), val_fraction=0.2)


@settings(max_examples=25)
@given(limit=st.integers(10_000, 60_000), sources=st.integers(1, 4))
def test_readers_give_at_most_the_limit_and_all_of_them_the_same(limit: int, sources: int) -> None:
    GIVEN.clear()
    config = config_of(one=[source(f"s{n}") for n in range(sources)], two=[source("s9")])
    documents = list(read_in_turn(config, 0, limit))
    assert limit - 2 * 300 <= GIVEN.total() <= limit
    assert max(GIVEN.values()) - min(GIVEN.values()) < 0.2 * limit + 1000
    kept = Counter(document.source.partition(":")[0] for document in documents)
    assert set(kept) == set(GIVEN) == {*(f"s{n}" for n in range(sources)), "s9"}


def test_a_source_that_repeats_itself_does_not_run_past_the_limit() -> None:
    GIVEN.clear()
    assert len(list(read_in_turn(config_of(c=[source("r", "read_repeating")]), 0, 5_000))) == 1
    assert GIVEN["r"] <= 5_000


def test_a_short_source_leaves_its_share_to_the_others() -> None:
    GIVEN.clear()
    list(read_in_turn(config_of(c=[source("short", "read_short"), source("long")]), 0, 20_000))
    assert GIVEN["short"] < 3_000
    assert GIVEN["long"] > 15_000


def test_everything_is_read_if_it_fits_and_val_is_left_out() -> None:
    config = config_of(c=[source("a", "read_short"), source("b", "read_short", limit=30)])
    read = {document.text for document in read_in_turn(config, 0, 10**6)}
    assert read == {d.text for split, d in read_corpus(config, "c", 0, IngestReport()) if split == "train"}
    config.val_tokens = 20
    more = {d.text for split, d in read_corpus(config, "c", 0, IngestReport()) if split == "train"}
    assert {document.text for document in read_in_turn(config, 0, 10**6)} == read < more


def test_texts_that_a_user_holds_out_are_not_read() -> None:
    GIVEN.clear()
    config = config_of(c=[source("a", "read_short"), source("b", "read_short", held_out=True)])
    assert {document.source.partition(":")[0] for document in read_in_turn(config, 0, 10**6)} == {"a"}
    assert set(GIVEN) == {"a"}


def test_a_source_without_documents_is_an_error() -> None:
    with pytest.raises(ArtefactError, match="gave no document"):
        list(read_in_turn(config_of(c=[SourceConfig("tests.data.counted_readers:read_nothing", "english")]), 0, 1000))
