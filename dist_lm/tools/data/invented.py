"""Invented domains: subjects, fields and formulas with made-up names, which a model can only copy from the schema.

In the listed domains a model learns the words by heart and completes `calculate_hypot` from memory. Domain n is on
shelf n modulo the number of shelves, so all its tools are on one side of the split.
"""

import random
from functools import cache

from dist_lm.chat.messages import Json
from dist_lm.tools.data.formulas import Arguments, Formula
from dist_lm.tools.data.words import article, words

PREFIX = "invented "
SUBJECTS = 2  # per domain
FIELDS = 6  # per domain
NUM_SEARCHED = 3  # fields that make good conditions of a search; they come first
FORMULAS = 3  # per domain
ARGUMENT_KINDS = {  # family of formula -> kinds of its arguments
    "formula": ("decimal", "amount", "amount", "few", "percent", "minutes", "money", "size", "numbers", "year"),
    "service": ("word", "city", "date", "code", "amount", "email", "given", "few", "clock", "title"),
}
FIELD_KINDS = (
    *("person", "given", "city", "product", "title", "text", "word", "code", "email", "path", "date", "clock"),
    *("few", "amount", "amount", "percent", "year", "decimal", "decimal", "money", "flag"),
    *("words", "numbers", "codes", "address", "size", "size", "choice", "choice"),
)
ONSETS = ("", *"bcdfghjklmnpqrstvwxyz", "br", "ch", "cl", "dr", "fl", "gr", "pl", "pr", "sh", "sk", "st", "th", "tr")
VOWELS = (*"aeiouy", "ai", "ea", "ee", "ie", "oo", "ou")
CODAS = ("", "", *"bdgklmnprstvx", "ck", "ll", "nd", "ng", "nt", "rk", "sh", "ss", "th")


def invented_word(rng: random.Random) -> str:
    """Returns a made-up word of one to three syllables."""
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.randint(1, 3))]
    return "".join(syllables)


def is_invented(domain: str) -> bool:
    """Returns whether `domain` is an invented one."""
    return domain.startswith(PREFIX)


@cache
def invented_domain(domain: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Returns `(subjects, ((field, kind), ...))` of the domain `invented N`, in the form of `words.domains()`."""
    rng = random.Random(domain)  # noqa: S311  (no secrets)
    names = _different(SUBJECTS + FIELDS, rng)
    # Searches use the first fields, whose values make good conditions.
    kinds = [rng.choice(("word", "amount", "date")) for _ in range(NUM_SEARCHED)]
    kinds += [_kind(rng) for _ in range(FIELDS - NUM_SEARCHED)]
    return tuple(names[:SUBJECTS]), tuple(zip(names[SUBJECTS:], kinds, strict=True))


@cache
def invented_formulas(domain: str) -> tuple[Formula, ...]:
    """Returns the formulas of the domain `invented N`; their keys begin with its name."""
    rng = random.Random(f"{domain} formulas")  # noqa: S311  (no secrets)
    return tuple(_formula(f"{domain} formula {number}", domain, rng) for number in range(FORMULAS))


def _formula(key: str, domain: str, rng: random.Random) -> Formula:
    figure, noun, *names = _different(2 + rng.choice((1, 2, 2, 3)), rng)
    family = rng.choice(("formula", "formula", "service"))
    takes = [f"{name} {rng.choice(ARGUMENT_KINDS[family])}" for name in names]
    phrase = rng.choice((f"the {figure} of {article(noun)}", f"the {figure}"))

    return Formula(key, domain, phrase, tuple(takes), measure, family)


def measure(arguments: Arguments) -> Json:
    """Returns the sum of all numbers and of the lengths of all texts."""
    return round(sum(map(_size, arguments.values())), 2)


def _size(argument: Json) -> float:
    """Returns a number as it is, the length of a text, and the sum of the parts of a list or object; null is an
    error."""
    if isinstance(argument, dict):
        return sum(map(_size, argument.values()))
    if isinstance(argument, list):
        return sum(map(_size, argument))
    if isinstance(argument, str):
        return len(argument)
    return float(argument)


def _kind(rng: random.Random) -> str:
    kind = rng.choice(FIELD_KINDS)
    if kind == "choice":
        return f"one_of {'/'.join(_different(3, rng))}"
    return kind


def _different(count: int, rng: random.Random) -> list[str]:
    """Returns `count` different names in words, invented or common."""
    names: list[str] = []
    while len(names) < count:
        name = _name(rng)
        if name not in names:
            names.append(name)

    return names


def _name(rng: random.Random) -> str:
    """Returns a name of one or two words, each invented or common."""
    common_words = words("common")
    layout = rng.random()

    # One or two words, invented or common: neither alone reveals an invented domain.
    if layout < 0.25:
        return invented_word(rng)
    if layout < 0.4:
        return f"{rng.choice(common_words)} {invented_word(rng)}"
    if layout < 0.65:
        return " ".join(rng.sample(common_words, 2))
    return rng.choice(common_words)
