"""Kinds of arguments: the JSON schema of each, and values from sets so large that no model learns them by heart.

A value has two forms: a date may be `3 May 2024` in a request and is `2024-05-03` in the call.
"""

import datetime
import random
from collections.abc import Callable
from dataclasses import dataclass

from dist_lm.chat.messages import Json
from dist_lm.tools.data.words import upper_first, words

MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August"),
    *("September", "October", "November", "December"),
)
SMALL_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
HOSTS = ("com", "org", "net", "io", "dev")


@dataclass(frozen=True)
class Value:
    """The value of an argument in the call, and its wording in a request."""

    json: Json
    wording: str


Draw = Callable[[random.Random], Value]


def schema_of(kind: str) -> dict[str, Json]:
    """Returns the JSON schema of values of `kind` (without description and default)."""
    name, _, options = kind.partition(" ")
    if name == "one_of":
        return {"type": "string", "enum": options.split("/")}
    return dict(_KINDS[name][0])


def draw(kind: str, rng: random.Random) -> Value:
    """Returns a random value of `kind`."""
    name, _, options = kind.partition(" ")
    if name == "one_of":
        option = rng.choice(options.split("/"))
        return Value(option, option)
    return _KINDS[name][1](rng)


def plural_kind(kind: str) -> bool:
    """Returns whether values are lists or objects, which a request spells out after the argument's name."""
    return kind in ("words", "people", "codes", "numbers", "address", "size")


def quoted(text: str, rng: random.Random) -> str:
    """Returns `text` in double or single quotes, as in a request."""
    mark = "'" if rng.random() < 0.3 and "'" not in text else '"'
    return f"{mark}{text}{mark}"


def sometimes_quoted(text: str, rng: random.Random, share: float = 0.3) -> Value:
    """Returns the value `text`, which a request has in quotes with the probability `share`."""
    wording = text
    if rng.random() < share:
        wording = quoted(text, rng)
    return Value(text, wording)


def made_up_name(rng: random.Random) -> str:
    """Returns a made-up name."""
    return "".join(rng.choice(words("syllable")) for _ in range(rng.randint(2, 3))).capitalize()


def phrase(rng: random.Random) -> str:
    """Returns a few words, such as a title."""
    noun, second_noun = rng.sample(words("noun"), 2)
    adjective = rng.choice(words("adjective"))
    verb = rng.choice(words("verb"))
    return rng.choice(
        [
            f"{adjective} {noun}",
            f"{noun} {second_noun}",
            f"{adjective} {noun} {second_noun}",
            f"{verb} the {noun}",
            f"{verb} the {adjective} {noun}",
            f"{noun} of the {second_noun}",
            f"{noun} {rng.randint(1, 999)}",
        ]
    )


def sentence(rng: random.Random) -> str:
    """Returns some words of free text, such as a note. They have no grammar, so a model can only copy them."""
    pools = [words("noun"), words("common"), words("verb"), words("common"), words("city"), words("given")]
    return " ".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(3, 9)))


def code(rng: random.Random) -> str:
    """Returns the id of a record, such as `AB-4821`."""
    letters = "".join(rng.choice(CODE_LETTERS) for _ in range(rng.randint(1, 3)))
    digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
    return rng.choice([f"{letters}-{digits}", f"{letters}{digits}", f"{letters.lower()}_{digits}"])


def _listed_or_made_up(name: str, share: float, rng: random.Random) -> str:
    """Returns a word of the list `name` with the probability `share`, else a made-up one, which no model knows."""
    if rng.random() < share:
        return rng.choice(words(name))
    return made_up_name(rng)


def _person(rng: random.Random) -> Value:
    given_name = _listed_or_made_up("given", 0.8, rng)
    return sometimes_quoted(f"{given_name} {_listed_or_made_up('family', 0.7, rng)}", rng)


def _company(rng: random.Random) -> Value:
    return sometimes_quoted(f"{made_up_name(rng)} {rng.choice(words('suffix'))}", rng)


def _product(rng: random.Random) -> Value:
    # Without quotes, a reader can hardly tell where the name of a product ends.
    return sometimes_quoted(f"{rng.choice(words('adjective'))} {rng.choice(words('noun'))}", rng, 0.7)


def _title(rng: random.Random) -> Value:
    text = phrase(rng)
    if rng.random() < 0.4:
        text = text.capitalize()
    return Value(text, quoted(text, rng))


