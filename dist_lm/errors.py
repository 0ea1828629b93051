"""Errors that a user can correct.

Every entry point prints a `UserError` as one line and exits 2; anything else is a defect of ours and keeps its
traceback.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any, Self

FOLDER_NAME = re.compile(r"\w[\w.-]{0,99}")  # excludes separators, hidden names and options of a command


class UserError(ValueError):
    """A mistake of the user: the message names the key, file or rank, the value, and the way out."""


class ConfigError(UserError):
    """A key that does not exist, a value of the wrong type or range, or a combination that cannot run."""


class ArtefactError(UserError):
    """A file of an earlier stage is missing, damaged, or belongs to something else."""


def require(condition: bool, key: str, value: Any, accepted: str) -> None:
    """Raises ConfigError for `key=value` unless `condition` holds; the message says what would be accepted."""
    if not condition:
        raise ConfigError(f"{key}={value}: expected {accepted}")


def did_you_mean(word: str, names: Iterable[str], prefix: str = "") -> str:
    """Returns a hint for an error message, such as 'did you mean stage=code? ', with a space at its end.

    Empty if none of `names` is similar to `word`.

    Args:
        prefix: stands before the name, such as 'stage='.
    """
    similar = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {prefix}{similar[0]}? " if similar else ""


def require_folder_name(key: str, name: str) -> None:
    """Raises ConfigError for a name that cannot be a folder of the work directory, or would lead out of it."""
    require(bool(FOLDER_NAME.fullmatch(name)), key, repr(name), "up to 100 letters, digits, _ . and - (a folder)")


def shown_value(value: Any) -> str:
    """Returns a value from a file of somebody else for a message: on one line, printable, at most 80 characters."""
    text = str(value)[:81] if isinstance(value, str) else repr(value)[:81]
    if not text.isprintable():
        text = ascii(text)[1:-1]
    return text if len(text) <= 80 else f"{text[:77]}..."


def one_line(message: str) -> str:
    """Returns a message on one line, printable: other people's libraries put content of files into theirs."""
    line = " ".join(message.split())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def utf8(text: str, name: str) -> bytes:
    """Returns `text` in UTF-8.

    Raises:
        UserError: `text` holds a lone surrogate; the message gives its position in `name`.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name}: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which "
            "UTF-8 cannot hold: read the text strictly, or replace characters that are not Unicode"
        ) from None


class UnreachableError(ArtefactError):
    """A server did not answer, or not with what it has; the same request may succeed later."""


class ChangedInputError(ArtefactError):
    """A file that a source reads is not as it was when it was listed or first read."""

    def __init__(self, name: str, words: str) -> None:
        """`words`: how it changed."""
        super().__init__(
            f"{name}: changed while it was read ({words}), so documents held out before could be train now: run the "
            "command again when nothing writes to it (lines may be added to plain text)"
        )
        self.words = words
        self._arguments = name, words

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        """Lets a worker process send the error: an exception is made again from `args`, which hold the message."""
        return type(self), self._arguments
