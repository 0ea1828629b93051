"""What people and the assistant say: requests in many ways, their arguments in several notations, and answers."""

import json
import random
from collections.abc import Sequence

from dist_lm.chat.messages import Json
from dist_lm.tools.data.actions import BY_KEY
from dist_lm.tools.data.catalogue import Parameter, Specification, formula_of
from dist_lm.tools.data.formulas import VERBS
from dist_lm.tools.data.values import Value, plural_kind
from dist_lm.tools.data.words import article, plural, upper_first

Given = dict[Parameter, Value]

OPENINGS = (
    *("", "", "", "", "", "Please ", "Please ", "Can you ", "Could you ", "I need you to ", "Now ", "Hey, "),
    *("Hi, please ", "I would like you to ", "Go ahead and ", "Quickly ", "Next, ", "It is time to "),
)
ASIDES = (
    "I am back from lunch.",
    "Good morning.",
    "Sorry to bother you again.",
    "My boss wants this today.",
    "One more thing.",
    "This is for the new team.",
    "I forgot to do it yesterday.",
    "We talked about it this morning.",
)
PRONOUNS = ("it", "that")
PARTICLES = (" up", " over", " away")  # of verbs that take no `it` after them
CLAUSE_VERBS = ("tell me", "find out", "check", "I want to know")  # before `whether`
LINKS = ("with ", "for ", "in ", "on ", "at ", "to ", "of ", "saying ", "and ")
NEAR = {  # how a value is said without the argument's name, if no other argument is of its kind
    "person": ("for {}", "for {}"),
    "given": ("for {}",),
    "city": ("in {}", "in {}"),
    "country": ("in {}",),
    "date": ("on {}", "on {}", "for {}"),
    "clock": ("at {}",),
    "email": ("to {}",),
    "year": ("in {}",),
    "language": ("in {}",),
    "company": ("for {}", "at {}"),
    "title": (": {}", "with the text {}"),
    "text": (": {}", "saying {}"),
    "path": ("at {}",),
    "host": ("on {}",),
    "url": ("at {}",),
    "minutes": ("for {} minutes", "{} minutes long"),
    "percent": ("at {} percent",),
    "numbers": ("of {}", ": {}"),
    "size": ("of {}",),
}


def request(specification: Specification, given: Given, rng: random.Random) -> str:
    """A request for one call with the arguments `given`."""
    body, pieces = _body_and_pieces(specification, given, rng)
    question = body.startswith(("how ", "what ", "tell me", "I need", "I want", "I would"))
    opening = "" if question else rng.choice(OPENINGS)
    text = upper_first(opening + _joined(body, pieces, rng))
    text += "?" if question or opening in ("Can you ", "Could you ") else rng.choice([".", ".", ""])
    if rng.random() < 0.08:
        text = f"{rng.choice(ASIDES)} {text}"
    return text


def instruction(specification: Specification, given: Given, rng: random.Random, it: str = "") -> str:
    """The request as part of a longer sentence. `it`: the pronoun for a record that the sentence has named."""
    body, pieces = _body_and_pieces(specification, given, rng, it)
    return body + "".join(_linked(piece, " ") for piece in _anded(pieces))


def piece(parameter: Parameter, value: Value, alone: bool, rng: random.Random) -> str:
    """One argument in words. `alone`: no other argument is of its kind."""
    name, said, kind = parameter.name, value.said, parameter.kind
    if kind == "flag":
        on = rng.choice(["on", "yes", "true"]) if value.json else rng.choice(["off", "no", "false"])
        return rng.choice([f"{name}: {on}", f"with {name} {on}", f"{name} {on}", f"{name} = {on}"])
    if kind.startswith("one_of"):
        return rng.choice([f"with {name} {said}", f"{name} {said}", f"{name}: {said}", f"{name} = {said}"])
    if alone and kind in NEAR and rng.random() < 0.5:
        return rng.choice(NEAR[kind]).format(said)
    forms = [f"with {name} {said}", f"{name} {said}", f"{name}: {said}", f"with the {name} {said}", f"{name} = {said}"]
    if not plural_kind(kind):
        forms += [f"with {said} as the {name}", f"the {name} is {said}"]
    return rng.choice(forms)


