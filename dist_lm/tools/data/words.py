"""The word lists that tools and values are made of, as they lie beside this file."""

from functools import cache
from importlib.resources import files


@cache
def words(name: str) -> tuple[str, ...]:
    """The list `name` of words.txt."""
    return _lists()[name]


@cache
def domains() -> dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...]]]:
    """`{domain: (objects, ((field, kind), ...))}` of domains.txt; a field is in words, such as `due date`."""
    found = {}
    for name, rest in _lines("domains.txt"):
        objects, fields = rest.split(" | ")
        found[name] = (_items(objects), tuple(_field(field) for field in _items(fields)))
    return found


@cache
def _lists() -> dict[str, tuple[str, ...]]:
    return {name: _items(rest) for name, rest in _lines("words.txt")}


def _field(text: str) -> tuple[str, str]:
    """`status one_of open/paid` is `("status", "one_of open/paid")`."""
    before, one_of, options = text.partition(" one_of ")
    if one_of:
        return before, f"one_of {options}"
    name, _, kind = text.rpartition(" ")
    return name, kind


def _lines(file: str) -> list[tuple[str, str]]:
    text = files("dist_lm.tools.data").joinpath(file).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(": ") for line in lines)]


def _items(text: str) -> tuple[str, ...]:
    return tuple(text.split("; "))
