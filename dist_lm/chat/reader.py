"""Tokens read one after the other: what comes next, or an error that says what should have."""

import operator
from collections.abc import Iterable
from typing import Any

from dist_lm.chat import json_text
from dist_lm.chat.errors import ChatError
from dist_lm.chat.messages import Json
from dist_lm.tokenizer.symbols import SPECIAL_TOKENS
from dist_lm.tokenizer.tokenizer import Tokenizer


class Reader:
    """A place in a list of tokens."""

    def __init__(self, ids: Iterable[Any], tokenizer: Tokenizer) -> None:
        """Raises ChatError: one of `ids` is no token of `tokenizer`."""
        self._tokenizer = tokenizer
        self._ids = [_checked(number, at, tokenizer.vocab_size) for at, number in enumerate(ids)]
        self._at = 0

    @property
    def place(self) -> str:
        """How messages call the token that is next."""
        return f"token {self._at}"

    def take(self, name: str) -> bool:
        """Step over the special token `name` if it is next."""
        found = self._special() == name
        self._at += found
        return found

    def expect(self, *names: str) -> str:
        """Step over the special token that is next, one of `names`."""
        for name in names:
            if self.take(name):
                return name
        raise self._unexpected(" or ".join(names))

    def at_end(self) -> bool:
        """Whether no token is left."""
        return self._at == len(self._ids)

    def expect_end(self) -> None:
        """Refuse tokens that are left."""
        if not self.at_end():
            raise self._unexpected("nothing more")

    def text(self) -> str:
        """The text up to the next special token, which may be none at all."""
        begin = self._at
        while not self.at_end() and self._special() is None:
            self._at += 1
        try:
            return self._tokenizer.content(self._ids[begin : self._at]).decode()
        except UnicodeDecodeError:
            raise ChatError(f"tokens {begin} to {self._at - 1}: expected text, found bytes that are no UTF-8") from None

    def json(self, closing: str) -> Json:
        """The JSON up to the special token `closing`, which is stepped over."""
        begin = self.place
        text = self.text()
        self.expect(closing)
        return json_text.read(text, begin)

    def _special(self) -> str | None:
        """The special token that is next; None: text, or the end."""
        if self.at_end() or self._ids[self._at] >= len(SPECIAL_TOKENS):
            return None
        return SPECIAL_TOKENS[self._ids[self._at]]

    def _unexpected(self, expected: str) -> ChatError:
        found = "the end" if self.at_end() else self._special() or "text"
        return ChatError(f"{self.place}: expected {expected}, found {found}")


def _checked(number: Any, at: int, vocab_size: int) -> int:
    try:
        found = operator.index(number)
    except TypeError:
        raise ChatError(f"token {at}: a {type(number).__name__}; expected an id") from None
    if not 0 <= found < vocab_size:
        raise ChatError(f"token {at}: expected an id below {vocab_size}, found one outside")
    return found
