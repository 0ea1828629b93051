"""Word lists, and names of tools and arguments in the styles that programs use."""

from functools import cache
from importlib.resources import files

STYLES = ("snake", "camel", "dotted", "reversed", "kebab", "plain")
STYLE_WEIGHTS = (36, 24, 18, 10, 6, 6)


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


def tool_name(verb: str, thing: str, style: str) -> str:
    """`("get", "purchase order", "camel")` is `getPurchaseOrder`."""
    words = f"{verb} {thing}".split()
    if style == "camel":
        return camel(words)
    if style == "dotted":
        return f"{thing.replace(' ', '_')}.{verb.replace(' ', '_')}"
    if style == "reversed":
        return "_".join(f"{thing} {verb}".split())
    if style == "kebab":
        return "-".join(words)
    if style == "plain":
        return "".join(word.capitalize() for word in words)
    return "_".join(words)


def argument_name(words: str, style: str) -> str:
    """`due date` is `due_date`, or `dueDate` beside a tool in camel case."""
    return camel(words.split()) if style in ("camel", "plain") else "_".join(words.split())


def camel(words: list[str]) -> str:
    """`dueDate`."""
    return words[0] + "".join(word.capitalize() for word in words[1:])


def plural(thing: str) -> str:
    """`policy` is `policies`."""
    if thing.endswith("y") and thing[-2] not in "aeou":
        return f"{thing[:-1]}ies"
    return f"{thing}es" if thing.endswith(("s", "x", "ch", "sh")) else f"{thing}s"


def upper_first(text: str) -> str:
    """`text` with an upper-case first letter."""
    return text[0].upper() + text[1:]


def article(words: str) -> str:
    """`an order`."""
    one = "an" if words[0] in "aeiou" and not words.startswith(("use", "uni")) else "a"
    return f"{one} {words}"
