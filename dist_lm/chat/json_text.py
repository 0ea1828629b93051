"""Writes JSON of conversations as `json.dumps(ensure_ascii=False)` does, and reads it strictly.

`read(write(x))` is x, with the type of every number and the order of the keys. Both functions refuse a value that
would come back as another one.
"""

import json
import math
from collections import Counter
from typing import Any, NoReturn

from dist_lm.chat.messages import ChatError, Json, check_text, shown

DEEPEST = 64  # nested lists and objects: far below the recursion limit of any interpreter
MOST_DIGITS = 640  # digits of an integer: the smallest limit that an interpreter may set (sys.set_int_max_str_digits)
LARGEST = 10**MOST_DIGITS  # integers lie below
TOO_DEEP = f"more than {DEEPEST} nested lists and objects"
TOO_LONG = f"an integer of more than {MOST_DIGITS} digits"


def write(value: Json, where: str) -> str:
    """Returns `value` as JSON in one line, with the separators ", " and ": ".

    Raises:
        ChatError: JSON cannot express the value (NaN, a key that is not text, a tuple, a lone surrogate), or it
            exceeds `DEEPEST` or `MOST_DIGITS`; the message begins with `where`.
    """
    _check(value, where)
    return json.dumps(value, ensure_ascii=False)


def read(text: str, where: str) -> Json:
    """Returns the value of the JSON `text`, which may have any white space between its parts.

    Numbers keep their type: `1` is an int, `1.0` a float. The value may be of any kind, not only an object.

    Raises:
        ChatError: `text` is not JSON, has a key twice, or holds a value that `write` refuses; the message begins with
            `where`.
    """

    def refuse(name: str) -> NoReturn:
        raise ChatError(f"{where}: {name} is not JSON")

    def integer(digits: str) -> int:
        # An interpreter refuses longer integers with a plain ValueError, or takes quadratic time for them.
        if len(digits.lstrip("-")) > MOST_DIGITS:
            raise ChatError(f"{where}: {TOO_LONG}")
        return int(digits)

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        distinct_pairs = dict(pairs)
        if len(distinct_pairs) < len(pairs):
            (repeated, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ChatError(f"{where}: the key {shown(repeated)} is there twice")
        return distinct_pairs

    try:
        value = json.loads(text, parse_constant=refuse, parse_int=integer, object_pairs_hook=distinct)
    except ChatError:
        raise
    except ValueError as error:
        raise ChatError(f"{where}: not JSON ({error})") from None
    except RecursionError:
        raise ChatError(f"{where}: {TOO_DEEP}") from None

    _check(value, where)
    return value


def _check(value: Json, where: str) -> None:
    """Refuses a value that JSON does not give back unchanged, at any depth.

    Raises:
        ChatError: the reasons of `write`; the message begins with `where`.
    """
    # A stack instead of recursion: a value may be nested deeper than the interpreter can follow.
    unchecked = [(value, 0)]
    while unchecked:
        part, depth = unchecked.pop()
        kind = type(part)

        if kind is str:
            check_text(part, where)
        elif kind is int:
            if abs(part) >= LARGEST:
                raise ChatError(f"{where}: {TOO_LONG}")
        elif kind is float:
            if not math.isfinite(part):
                raise ChatError(f"{where}: {part} is not JSON")
        elif kind in (list, dict):
            if depth == DEEPEST:
                raise ChatError(f"{where}: {TOO_DEEP}")
            children = part
            if kind is dict:
                for key in part:
                    if type(key) is not str:
                        raise ChatError(f"{where}: a key of type {type(key).__name__}; expected text")
                    check_text(key, where)
                children = part.values()
            unchecked += [(child, depth + 1) for child in children]
        elif part is not None and kind is not bool:
            raise ChatError(f"{where}: a {kind.__name__} is not JSON; expected what json.loads returns")
