"""Invented domains: things, fields and formulas with made-up names, which a model can only copy from the schema.

In known domains a model learns the words by heart and completes `calculate_hypot` from memory. Domain n lies on shelf n
modulo the number of shelves, so its tools are on one side of the split, as all tools are.
"""

import random
from functools import cache

from dist_lm.chat.messages import Json
from dist_lm.tools.data.formulas import Arguments, Formula
from dist_lm.tools.data.words import article, words

PREFIX = "invented "
THINGS = 2
FIELDS = 6
FOUND_BY = 3  # of the fields
FORMULAS = 3
TAKEN = {  # by family
    "formula": ("decimal", "amount", "amount", "few", "percent", "minutes", "money", "size", "numbers", "year"),
    "service": ("word", "city", "date", "code", "amount", "email", "given", "few", "clock", "title"),
}
KINDS = (
    *("person", "given", "city", "product", "title", "text", "word", "code", "email", "path", "date", "clock"),
    *("few", "amount", "amount", "percent", "year", "decimal", "decimal", "money", "flag"),
    *("words", "numbers", "codes", "address", "size", "size", "choice", "choice"),
)
ONSETS = ("", *"bcdfghjklmnpqrstvwxyz", "br", "ch", "cl", "dr", "fl", "gr", "pl", "pr", "sh", "sk", "st", "th", "tr")
VOWELS = (*"aeiouy", "ai", "ea", "ee", "ie", "oo", "ou")
CODAS = ("", "", *"bdgklmnprstvx", "ck", "ll", "nd", "ng", "nt", "rk", "sh", "ss", "th")


def invented_word(rng: random.Random) -> str:
    """A made-up word."""
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.randint(1, 3))]
    return "".join(syllables)


def is_invented(domain: str) -> bool:
    """Whether `domain` is an invented one."""
    return domain.startswith(PREFIX)


@cache
def invented_domain(domain: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """`(things, ((field, kind), ...))` of the domain `invented N`, as `words.domains()` has them."""
    rng = random.Random(domain)  # noqa: S311  (no secrets)
    names = _different(THINGS + FIELDS, rng)
    # searches take the first fields
    kinds = [rng.choice(("word", "amount", "date")) if number < FOUND_BY else _kind(rng) for number in range(FIELDS)]
    return tuple(names[:THINGS]), tuple(zip(names[THINGS:], kinds, strict=True))


@cache
def invented_formulas(domain: str) -> tuple[Formula, ...]:
    """The formulas of the domain `invented N`; keys begin with its name."""
    rng = random.Random(f"{domain} formulas")  # noqa: S311  (no secrets)
    return tuple(_formula(f"{domain} formula {number}", domain, rng) for number in range(FORMULAS))


def _formula(key: str, domain: str, rng: random.Random) -> Formula:
    what, whose, *names = _different(2 + rng.choice((1, 2, 2, 3)), rng)
    family = rng.choice(("formula", "formula", "service"))
    takes = [f"{name} {rng.choice(TAKEN[family])}" for name in names]
    said = rng.choice((f"the {what} of {article(whose)}", f"the {what}"))
    return Formula(key, domain, said, tuple(takes), measure, family)


def measure(arguments: Arguments) -> Json:
    """All numbers added up, and the letters of all texts."""
    return round(sum(map(_size, arguments.values())), 2)


def _size(value: Json) -> float:
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str) else float(value)


def _kind(rng: random.Random) -> str:
    kind = rng.choice(KINDS)
    return f"one_of {'/'.join(_different(3, rng))}" if kind == "choice" else kind


def _different(count: int, rng: random.Random) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        name = _name(rng)
        if name not in found:
            found.append(name)
    return found


def _name(rng: random.Random) -> str:
    known = words("common")
    layout = rng.random()
    if layout < 0.25:
        return invented_word(rng)
    if layout < 0.4:
        return f"{rng.choice(known)} {invented_word(rng)}"
    if layout < 0.65:
        return " ".join(rng.sample(known, 2))
    return rng.choice(known)