def _text(rng: random.Random) -> Value:
    text = sentence(rng) if rng.random() < 0.7 else phrase(rng)
    if rng.random() < 0.3:
        text = upper_first(text) + rng.choice(["", ".", "!"])
    return Value(text, quoted(text, rng))


def _word(rng: random.Random) -> Value:
    return sometimes_quoted(_listed_or_made_up("common", 0.7, rng).lower(), rng, 0.5)


def _code(rng: random.Random) -> Value:
    return sometimes_quoted(code(rng), rng, 0.25)


def _email(rng: random.Random) -> Value:
    user = _listed_or_made_up("given", 0.6, rng).lower()
    user += rng.choice(["", "", f".{rng.choice(words('family')).lower()}", str(rng.randint(1, 99))])
    return _verbatim(f"{user}@{_domain(rng)}")


def _domain(rng: random.Random) -> str:
    return f"{_listed_or_made_up('noun', 0.5, rng).lower()}.{rng.choice(HOSTS)}"


def _handle(rng: random.Random) -> Value:
    name = f"{rng.choice(words('noun'))}_{rng.choice(words('noun'))}"
    return _verbatim(name + rng.choice(["", str(rng.randint(1, 999))]))


def _host(rng: random.Random) -> Value:
    if rng.random() < 0.5:
        return _verbatim(".".join(str(rng.randint(1, 254)) for _ in range(4)))
    return _verbatim(f"{rng.choice(words('noun'))}{rng.randint(1, 99)}.{_domain(rng)}")


def _url(rng: random.Random) -> Value:
    page = f"https://{_domain(rng)}/{rng.choice(words('noun'))}"
    return _verbatim(page + rng.choice(["", f"/{rng.randint(1, 9999)}"]))


def _path(rng: random.Random) -> Value:
    parts = [rng.choice(words("noun")) for _ in range(rng.randint(1, 3))]
    return _verbatim(f"/{'/'.join(parts)}{rng.choice(['', f'_{rng.randint(1, 99)}', '.txt', '.csv'])}")


def _phone(rng: random.Random) -> Value:
    return _verbatim(f"+{rng.randint(1, 98)} {rng.randint(100, 999)} {rng.randint(1000, 99999)}")


def _version(rng: random.Random) -> Value:
    return _verbatim(f"{rng.randint(0, 12)}.{rng.randint(0, 30)}.{rng.randint(0, 30)}")


