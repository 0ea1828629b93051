"""Encode and decode: exact for every text, and no text can say a special token."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_lm.document import Document
from dist_lm.errors import ArtefactError, UserError
from dist_lm.tokenizer.symbols import INDENTS, OPERATORS, SHEBANGS, SPECIAL_TOKENS, user_defined_symbols
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.hard_texts import FRAGMENTS, hard_text
from tests.tokenizer.longest_first import longest_first
from tests.tokenizer.stdlib_text import stdlib_texts


@pytest.mark.heavy
@settings(max_examples=400)
@given(text=hard_text)
@example(text="")
@example(text="".join(FRAGMENTS))
@example(text=" \u2581")
def test_any_unicode_text_comes_back_without_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert all(0 <= number < tokenizer.vocab_size for number in ids)


@pytest.mark.heavy
def test_every_code_point_comes_back(tokenizer: Tokenizer) -> None:
    points = (chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point <= 0xDFFF)
    text = "".join(points)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", FRAGMENTS)
def test_hard_fragments_come_back_alone_and_in_a_very_long_line(tokenizer: Tokenizer, text: str) -> None:
    for candidate in (text, f" {text} ", text * 3000):
        assert tokenizer.decode(tokenizer.encode(candidate)) == candidate


@pytest.mark.parametrize("text", [*SHEBANGS, *INDENTS, *OPERATORS, *(f" {operator}" for operator in OPERATORS)])
def test_shebangs_indents_and_operators_are_one_token(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.pieces(tokenizer.encode(text)) == [text]
    assert text in tokenizer.pieces(tokenizer.encode(f"x{text}y"))


def test_no_proper_suffix_of_a_symbol_begins_another_symbol() -> None:
    """Otherwise the symbols found would depend on which symbol is looked for first."""
    symbols = user_defined_symbols()
    suffixes = [(one, one[cut:]) for one in symbols for cut in range(1, len(one))]
    assert not [
        (one, other) for one, suffix in suffixes for other in symbols if other != one and other.startswith(suffix)
    ]


@pytest.mark.heavy
@settings(max_examples=300)
@given(text=st.lists(st.sampled_from([*SHEBANGS, *INDENTS, *OPERATORS, "\n", " ", "\t", "x", "#!"])).map("".join))
def test_engines_that_match_the_longest_symbol_first_give_the_same_ids(tokenizer: Tokenizer, text: str) -> None:
    assert longest_first(text, tokenizer) == tokenizer.encode(text)


@pytest.mark.heavy
def test_the_same_ids_over_real_code(tokenizer: Tokenizer) -> None:
    for text in stdlib_texts()[:60]:
        assert longest_first(text, tokenizer) == tokenizer.encode(text)


def test_code_splits_into_meaningful_units(tokenizer: Tokenizer) -> None:
    text = "#!/bin/bash\n    return a == b\n"
    pieces = ["#!/bin/bash", "\n    ", "return", " a", " ==", " b", "\n"]
    assert tokenizer.pieces(tokenizer.encode(text)) == pieces


def test_special_tokens_have_their_fixed_ids_and_stand_for_no_text(tokenizer: Tokenizer) -> None:
    assert list(tokenizer.special_ids.items()) == [(name, n) for n, name in enumerate(SPECIAL_TOKENS)]
    assert (tokenizer.eot_id, tokenizer.pad_id) == (0, 1)
    assert tokenizer.pieces(tokenizer.special_ids.values()) == list(SPECIAL_TOKENS)
    assert tokenizer.decode([tokenizer.eot_id, *tokenizer.encode("x"), tokenizer.pad_id]) == "x"


@pytest.mark.heavy
@settings(max_examples=400)
@given(text=hard_text)
@example(text="".join(FRAGMENTS))
def test_the_bytes_of_tokens_joined_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    vocabulary = tokenizer.vocabulary()
    assert b"".join(vocabulary[number] for number in tokenizer.encode(text)).decode() == text


def test_every_token_has_bytes_but_special_ones(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.vocabulary()
    assert len(vocabulary) == tokenizer.vocab_size
    assert [number for number, content in enumerate(vocabulary) if not content] == list(tokenizer.special_ids.values())
    assert {bytes([byte]) for byte in range(256)} <= set(vocabulary)


def test_broken_bytes_decode_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("\u2581")[:2]).strip("\ufffd") == ""


def test_decode_takes_arrays(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(np.array(tokenizer.encode("a == b"), np.uint16)) == "a == b"


@given(text=st.text(st.characters(categories=["Cs", "Ll"]), min_size=1).filter(lambda t: not t.isalpha()))
@settings(max_examples=30)
def test_lone_surrogates_are_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(UserError, match=r"character \d+ is the lone surrogate U\+D[89A-F]"):
        tokenizer.encode(text)


def test_a_document_opens_with_end_of_text(tokenizer: Tokenizer) -> None:
    document = Document("naïve\r\n\u2581", "python", "a.py", "MIT", "00")
    tokenized = tokenizer.encode_document(document)
    assert tokenized.tokens.dtype == np.uint16
    assert tokenized.tokens.tolist() == [tokenizer.eot_id, *tokenizer.encode(document.text)]
    assert tokenized.n_bytes == len(document.text.encode())
    assert (tokenized.language, tokenized.source, tokenized.licence) == ("python", "a.py", "MIT")
    with pytest.raises(UserError, match=r"^bad\.py: character 1 "):
        tokenizer.encode_document(Document("x\udc80", "python", "bad.py", "MIT", "00"))


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, model_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no tokenizer there"):
        Tokenizer.load(tmp_path / "tokenizer.model")
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(model_path.read_bytes()[:-100])
    with pytest.raises(ArtefactError, match=r"damaged\.model is damaged"):
        Tokenizer.load(damaged)


@pytest.mark.parametrize("text", FRAGMENTS)
def test_the_bytes_of_tokens_make_up_the_text(tokenizer: Tokenizer, text: str) -> None:
    vocabulary = tokenizer.vocabulary()
    assert b"".join(vocabulary[number] for number in tokenizer.encode(text)) == text.encode()
    assert {vocabulary[number] for number in tokenizer.special_ids.values()} == {b""}
