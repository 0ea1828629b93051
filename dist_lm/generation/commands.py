"""What a person can say at the prompt that is no prompt: lines as values. Nothing is done here."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from dist_lm.errors import ConfigError, UserError, require
from dist_lm.generation.session import Settings

HELP = r"""Type the beginning of a text; the model goes on with it. Enter sends it.
  a \ at the end of a line      the prompt goes on in the next line (\\: a \ and no more)
  lines pasted together         one prompt
  Ctrl-C                        ends the answer; at the prompt, drops what you typed
  Ctrl-D, /quit, /exit          leaves

  /temperature 0.7              how freely tokens are drawn; 0: always the likeliest
  /top_k 50                     only from so many of the likeliest; 0: off
  /top_p 0.95                   only from the fewest with this much probability; 1: off
  /min_p 0.05                   only from those with this share of the likeliest one's probability; 0: off
  /repetition_penalty 1.1       tokens already seen are less likely; 1: off
  /max_new_tokens 200           of an answer, at most
  /stop TEXT                    one more text that ends an answer (\n \t \\ as in a string); /stop off: none
  /seed 7                       of the next answer; the one after it has 8, and so on

  /lang python                  begin with a usual opening of that language; once more: another; /lang alone: which
  /again                        answer the last prompt once more, with the next seed
  /new                          with --tools: forget what was said
  /show                         the settings
  /help                         this
A setting without a value shows the one it has."""

LIMIT = 1 << 31  # whole numbers stay below
SEED_LIMIT = 1 << 63
Action = Literal["show", "again", "new", "help", "lang", "quit"]


@dataclass(frozen=True)
class Do:
    """Something to be done."""

    action: Action
    argument: str = ""


@dataclass(frozen=True)
class Tell:
    """A setting to be shown."""

    key: str


@dataclass(frozen=True)
class Change:
    """A setting with a new value."""

    key: str
    settings: Settings


Command = Do | Tell | Change

ACTIONS: dict[str, Action] = {
    **{"show": "show", "again": "again", "new": "new", "help": "help", "lang": "lang"},
    **{"quit": "quit", "exit": "quit"},
}
NO_STOP = "off"
NUMBERS: dict[str, Callable[[str], float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
}
KEYS = (*NUMBERS, "stop", "seed")


def is_command(line: str) -> bool:
    """Whether a line is a `/word`, with or without more behind it; a path or a comment (`//`) is not."""
    return re.fullmatch(r"/[A-Za-z_]+(\s.*)?", line, re.DOTALL) is not None


def parse_command(line: str, settings: Settings) -> Command:
    """What a line that `is_command` means.

    Raises:
        UserError: there is no such command, or its value is none that it can have.
    """
    word, _, rest = line[1:].partition(" ")
    name, argument = word.strip(), rest.strip()
    if name in ACTIONS:
        if argument and name != "lang":
            raise UserError(f"/{name} takes no value, found {argument!r}")
        return Do(ACTIONS[name], argument)
    if name not in KEYS:
        raise UserError(f"/{name}: no such command; /help shows them all")
    if not argument:
        return Tell(name)
    if name == "stop":
        stop = () if argument == NO_STOP else (*settings.params.stop, unescape(rest))
        return Change(name, replace(settings, params=replace(settings.params, stop=stop)))
    return Change(name, changed(settings, name, argument))


def changed(settings: Settings, key: str, text: str) -> Settings:
    """`settings` with another number.

    Raises:
        ConfigError: `text` is none, or none that `key` can have.
    """
    read = NUMBERS.get(key, int)
    try:
        value = read(text)
    except (ValueError, OverflowError):
        raise ConfigError(f"{key}={text}: expected a {'whole number' if read is int else 'number'}") from None
    if read is int:
        check_whole(key, int(value))
    if key == "seed":
        return replace(settings, seed=int(value))
    return replace(settings, params=replace(settings.params, **{key: value}))


def check_whole(key: str, value: int) -> None:
    """Refuse whole numbers that no tensor holds."""
    limit = SEED_LIMIT if key == "seed" else LIMIT
    require(-limit <= value < limit, key, value, f"a whole number below {limit:,}")


def unescape(text: str) -> str:
    r"""`\n`, `\t` and `\\` as the characters they stand for; any other backslash is one."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)


def value_of(settings: Settings, key: str) -> str:
    """A setting, for people."""
    if key == "seed":
        return str(settings.seed)
    if key == "stop":
        return " ".join(repr(stop) for stop in settings.params.stop) or "none"
    return f"{getattr(settings.params, key):.12g}"


def carries_on(line: str) -> tuple[str, bool]:
    r"""(a line as it is meant, whether its prompt goes on in the next one): a `\` at its end says so, `\\` is a `\`."""
    kept = line.rstrip("\\")
    backslashes = len(line) - len(kept)
    return kept + "\\" * (backslashes // 2), backslashes % 2 == 1
