"""Tools that compute: formulas, and services whose answers a hash determines, in place of a table.

The results in conversations are what these functions return for the arguments of the call.
"""

import datetime
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

from dist_lm.chat.messages import Json

Arguments = dict[str, Json]
LENGTHS = {"meter": 1.0, "kilometer": 1000.0, "mile": 1609.344, "foot": 0.3048, "inch": 0.0254}
SKIES = ("sunny", "cloudy", "rain", "snow", "fog", "windy")
VERBS = {
    "formula": (("calculate", "compute", "work out"), ("calculate", "work out", "compute", "tell me", "I need")),
    "service": (("check", "lookup", "query"), ("tell me", "check", "look up", "what is", "I want to know")),
}  # family -> (verbs in names of tools, verbs in requests)


@dataclass(frozen=True)
class Formula:
    """A tool that computes a figure from its arguments."""

    key: str
    domain: str
    phrase: str  # in requests: `the area of a circle`
    takes: tuple[str, ...]  # arguments as `name kind`; `?` marks an optional one
    run: Callable[[Arguments], Json]  # arguments by their names in words -> result
    family: str = "formula"


def _loan(a: Arguments) -> float:
    """Returns the monthly payment of a loan with equal payments."""
    months, rate = a["years"] * 12, a["yearly rate"] / 1200
    return round(a["amount"] * rate / (1 - (1 + rate) ** -months), 2)


def _units(table: dict[str, float]) -> tuple[str, ...]:
    options = "/".join(table)
    return ("value decimal", f"from unit one_of {options}", f"to unit one_of {options}")


def _day(text: Json) -> datetime.date:
    return datetime.date.fromisoformat(text)


def _convert(table: dict[str, float], a: Arguments) -> float:
    return round(a["value"] * table[a["from unit"]] / table[a["to unit"]], 4)


def _temperature(a: Arguments) -> float:
    # Both conversions go through Celsius, so a value in Fahrenheit comes back through it too.
    celsius = a["value"]
    if a["from unit"] == "fahrenheit":
        celsius = (celsius - 32) / 1.8
    if a["to unit"] == "celsius":
        return round(celsius, 2)
    return round(celsius * 1.8 + 32, 2)


def _keyed(low: int, high: int, *parts: Json) -> int:
    """Returns a number from `low` to `high` that depends on `parts` alone, in place of a table."""
    # Python's own hash of strings differs between processes.
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return low + int.from_bytes(digest, "big") % (high - low + 1)


def _weather(a: Arguments) -> Json:
    degrees = _keyed(-8, 36, "weather", a["city"], a.get("day"))
    if a["units"] == "imperial":
        degrees = round(degrees * 1.8 + 32)
    return {"temperature": degrees, "sky": SKIES[_keyed(0, 5, "sky", a["city"], a.get("day"))]}


