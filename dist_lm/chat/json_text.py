"""JSON as a conversation holds it: one spelling for every value, and a reader that gives exactly that value back.

Every text, key or value, is written behind a space, inside its quotes: `{" city": " Oslo"}`. So a word is the same
tokens in a call and a schema as in the sentence it is copied from, or which speaks of it: SentencePiece has one piece
for ` Oslo` and others for `"Oslo`. The reader takes the space away again, and text without one as it is.

Behind every number stands a space, `{" days": 3 }`, as behind every text a quote: what says that it has ended.

The only place that knows how tools, calls and results look as text. `read(write(x))` is x, with the type of every
number and the order of keys; what would come back as something else is refused by both.
"""

import json
import math
from typing import Any, NoReturn

from dist_lm.chat.errors import ChatError
from dist_lm.chat.messages import Json
from dist_lm.tokenizer.unicode import utf8

DEEPEST = 64  # lists and objects inside each other: far from the recursion limit of any interpreter
MOST_DIGITS = 640  # of an integer: the least to which an interpreter may be limited (sys.set_int_max_str_digits)


def write(value: Json, where: str) -> str:
    """`value` in one line: separators ", " and ": ", keys in their order, characters as themselves; texts behind a
    space, and a space behind numbers.

    Raises:
        ChatError: it holds something that JSON has no word for (NaN, a key that is no text, a tuple, a lone
            surrogate), or is beyond `DEEPEST` or `MOST_DIGITS`; the message begins with `where`.
    """
    _check(value, where)
    return _spelled(value)


def read(text: str, where: str) -> Json:
    """The value of `text`, however it is spaced.

    Raises:
        ChatError: it is no JSON, names a key twice, or is what `write` would refuse; the message begins with `where`.
    """

    def refuse(name: str) -> NoReturn:
        raise ChatError(f"{where}: {name} is no JSON")

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > MOST_DIGITS:
            raise ChatError(f"{where}: {_too_many_digits()}")
        return int(digits)

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [_without_space(key) for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ChatError(f"{where}: the key {shown(twice)} is there twice")
        return dict(pairs)

    try:
        value = json.loads(text, parse_constant=refuse, parse_int=integer, object_pairs_hook=distinct)
    except ChatError:
        raise
    except ValueError as error:
        raise ChatError(f"{where}: no JSON ({error})") from None
    except RecursionError:
        raise ChatError(f"{where}: {_too_deep()}") from None
    _check(value, where)
    return _without_spaces(value)


def _spelled(value: Json) -> str:
    """At most `DEEPEST` deep: see `_check`."""
    if type(value) is str:
        return json.dumps(f" {value}", ensure_ascii=False)
    if type(value) is list:
        return f"[{', '.join(map(_spelled, value))}]"
    if type(value) is dict:
        return f"{{{', '.join(f'{_spelled(key)}: {_spelled(inner)}' for key, inner in value.items())}}}"
    return f"{json.dumps(value)} " if type(value) in (int, float) else json.dumps(value)


def _without_spaces(value: Json) -> Json:
    """A copy whose texts lack the space before them. At most `DEEPEST` deep."""
    if type(value) is str:
        return _without_space(value)
    if type(value) is list:
        return [_without_spaces(inner) for inner in value]
    if type(value) is dict:
        return {_without_space(key): _without_spaces(inner) for key, inner in value.items()}
    return value


def _without_space(text: str) -> str:
    return text.removeprefix(" ")


def _check(value: Json, where: str) -> None:
    """Refuse what does not come back as it is."""
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        kind = type(part)
        if kind is str:
            _check_text(part, where)
        elif kind is int:
            if abs(part) >= 10**MOST_DIGITS:
                raise ChatError(f"{where}: {_too_many_digits()}")
        elif kind is float:
            if not math.isfinite(part):
                raise ChatError(f"{where}: {part} is no JSON")
        elif kind in (list, dict):
            if depth == DEEPEST:
                raise ChatError(f"{where}: {_too_deep()}")
            if kind is dict:
                for key in part:
                    if type(key) is not str:
                        raise ChatError(f"{where}: a key of type {type(key).__name__}; expected text")
                    _check_text(key, where)
            waiting += [(inner, depth + 1) for inner in (part.values() if kind is dict else part)]
        elif part is not None and kind is not bool:
            raise ChatError(f"{where}: a {kind.__name__} is no JSON; expected what json.loads returns")


def _check_text(text: str, where: str) -> None:
    try:
        utf8(text, where)
    except ValueError as error:
        raise ChatError(str(error)) from None


def shown(value: Json) -> str:
    """A text in quotes, short enough for a message; of anything else its type."""
    if type(value) is not str:
        return f"a {type(value).__name__}"
    return repr(value if len(value) <= 40 else value[:40] + "…")


def _too_deep() -> str:
    return f"more than {DEEPEST} lists and objects inside each other"


def _too_many_digits() -> str:
    return f"an integer of more than {MOST_DIGITS} digits"
