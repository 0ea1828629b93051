"""What a person writes comes back, and its quoted words are the tokens of calls."""

import pytest
from hypothesis import given

from dist_lm.chat.json_text import write
from dist_lm.chat.user_text import spaced, unspaced
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.hard_texts import hard_text


@given(hard_text)
def test_any_text_comes_back(text: str) -> None:
    assert unspaced(spaced(text)) == text


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ('name it "Blue sky".', 'name it " Blue sky".'),
        ("'a' (b), \"(c)\" '", "' a' ( b), \" ( c)\" ' "),
        ("don't f(x) a[0] 5' high", "don't f(x) a[0] 5' high"),
        ('say " yes"', 'say "  yes"'),
        ('"', '" '),
        ("", ""),
    ],
)
def test_a_space_stands_behind_what_opens(text: str, held: str) -> None:
    assert spaced(text) == held
    assert unspaced(held) == text


def test_text_that_is_held_without_a_space_is_read_as_it_is() -> None:
    assert unspaced('name it "Blue sky" (now)') == 'name it "Blue sky" (now)'


def test_a_quoted_word_is_the_tokens_that_it_is_in_a_call(tokenizer: Tokenizer) -> None:
    word = tokenizer.encode(" return")
    said, called = (tokenizer.encode(text) for text in (spaced('it "return"'), write({"verb": "return"}, "a call")))
    for tokens in (said, called):
        assert any(tokens[at : at + len(word)] == word for at in range(len(tokens))), tokens
