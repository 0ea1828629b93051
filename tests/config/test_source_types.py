"""A source is what OmegaConf makes of it, also where it is made without OmegaConf."""

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.config import corpus
from dist_lm.config.corpus import SourceConfig, source_of
from dist_lm.errors import ConfigError

KEYS = [field.name for field in fields(SourceConfig)]
TEXTS = ["", "jsonl", "files", "learn", "???", "${oc.env:HOME}", "x${y", "\\${a}", "1", "true"]
VALUES = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 1.5, b"x", ("a",), {"a": 1}]),
    st.sampled_from(TEXTS),
    st.lists(st.sampled_from([*TEXTS, None, 1]), max_size=2),
)


def outcome(written: Any) -> SourceConfig | str:
    try:
        return source_of(written, "corpus.corpora.mine[0]")
    except ConfigError as error:
        return str(error)


@pytest.mark.heavy
@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3), st.booleans(), st.booleans())
def test_a_source_made_without_omegaconf_is_the_same_or_refused_in_the_same_words(
    written: dict[str, Any], names_a_reader: bool, is_typed: bool
):
    """Finds a value that OmegaConf would convert, resolve or refuse, and that is taken as it is."""
    values: Any = {**written, "reader": "jsonl"} if names_a_reader else written
    if is_typed:  # as code may make one: nothing has checked the types
        typed = SourceConfig(reader="jsonl")
        vars(typed).update(values)
        values = typed

    found = outcome(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_has_its_types", lambda values: False)
        expected = outcome(values)
    assert found == expected
    assert repr(found) == repr(expected)  # 1 == True
