"""A tokenizer whose pieces hold letters and punctuation: denser, and exact all the same."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings

from dist_lm.config.corpus import TokenizerConfig
from dist_lm.tokenizer.symbols import INDENTS, OPERATORS, SHEBANGS
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tokenizer.train import train_tokenizer
from tests.tokenizer.hard_texts import FRAGMENTS, hard_text
from tests.tokenizer.longest_first import longest_first
from tests.tokenizer.stdlib_text import stdlib_texts


@pytest.fixture(scope="module")
def across(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("across") / "tokenizer.model"
    config = TokenizerConfig(vocab_size=4000, split_by_unicode_script=False, max_piece_length=32)
    train_tokenizer(stdlib_texts(), path, config)
    return Tokenizer.load(path)


def test_pieces_cross_scripts_and_are_longer(across: Tokenizer) -> None:
    pieces = across.pieces(range(across.vocab_size))
    learned = pieces[len(across.special_ids) + len(SHEBANGS) + len(INDENTS) + 256 :]
    assert "(self," in learned
    assert any(16 < len(piece) <= 32 for piece in learned)
    assert not [piece for piece in learned if len(piece) > 32]
    assert not [piece for piece in learned if len(piece) > 1 and any(one.isdigit() for one in piece)]
    assert not [piece for piece in learned if " " in piece.lstrip(" ")]


@pytest.mark.heavy
def test_it_is_denser(across: Tokenizer, tmp_path: Path) -> None:
    train_tokenizer(stdlib_texts(), tmp_path / "t.model", TokenizerConfig(vocab_size=4000))
    plain = Tokenizer.load(tmp_path / "t.model")
    text = "".join(stdlib_texts()[::20])
    assert len(across.encode(text)) < 0.97 * len(plain.encode(text))


@pytest.mark.heavy
@settings(max_examples=200)
@given(text=hard_text)
@example(text="".join(FRAGMENTS))
def test_any_text_comes_back(across: Tokenizer, text: str) -> None:
    ids = across.encode(text)
    assert across.decode(ids) == text
    assert not set(ids) & set(across.special_ids.values())
    vocabulary = across.vocabulary()
    assert b"".join(vocabulary[number] for number in ids) == text.encode()


@pytest.mark.parametrize("text", [*SHEBANGS, *INDENTS, *OPERATORS, *(f" {operator}" for operator in OPERATORS)])
def test_shebangs_indents_and_operators_are_one_token(across: Tokenizer, text: str) -> None:
    assert across.pieces(across.encode(text)) == [text]
    assert text in across.pieces(across.encode(f"x{text}y"))


def test_engines_that_match_the_longest_symbol_first_give_the_same_ids(across: Tokenizer) -> None:
    for text in stdlib_texts()[:40]:
        assert longest_first(text, across) == across.encode(text)
