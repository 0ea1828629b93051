"""What the assistant says: results in words, questions back, and that no tool fits."""

import json
import random
from collections.abc import Sequence

from dist_lm.chat.messages import Json
from dist_lm.tools.data.catalogue import formula_of
from dist_lm.tools.data.naming import plural
from dist_lm.tools.data.specification import Parameter, Specification


def shown(value: Json) -> str:
    """A value in words; numbers and texts as the result has them."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(shown, value)) if value else "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def answer(specification: Specification, record_id: str | None, result: Json, rng: random.Random) -> str:
    """What a result says to the one who asked."""
    thing = specification.thing
    if specification.family != "record":
        said = formula_of(specification.action).said
        if isinstance(result, dict):
            return f"Here is {said}: {facts(result)}." if rng.random() < 0.4 else _upper(f"{facts(result)}.")
        return rng.choice([f"The answer is {shown(result)}.", f"It is {shown(result)}.", f"{shown(result)}."])
    action = specification.action
    if action == "create":
        return rng.choice(["The new {} has the id {}.", "Done: {} {}.", "Created {} {}."]).format(thing, result["id"])
    if action == "lookup":
        return f"{thing.capitalize()} {record_id}: {facts(result)}."
    if action == "search":
        ids = result["ids"]
        if not ids:
            return f"There are no such {plural(thing)}."
        return rng.choice(["Found {}: {}.", "{} found: {}."]).format(
            thing if len(ids) == 1 else plural(thing), shown(ids)
        )
    if action == "newest":
        return f"The latest {thing} is {result['id']}."
    if action == "count":
        return rng.choice(["The count is {}.", "There are {}.", "I found {}."]).format(result["count"])
    rest = {name: value for name, value in result.items() if name not in ("id", "deleted")}
    closing = f": {facts(rest)}." if rest and rng.random() < 0.6 else "."
    done = rng.choice(["Done with {} {}", "{} {} is done", "Ready: {} {}"]).format(thing, record_id)
    return _upper(done + closing)


def facts(result: dict[str, Json]) -> str:
    """`status paid, total 12`."""
    return ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in result.items())


def question_back(missing: Sequence[Parameter], specification: Specification, rng: random.Random) -> str:
    """The question for what a call still needs."""
    names = " and the ".join(parameter.name for parameter in missing)
    return rng.choice(
        [
            f"What is the {names}?",
            f"Which {names}?" if len(missing) == 1 else f"Please tell me the {names}.",
            f"I need the {names} for that.",
            f"Please give me the {names}.",
        ]
    )


def nothing_fits(rng: random.Random) -> str:
    """That none of the tools does what is asked."""
    return rng.choice(
        [
            "None of my tools can do that.",
            "I have no tool for that.",
            "Sorry, I cannot do that with the tools I have.",
        ]
    )


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]
