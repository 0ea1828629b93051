"""Formulas of geometry, fitness, money and physics."""

import math

from dist_lm.tools.data.formula import Arguments, Formula


def _loan(a: Arguments) -> float:
    """The annuity of a loan, monthly."""
    months, rate = a["years"] * 12, a["yearly rate"] / 1200
    return round(a["amount"] * rate / (1 - (1 + rate) ** -months), 2)


NUMBERS = (
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
        "cylinder volume",
        "geometry",
        "the volume of a cylinder",
        ("radius decimal", "height decimal"),
        lambda a: round(math.pi * a["radius"] ** 2 * a["height"], 2),
    ),
    Formula(
        "triangle area",
        "geometry",
        "the area of a triangle",
        ("base amount", "height amount"),
        lambda a: a["base"] * a["height"] / 2,
    ),
    Formula(
        "hypotenuse",
        "geometry",
        "the hypotenuse of a right triangle",
        ("first leg amount", "second leg amount"),
        lambda a: round(math.hypot(a["first leg"], a["second leg"]), 2),
    ),
    Formula(
        "polygon angle",
        "geometry",
        "the inner angle of a regular polygon",
        ("sides sides",),
        lambda a: round(180 - 360 / a["sides"], 2),
    ),
    Formula(
        "body mass index",
        "fitness",
        "the body mass index",
        ("kilograms kilograms", "centimeters centimeters"),
        lambda a: round(a["kilograms"] / (a["centimeters"] / 100) ** 2, 1),
    ),
    Formula(
        "calories burned",
        "fitness",
        "the calories burned",
        ("sport one_of running/cycling/rowing/yoga", "minutes minutes"),
        lambda a: a["minutes"] * {"running": 11, "cycling": 8, "rowing": 9, "yoga": 4}[a["sport"]],
    ),
    Formula(
        "running pace",
        "fitness",
        "the pace of a run",
        ("kilometers few", "minutes minutes"),
        lambda a: round(a["minutes"] / a["kilometers"], 2),
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
        "discount price",
        "finance",
        "the price after a discount",
        ("price money", "discount percent"),
        lambda a: round(a["price"] * (1 - a["discount"] / 100), 2),
    ),
    Formula(
        "sales tax",
        "finance",
        "the sales tax",
        ("net price money", "tax rate percent"),
        lambda a: round(a["net price"] * a["tax rate"] / 100, 2),
    ),
    Formula(
        "profit margin",
        "finance",
        "the profit margin",
        ("revenue amount", "cost amount"),
        lambda a: round(100 * (a["revenue"] - a["cost"]) / a["revenue"], 1),
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
    Formula(
        "ohm voltage",
        "physics",
        "the voltage across a resistor",
        ("current few", "resistance amount"),
        lambda a: a["current"] * a["resistance"],
    ),
    Formula(
        "average speed",
        "physics",
        "the average speed",
        ("distance amount", "hours few"),
        lambda a: round(a["distance"] / a["hours"], 2),
    ),
    Formula(
        "force",
        "physics",
        "the force on a body",
        ("mass amount", "acceleration decimal"),
        lambda a: round(a["mass"] * a["acceleration"], 2),
    ),
    Formula(
        "density",
        "physics",
        "the density of a body",
        ("mass amount", "volume few"),
        lambda a: round(a["mass"] / a["volume"], 2),
    ),
)
