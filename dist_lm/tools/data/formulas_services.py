"""Services: what a table somewhere would say. Values hang on the arguments alone."""

import hashlib

from dist_lm.chat.messages import Json
from dist_lm.tools.data.formula import Arguments, Formula

SKIES = ("sunny", "cloudy", "rain", "snow", "fog", "windy")


def _keyed(low: int, high: int, *parts: Json) -> int:
    """A number between `low` and `high` that hangs on `parts` alone: what a table somewhere would hold."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return low + int.from_bytes(digest, "big") % (high - low + 1)


def _weather(a: Arguments) -> Json:
    degrees = _keyed(-8, 36, "weather", a["city"], a.get("day"))
    if a["units"] == "imperial":
        degrees = round(degrees * 1.8 + 32)
    return {"temperature": degrees, "sky": SKIES[_keyed(0, 5, "sky", a["city"], a.get("day"))]}


SERVICES = (
    Formula(
        "exchange rate",
        "finance",
        "the exchange rate",
        ("base one_of EUR/USD/GBP/JPY/CHF", "target one_of EUR/USD/GBP/JPY/CHF"),
        lambda a: 1.0 if a["base"] == a["target"] else _keyed(50, 1900, "rate", a["base"], a["target"]) / 1000,
        "service",
    ),
    Formula(
        "stock quote",
        "finance",
        "the price of a stock",
        ("company company", "day date?"),
        lambda a: {"price": _keyed(500, 90000, "stock", a["company"], a.get("day")) / 100},
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
        "air quality",
        "places",
        "the air quality",
        ("city city",),
        lambda a: {"index": _keyed(5, 180, "air", a["city"])},
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
        "country short name",
        "places",
        "the short name of a country",
        ("country country",),
        lambda a: a["country"][:3].upper(),
        "service",
    ),
    Formula(
        "domain check",
        "network",
        "whether a host is up",
        ("host host", "port amount?"),
        lambda a: {"up": _keyed(0, 3, "up", a["host"], a.get("port")) > 0},
        "service",
    ),
    Formula(
        "link preview",
        "network",
        "the size of a page",
        ("link url",),
        lambda a: {"bytes": _keyed(900, 90000, "page", a["link"])},
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
        "phone carrier",
        "network",
        "the carrier of a phone number",
        ("phone phone",),
        lambda a: {"carrier": ("Telora", "Mobiva", "Linko")[_keyed(0, 2, "phone", a["phone"])]},
        "service",
    ),
    Formula(
        "parking spots",
        "city life",
        "the free parking spots",
        ("street word", "city city"),
        lambda a: {"free": _keyed(0, 80, "park", a["street"], a["city"])},
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