FORMULAS = (
    Formula(
        "circle area",
        "geometry",
        "the area of a circle",
        ("radius decimal",),
        lambda a: round(math.pi * a["radius"] ** 2, 2),
    ),
    Formula(
        "rectangle area",
        "geometry",
        "the area of a rectangle",
        ("width decimal", "height decimal"),
        lambda a: round(a["width"] * a["height"], 2),
    ),
    Formula("box volume", "geometry", "the volume of a box", ("size size",), lambda a: math.prod(a["size"].values())),
    Formula(
        "hypotenuse",
        "geometry",
        "the hypotenuse of a right triangle",
        ("first leg amount", "second leg amount"),
        lambda a: round(math.hypot(a["first leg"], a["second leg"]), 2),
    ),
    Formula(
        "body mass index",
        "fitness",
        "the body mass index",
        ("kilograms kilograms", "centimeters centimeters"),
        lambda a: round(a["kilograms"] / (a["centimeters"] / 100) ** 2, 1),
    ),
    Formula(
        "loan payment",
        "finance",
        "the monthly payment of a loan",
        ("amount amount", "yearly rate rating", "years few"),
        _loan,
    ),
    Formula(
        "compound interest",
        "finance",
        "the value of savings with compound interest",
        ("principal money", "rate rating", "years few"),
        lambda a: round(a["principal"] * (1 + a["rate"] / 100) ** a["years"], 2),
    ),
    Formula(
        "tip",
        "finance",
        "the tip",
        ("bill money", "percent percent"),
        lambda a: round(a["bill"] * a["percent"] / 100, 2),
    ),
    Formula(
        "split bill",
        "finance",
        "the share of each guest of a bill",
        ("total money", "guests few", "tip percent percent?"),
        lambda a: round(a["total"] * (1 + a.get("tip percent", 0) / 100) / a["guests"], 2),
    ),
    Formula(
        "kinetic energy",
        "physics",
        "the kinetic energy",
        ("mass amount", "speed percent"),
        lambda a: a["mass"] * a["speed"] ** 2 / 2,
    ),
    Formula("length conversion", "units", "a length in another unit", _units(LENGTHS), lambda a: _convert(LENGTHS, a)),
    Formula(
        "temperature conversion",
        "units",
        "a temperature in another unit",
        ("value amount", "from unit one_of celsius/fahrenheit", "to unit one_of celsius/fahrenheit"),
        _temperature,
    ),
    Formula(
        "days between",
        "dates",
        "the days between two dates",
        ("first day date", "second day date"),
        lambda a: abs((_day(a["second day"]) - _day(a["first day"])).days),
    ),
    Formula(
        "date plus days",
        "dates",
        "the date some days later",
        ("start date", "days amount"),
        lambda a: (_day(a["start"]) + datetime.timedelta(days=a["days"])).isoformat(),
    ),
    Formula("weekday", "dates", "the day of the week", ("date date",), lambda a: _day(a["date"]).strftime("%A")),
    Formula(
        "leap year",
        "dates",
        "whether a year is a leap year",
        ("year year",),
        lambda a: a["year"] % 4 == 0 and (a["year"] % 100 != 0 or a["year"] % 400 == 0),
    ),
    Formula("word count", "text", "the number of words of a text", ("text text",), lambda a: len(a["text"].split())),
    Formula("reversed text", "text", "a text backwards", ("text word",), lambda a: a["text"][::-1]),
    Formula(
        "slug",
        "text",
        "the slug of a title",
        ("title title", "separator one_of dash/dot/plus?"),
        lambda a: {"dash": "-", "dot": ".", "plus": "+"}[a.get("separator", "dash")].join(a["title"].lower().split()),
    ),
    Formula(
        "character count",
        "text",
        "the number of characters of a text",
        ("text text", "ignore spaces flag?"),
        lambda a: len(a["text"].replace(" ", "") if a.get("ignore spaces") else a["text"]),
    ),
    Formula(
        "mean",
        "statistics",
        "the mean of some numbers",
        ("numbers numbers",),
        lambda a: round(sum(a["numbers"]) / len(a["numbers"]), 2),
    ),
    Formula("sum", "statistics", "the sum of some numbers", ("numbers numbers",), lambda a: sum(a["numbers"])),
    Formula(
        "sorted numbers",
        "statistics",
        "some numbers in order",
        ("numbers numbers", "descending flag?"),
        lambda a: sorted(a["numbers"], reverse=bool(a.get("descending"))),
    ),
    Formula(
        "exchange rate",
        "finance",
        "the exchange rate",
        ("base one_of EUR/USD/GBP/JPY/CHF", "target one_of EUR/USD/GBP/JPY/CHF"),
        lambda a: 1.0 if a["base"] == a["target"] else _keyed(50, 1900, "rate", a["base"], a["target"]) / 1000,
        "service",
    ),
    Formula(
        "weather",
        "places",
        "the weather",
        ("city city", "units one_of metric/imperial?", "day date?"),
        _weather,
        "service",
    ),
    Formula(
        "population",
        "places",
        "the population",
        ("city city", "year year?"),
        lambda a: _keyed(20, 9000, "population", a["city"], a.get("year")) * 1000,
        "service",
    ),
    Formula(
        "travel distance",
        "places",
        "the distance by road",
        ("from city city", "to city city"),
        lambda a: {"kilometers": _keyed(20, 2500, "road", *sorted([a["from city"], a["to city"]]))},
        "service",
    ),
    Formula(
        "sunrise",
        "places",
        "the time of sunrise",
        ("city city", "date date"),
        lambda a: f"0{_keyed(4, 8, 'sun', a['city'], a['date'])}:{_keyed(10, 59, 'min', a['city'], a['date'])}",
        "service",
    ),
    Formula(
        "traffic",
        "places",
        "the traffic",
        ("city city", "time clock"),
        lambda a: {"delay": _keyed(0, 55, "traffic", a["city"], a["time"])},
        "service",
    ),
    Formula(
        "email check",
        "network",
        "whether an email address is valid",
        ("email email",),
        lambda a: {"valid": _keyed(0, 3, "mail", a["email"]) > 0},
        "service",
    ),
    Formula(
        "bus departure",
        "city life",
        "the next bus",
        ("line few", "stop company", "after clock?"),
        lambda a: {"minutes": _keyed(1, 40, "bus", a["line"], a["stop"], a.get("after"))},
        "service",
    ),
    Formula(
        "opening hours",
        "city life",
        "the opening hours",
        ("place company", "day one_of monday/friday/saturday/sunday"),
        lambda a: {
            "opens": _keyed(6, 11, "open", a["place"], a["day"]),
            "closes": _keyed(15, 23, "close", a["place"], a["day"]),
        },
        "service",
    ),
    Formula(
        "ticket price",
        "city life",
        "the price of a ticket",
        ("show title", "seats few", "category one_of stalls/balcony/box?"),
        lambda a: {"total": a["seats"] * _keyed(12, 90, "show", a["show"], a.get("category"))},
        "service",
    ),
)