def describe(specification: Specification, rng: random.Random) -> str:
    """What a tool does, without arguments: `cancel an order`."""
    if specification.family != "record":
        return f"{rng.choice(['find out', 'tell you'])} {formula_of(specification.action).said}"
    return _verb_and_thing(specification, article(specification.thing), rng)


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
    """The answer that puts a result in words."""
    thing = specification.thing
    if specification.family != "record":
        said = formula_of(specification.action).said
        if isinstance(result, dict):
            return f"Here is {said}: {facts(result)}." if rng.random() < 0.4 else upper_first(f"{facts(result)}.")
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
    return upper_first(done + closing)


def facts(result: dict[str, Json]) -> str:
    """`status paid, total 12`."""
    return ", ".join(f"{name.replace('_', ' ')} {shown(value)}" for name, value in result.items())


def question_back(missing: Sequence[Parameter], specification: Specification, rng: random.Random) -> str:
    """The question for arguments that a call still needs."""
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
    """The answer to a request that no tool serves."""
    return rng.choice(
        [
            "None of my tools can do that.",
            "I have no tool for that.",
            "Sorry, I cannot do that with the tools I have.",
        ]
    )


def _body_and_pieces(
    specification: Specification, given: Given, rng: random.Random, it: str = ""
) -> tuple[str, list[str]]:
    rest = [(parameter, value) for parameter, value in given.items() if parameter.kind != "record"]
    record = next((value for parameter, value in given.items() if parameter.kind == "record"), None)
    if specification.family != "record":
        said = formula_of(specification.action).said
        verbs = CLAUSE_VERBS if said.startswith(("whether ", "which ", "how ")) else VERBS[specification.family][1]
        body = f"{rng.choice(verbs)} {said}"
    elif it:
        body = _verb_and_thing(specification, it, rng)
    elif record is not None:
        body = _verb_and_thing(specification, _record(specification.thing, record.said, rng), rng)
    else:
        body = _verb_and_thing(specification, article(specification.thing), rng)
    kinds = [parameter.kind for parameter, _ in rest]
    return body, [piece(parameter, value, kinds.count(parameter.kind) == 1, rng) for parameter, value in rest]


def _record(thing: str, said: str, rng: random.Random) -> str:
    """`order AB-12` in words."""
    return rng.choice(
        [
            f"{thing} {said}",
            f"the {thing} {said}",
            f"{thing} number {said}",
            f"the {thing} with id {said}",
            f"the {thing} with the id {said}",
        ]
    )


def _verb_and_thing(specification: Specification, thing: str, rng: random.Random) -> str:
    action = BY_KEY[specification.action]
    said = [verb for verb in action.said if thing not in PRONOUNS or not verb.endswith(PARTICLES)]
    own = specification.verb
    verb = own if own in said and rng.random() < 0.5 else rng.choice(said)
    if specification.action == "count":
        return f"{verb} {plural(specification.thing)}{' are there' if verb == 'how many' else ''}"
    if specification.action == "search":
        return f"{verb} {rng.choice(['', 'all ', 'the '])}{plural(specification.thing)}"
    if specification.action == "newest":
        return f"{verb} {specification.thing}"
    return f"{verb} {thing}"


def _joined(body: str, pieces: list[str], rng: random.Random) -> str:
    """A sentence of a body and its arguments."""
    layout = rng.random()
    plain = [part.removeprefix("with ").removeprefix(": ") for part in pieces]
    if len(pieces) > 1 and layout < 0.12:
        return f"{body} ({', '.join(plain)})"
    if len(pieces) > 1 and layout < 0.24:
        return f"{body}: {'; '.join(plain)}"
    if pieces and layout < 0.3:
        return body + "".join(f"\n- {part}" for part in plain)
    between = rng.choice([" ", ", ", " and "])
    return body + "".join(_linked(part, between if number else " ") for number, part in enumerate(pieces))


def _linked(part: str, between: str) -> str:
    """An argument with its separator: a space alone only before a word such as `with`, else a comma."""
    if part.startswith(":"):
        return part
    return (", " if between == " " and not part.startswith(LINKS) else between) + part


def _anded(pieces: list[str]) -> list[str]:
    return [*pieces[:1], *(part if part.startswith(":") else f"and {part}" for part in pieces[1:])]