def _date(rng: random.Random) -> Value:
    """Returns a day of 2019 to 2027, `YYYY-MM-DD` in the call and sometimes in words in the request."""
    day = datetime.date(2019, 1, 1) + datetime.timedelta(days=rng.randrange(365 * 9))
    # A model must also learn to rewrite a date as the schema wants it.
    wording = day.isoformat()
    if rng.random() < 0.25:
        month = MONTHS[day.month - 1]
        wording = rng.choice([f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}"])
    return Value(day.isoformat(), wording)


def _clock(rng: random.Random) -> Value:
    return _verbatim(f"{rng.randrange(24):02}:{rng.choice([0, 0, 15, 30, 45, rng.randrange(60)]):02}")


def _integer(low: int, high: int, rng: random.Random) -> Value:
    number = rng.randint(low, high)
    # Requests sometimes spell out small numbers.
    if number <= 10 and rng.random() < 0.15:
        return Value(number, SMALL_NUMBERS[number])
    return Value(number, str(number))


def _decimal(rng: random.Random) -> Value:
    # A third of the numbers is below 10, since people mostly name small ones.
    number = round(rng.uniform(0.1, rng.choice([10, 100, 500])), rng.choice([1, 1, 2]))
    return Value(number, str(number))


def _money(rng: random.Random) -> Value:
    number = rng.choice([rng.randint(5, 999), rng.randint(10, 99) * 100, round(rng.uniform(1, 900), 2)])
    return Value(number, str(number))


def _enumeration(texts: list[str], rng: random.Random) -> str:
    """Returns the texts of a list as a request enumerates them."""
    if rng.random() < 0.4:
        return ", ".join(f'"{text}"' for text in texts)
    if len(texts) > 1 and rng.random() < 0.5:
        return ", ".join(texts[:-1]) + f" and {texts[-1]}"
    return ", ".join(texts)


def _numbers(rng: random.Random) -> Value:
    high = rng.choice([20, 100, 1000])
    numbers = [rng.randint(1, high) for _ in range(rng.randint(3, 8))]
    return Value(numbers, ", ".join(map(str, numbers)))


def _codes(rng: random.Random) -> Value:
    codes = [code(rng) for _ in range(rng.randint(2, 6))]
    return Value(codes, _enumeration(codes, rng))


def _address(rng: random.Random) -> Value:
    street = f"{rng.randint(1, 250)} {rng.choice(words('street'))}"
    city = rng.choice(words("city"))
    return Value({"street": street, "city": city}, f"{street}, {city}")


def _size(rng: random.Random) -> Value:
    numbers = [rng.randint(2, 200) for _ in range(3)]
    return Value(dict(zip(("length", "width", "height"), numbers, strict=True)), "{} x {} x {}".format(*numbers))


def _mostly_known(name: str, share: float) -> Draw:
    return lambda rng: sometimes_quoted(_listed_or_made_up(name, share, rng), rng)


def _sample_of(name: str) -> Draw:
    def drawn(rng: random.Random) -> Value:
        texts = rng.sample(words(name), rng.randint(1, 3))
        return Value(texts, _enumeration(texts, rng))

    return drawn


def _from_list(name: str) -> Draw:
    return lambda rng: sometimes_quoted(rng.choice(words(name)), rng)


def _in_range(low: int, high: int) -> Draw:
    return lambda rng: _integer(low, high, rng)


def _flag(rng: random.Random) -> Value:
    is_set = rng.random() < 0.6
    return Value(is_set, "yes" if is_set else "no")


def _verbatim(text: str) -> Value:
    return Value(text, text)


# JSON schemas and drawing functions of all kinds but `one_of`.

_STRING: dict[str, Json] = {"type": "string"}
_WHOLE: dict[str, Json] = {"type": "integer"}
_NUMBER: dict[str, Json] = {"type": "number"}
_KINDS: dict[str, tuple[dict[str, Json], Draw]] = {
    "person": (_STRING, _person),
    "given": (_STRING, _mostly_known("given", 0.6)),
    "city": (_STRING, _mostly_known("city", 0.8)),
    "country": (_STRING, _from_list("country")),
    "language": (_STRING, _from_list("language")),
    "company": (_STRING, _company),
    "product": (_STRING, _product),
    "title": (_STRING, _title),
    "text": (_STRING, _text),
    "word": (_STRING, _word),
    "code": (_STRING, _code),
    "email": (_STRING, _email),
    "handle": (_STRING, _handle),
    "host": (_STRING, _host),
    "url": (_STRING, _url),
    "path": (_STRING, _path),
    "phone": (_STRING, _phone),
    "version": (_STRING, _version),
    "date": ({"type": "string", "format": "date"}, _date),
    "record": (_STRING, _code),
    "clock": (_STRING, _clock),
    "kilograms": (_WHOLE, _in_range(38, 140)),
    "centimeters": (_WHOLE, _in_range(120, 210)),
    "few": (_WHOLE, _in_range(1, 12)),
    "amount": (_WHOLE, _in_range(2, 5000)),
    "minutes": (_WHOLE, lambda rng: _integer(1, 48, rng) if rng.random() < 0.3 else _integer(10, 240, rng)),
    "percent": (_WHOLE, _in_range(1, 100)),
    "rating": (_WHOLE, _in_range(1, 5)),
    "year": (_WHOLE, _in_range(1950, 2030)),
    "decimal": (_NUMBER, _decimal),
    "money": (_NUMBER, _money),
    "flag": ({"type": "boolean"}, _flag),
    "words": ({"type": "array", "items": {"type": "string"}}, _sample_of("common")),
    "people": ({"type": "array", "items": {"type": "string"}}, _sample_of("given")),
    "codes": ({"type": "array", "items": {"type": "string"}}, _codes),
    "numbers": ({"type": "array", "items": {"type": "number"}}, _numbers),
    "address": (
        {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
            "required": ["street", "city"],
        },
        _address,
    ),
    "size": (
        {
            "type": "object",
            "properties": {"length": _WHOLE, "width": _WHOLE, "height": _WHOLE},
            "required": ["length", "width", "height"],
        },
        _size,
    ),
}
