"""Our tokenizer as a Hugging Face folder: the same ids and text, and special tokens no text can say."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.config.corpus import TokenizerConfig
from dist_lm.errors import ArtefactError
from dist_lm.interop.hf_tokenizer import save_hf_tokenizer
from dist_lm.tokenizer.symbols import SPECIAL_TOKENS
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tokenizer.train import train_tokenizer
from tests.tokenizer.hard_texts import FRAGMENTS, hard_text
from tests.tokenizer.stdlib_text import stdlib_texts

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """The same 4,000 pieces, ours and theirs."""
    folder = tmp_path_factory.mktemp("hf_tokenizer")
    train_tokenizer(stdlib_texts(), folder / "tokenizer.model", TokenizerConfig(vocab_size=4000))
    save_hf_tokenizer(folder / "tokenizer.model", folder / "hf")
    ours = Tokenizer.load(folder / "tokenizer.model")
    return ours, transformers.AutoTokenizer.from_pretrained(folder / "hf")


def assert_same(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs(text).input_ids == [ours.eot_id, *ids]
    assert theirs.decode([ours.eot_id, *ids], skip_special_tokens=True) == text


def test_ids_are_identical_over_real_code(pair: tuple[Tokenizer, Any]) -> None:
    for text in stdlib_texts():
        assert_same(*pair, text)


@settings(max_examples=300, deadline=None)
@given(text=hard_text)
def test_ids_are_identical_over_hard_texts(pair: tuple[Tokenizer, Any], text: str) -> None:
    assert_same(*pair, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab_ =-.#0\n\u2581e", max_size=200))
def test_ids_are_identical_where_merges_compete(pair: tuple[Tokenizer, Any], text: str) -> None:
    assert_same(*pair, text)


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_a_symbol_that_begins_inside_a_spelled_special_token_is_found(
    pair: tuple[Tokenizer, Any], special: str
) -> None:
    for tail in ("=", "==", "===", ">", ">=", ">>="):
        assert_same(*pair, special + tail)
    rendered = pair[1](f"{special}==", add_special_tokens=False, split_special_tokens=False).input_ids
    assert pair[1].convert_ids_to_tokens(rendered) == [special, "=="]


@pytest.mark.parametrize("text", ["", *FRAGMENTS])
def test_ids_are_identical_for_each_fragment(pair: tuple[Tokenizer, Any], text: str) -> None:
    assert_same(*pair, text)
    assert_same(*pair, text * 50)


def test_special_tokens_are_the_same_and_only_said_on_purpose(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert len(theirs) == ours.vocab_size
    assert theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(ours.special_ids.values())
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (0, 0, 1)
    for name, number in ours.special_ids.items():
        assert number not in theirs(name, add_special_tokens=False).input_ids
        assert theirs(name, add_special_tokens=False, split_special_tokens=False).input_ids == [number]


def test_every_piece_is_the_same(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    numbers = list(range(ours.vocab_size))
    assert theirs.convert_ids_to_tokens(numbers) == ours.pieces(numbers)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"nothing\.model: no usable tokenizer"):
        save_hf_tokenizer(tmp_path / "nothing.model", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
