"""Word lists, and names of tools and arguments in the styles that programs use."""

from functools import cache
from importlib.resources import files

STYLES = ("snake", "camel", "dotted", "reversed", "kebab", "plain")
STYLE_WEIGHTS = (36, 24, 18, 10, 6, 6)


@cache
def words(name: str) -> tuple[str, ...]:
    """Returns the list `name` of words.txt."""
    return _lists()[name]


@cache
def domains() -> dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...]]]:
    """Returns `{domain: (subjects, ((field, kind), ...))}` of domains.txt; a field is in words, such as `due date`."""
    fields_of_domain = {}
    for name, rest in _lines("domains.txt"):
        subjects, fields = rest.split(" | ")
        fields_of_domain[name] = (_items(subjects), tuple(_field(field) for field in _items(fields)))
    return fields_of_domain


@cache
def _lists() -> dict[str, tuple[str, ...]]:
    return {name: _items(rest) for name, rest in _lines("words.txt")}


def _field(text: str) -> tuple[str, str]:
    """Reads a field and its kind: `status one_of open/paid` gives `("status", "one_of open/paid")`."""
    name, one_of, options = text.partition(" one_of ")
    if one_of:
        return name, f"one_of {options}"

    name, _, kind = text.rpartition(" ")
    return name, kind


def _lines(file: str) -> list[tuple[str, str]]:
    text = files("dist_lm.tools.data").joinpath(file).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(": ") for line in lines)]


def _items(text: str) -> tuple[str, ...]:
    return tuple(text.split("; "))


def tool_name(verb: str, subject: str, style: str) -> str:
    """Returns the name of a tool: `("get", "purchase order", "camel")` gives `getPurchaseOrder`.

    Args:
        style: one of STYLES; words of any other are joined by `_`.
    """
    words = f"{verb} {subject}".split()

    if style == "camel":
        return camel(words)
    if style == "dotted":
        return f"{subject.replace(' ', '_')}.{verb.replace(' ', '_')}"
    if style == "reversed":
        return "_".join(f"{subject} {verb}".split())
    if style == "kebab":
        return "-".join(words)
    if style == "plain":
        return "".join(word.capitalize() for word in words)
    return "_".join(words)


def argument_name(words: str, style: str) -> str:
    """Returns the name of an argument: `due_date` for `due date`, or `dueDate` beside a tool in camel case."""
    if style in ("camel", "plain"):
        return camel(words.split())
    return "_".join(words.split())


def camel(words: list[str]) -> str:
    """Returns words in camel case, such as `dueDate`."""
    return words[0] + "".join(word.capitalize() for word in words[1:])


def plural(subject: str) -> str:
    """Returns the plural of a noun: `policies` for `policy`."""
    if subject.endswith("y") and subject[-2] not in "aeou":
        return f"{subject[:-1]}ies"
    if subject.endswith(("s", "x", "ch", "sh")):
        return f"{subject}es"
    return f"{subject}s"


def upper_first(text: str) -> str:
    """Returns `text` with an upper-case first letter."""
    return text[0].upper() + text[1:]


def article(words: str) -> str:
    """Returns words with their indefinite article, such as `an order`."""
    # The sound counts, not the letter: a user, a unit.
    indefinite = "an" if words[0] in "aeiou" and not words.startswith(("use", "uni")) else "a"
    return f"{indefinite} {words}"
