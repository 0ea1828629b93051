"""Formulas of units, dates, texts and lists of numbers."""

import datetime

from dist_lm.chat.messages import Json
from dist_lm.tools.data.formula import Arguments, Formula

LENGTHS = {"meter": 1.0, "kilometer": 1000.0, "mile": 1609.344, "foot": 0.3048, "inch": 0.0254}
MASSES = {"gram": 1.0, "kilogram": 1000.0, "pound": 453.59237, "ounce": 28.349523125}
TIMES = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0, "week": 604800.0}
SPACES = {"kilobyte": 1.0, "megabyte": 1000.0, "gigabyte": 1e6, "terabyte": 1e9}


def _units(table: dict[str, float]) -> tuple[str, ...]:
    options = "/".join(table)
    return ("value decimal", f"from unit one_of {options}", f"to unit one_of {options}")


def _day(text: Json) -> datetime.date:
    return datetime.date.fromisoformat(text)


def _convert(table: dict[str, float], a: Arguments) -> float:
    return round(a["value"] * table[a["from unit"]] / table[a["to unit"]], 4)


def _temperature(a: Arguments) -> float:
    celsius = a["value"] if a["from unit"] == "celsius" else (a["value"] - 32) / 1.8
    return round(celsius if a["to unit"] == "celsius" else celsius * 1.8 + 32, 2)


WORDS = (
    Formula("length conversion", "units", "a length in another unit", _units(LENGTHS), lambda a: _convert(LENGTHS, a)),
    Formula("mass conversion", "units", "a mass in another unit", _units(MASSES), lambda a: _convert(MASSES, a)),
    Formula("time conversion", "units", "a time in another unit", _units(TIMES), lambda a: _convert(TIMES, a)),
    Formula(
        "storage conversion", "units", "a file size in another unit", _units(SPACES), lambda a: _convert(SPACES, a)
    ),
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
    Formula(
        "age in 2040",
        "dates",
        "the age that somebody reaches in 2040",
        ("birth year year",),
        lambda a: 2040 - a["birth year"],
    ),
    Formula("word count", "text", "the number of words of a text", ("text text",), lambda a: len(a["text"].split())),
    Formula("uppercase", "text", "a text in capital letters", ("text text",), lambda a: a["text"].upper()),
    Formula("reversed text", "text", "a text backwards", ("text word",), lambda a: a["text"][::-1]),
    Formula(
        "slug",
        "text",
        "the slug of a title",
        ("title title", "separator one_of dash/dot/plus?"),
        lambda a: {"dash": "-", "dot": ".", "plus": "+"}[a.get("separator", "dash")].join(a["title"].lower().split()),
    ),
    Formula(
        "initials",
        "text",
        "the initials of a name",
        ("full name person",),
        lambda a: "".join(part[0] for part in a["full name"].split()),
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
    Formula("largest", "statistics", "the largest of some numbers", ("numbers numbers",), lambda a: max(a["numbers"])),
    Formula(
        "spread",
        "statistics",
        "the range of some numbers",
        ("numbers numbers",),
        lambda a: max(a["numbers"]) - min(a["numbers"]),
    ),
    Formula(
        "sorted numbers",
        "statistics",
        "some numbers in order",
        ("numbers numbers", "descending flag?"),
        lambda a: sorted(a["numbers"], reverse=bool(a.get("descending"))),
    ),
    Formula(
        "version compare",
        "network",
        "the newer of two versions",
        ("first version version", "second version version"),
        lambda a: max(a["first version"], a["second version"], key=lambda v: [int(p) for p in v.split(".")]),
    ),
)
