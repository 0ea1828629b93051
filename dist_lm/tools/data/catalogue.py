"""All tools: actions on the things of 24 domains, and formulas; each in several variants.

A tool is a pure function of its topic and its variant. Its shelf depends on the topic alone (not on the style of the
name, nor on the verb), and a conversation takes all its tools from one shelf.
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

from dist_lm.chat.messages import Json, Tool
from dist_lm.tools.data.actions import ACTIONS, BY_KEY, Action
from dist_lm.tools.data.formulas import FORMULAS, VERBS, Formula
from dist_lm.tools.data.invented import PREFIX, invented_domain, invented_formulas, is_invented
from dist_lm.tools.data.values import Value, schema_of
from dist_lm.tools.data.words import STYLE_WEIGHTS, STYLES, argument_name, article, domains, plural, tool_name

SHELVES = 40  # val_fraction=0.05 holds out two
INVENTED = 10_000  # invented domains a shelf
VARIANTS = 8  # a topic: they differ in names, arguments and descriptions
DEFAULTS = {"flag": False, "few": 1}
LONG = ("address", "size", "words", "people", "codes", "numbers", "title", "text")  # kinds that no search takes
HINTS = {
    "date": ("YYYY-MM-DD", "the day, as YYYY-MM-DD"),
    "clock": ("HH:MM", "24 hours, HH:MM"),
    "minutes": ("in minutes",),
    "percent": ("in percent", "0 to 100"),
    "money": ("the sum", "without currency"),
    "email": ("an address", "where to send it"),
    "words": ("a list of words", "one or more words"),
    "title": ("free text", "a short text"),
    "text": ("free text", "what it says"),
}


@dataclass(frozen=True)
class Parameter:
    """One argument."""

    name: str  # in words: `due date`
    key: str  # in calls: `due_date`
    kind: str  # of values.py
    required: bool = True
    default: Json = None
    description: str = ""
    inside: str = ""  # key of the object that holds the argument; "": none

    @property
    def schema(self) -> dict[str, Json]:
        """Its JSON schema."""
        schema = schema_of(self.kind)
        if self.description:
            schema["description"] = self.description
        if self.default is not None:
            schema["default"] = self.default
        return schema


@dataclass(frozen=True)
class Specification:
    """A tool as the generator knows it: its schema, and how requests may speak of it."""

    tool: Tool
    family: str  # record | formula | service
    domain: str
    action: str  # create, search, ...; the key of a formula or service
    thing: str  # the subject in words
    verb: str  # in the name
    style: str
    parameters: tuple[Parameter, ...]
    shelf: int  # decides between train and val

    @property
    def id_parameter(self) -> Parameter | None:
        """The argument that names a record."""
        return next((parameter for parameter in self.parameters if parameter.kind == "record"), None)


@dataclass(frozen=True)
class Topic:
    """The subject of a tool."""

    domain: str
    thing: str
    action: str  # a key of actions.py, or of a formula
    family: str


def specification(topic: Topic, variant: int) -> Specification:
    """Variant `variant` of the tool of `topic`."""
    rng = random.Random(f"tool {topic.domain} {topic.thing} {topic.action} {variant}")  # noqa: S311  (no secrets)
    style = rng.choices(STYLES, STYLE_WEIGHTS)[0]
    if topic.family == "record":
        action = BY_KEY[topic.action]
        verb = rng.choice(action.verbs)
        parameters = _record_parameters(topic, action, style, rng)
        description = rng.choice(action.descriptions).format(
            a=article(topic.thing), the=topic.thing, all=plural(topic.thing)
        )
        thing = plural(topic.thing) if topic.action in ("search", "count") else topic.thing
    else:
        formula = formula_of(topic.action)
        verb = rng.choice(VERBS[topic.family][0])
        parameters = tuple(_parameter(text, style, rng) for text in formula.takes)
        description = f"{verb.capitalize()} {formula.said}"
        thing = topic.thing
    name = tool_name(verb, thing, style)
    tool = Tool(name, description, schema_with(parameters))
    return Specification(
        tool, topic.family, topic.domain, topic.action, topic.thing, verb, style, parameters, shelf_of(topic)
    )


def shelf_of(topic: Topic) -> int:
    """The shelf of a topic: one for every thing and circle of actions, one for every formula."""
    if is_invented(topic.domain):
        return int(topic.domain.removeprefix(PREFIX)) % SHELVES
    circle = BY_KEY[topic.action].circle if topic.family == "record" else 0
    digest = hashlib.blake2b(f"{topic.thing} {circle}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % SHELVES


def group_of(shelf: int) -> str:
    """The hash by which a corpus splits: as a fraction of 2**64 it is (shelf + 0.2) / SHELVES.

    So a val_fraction of 1 or 2 % holds out one shelf, and 5 % hold out two.
    """
    return f"{(5 * shelf + 1) * 2**64 // (5 * SHELVES):016x}"


@cache
def shelf_topics(shelf: int) -> tuple[Topic, ...]:
    """The topics of a shelf, in a fixed order."""
    return tuple(topic for topic in topics() if shelf_of(topic) == shelf)


def invented_topics(shelf: int, rng: random.Random) -> tuple[Topic, ...]:
    """The topics of one invented domain of a shelf."""
    domain = f"{PREFIX}{shelf + SHELVES * rng.randrange(INVENTED)}"
    things, formulas = invented_domain(domain)[0], invented_formulas(domain)
    records = (Topic(domain, thing, action.key, "record") for thing in things for action in ACTIONS)
    return (*records, *(Topic(domain, name_of(formula), formula.key, formula.family) for formula in formulas))


@cache
def topics() -> tuple[Topic, ...]:
    """All topics."""
    records = [
        Topic(domain, thing, action.key, "record")
        for domain, (things, _) in domains().items()
        for thing in things
        for action in ACTIONS
    ]
    return (*records, *(Topic(formula.domain, formula.key, formula.key, formula.family) for formula in FORMULAS))


@cache
def formula_of(key: str) -> Formula:
    """The formula with this key."""
    if is_invented(key):
        return next(one for one in invented_formulas(key.partition(" formula ")[0]) if one.key == key)
    return next(formula for formula in FORMULAS if formula.key == key)


def name_of(formula: Formula) -> str:
    """The words of a tool's name, from what is computed: `the area of a circle` is `circle area`."""
    what, of, whose = formula.said.removeprefix("the ").partition(" of ")
    return f"{whose.partition(' ')[2]} {what}" if of else what


def fields_of(domain: str) -> tuple[tuple[str, str], ...]:
    """`(name, kind)` of the fields of a record of `domain`."""
    return (invented_domain(domain) if is_invented(domain) else domains()[domain])[1]


def schema_with(parameters: tuple[Parameter, ...]) -> dict[str, Json]:
    """The JSON schema of the arguments of a tool."""
    properties: dict[str, Json] = {}
    required: list[str] = []
    for parameter in parameters:
        if not parameter.inside:
            properties[parameter.key] = parameter.schema
            required += [parameter.key] * parameter.required
        else:
            if parameter.inside not in properties:
                properties[parameter.inside] = {"type": "object", "properties": {}, "required": []}
                required.append(parameter.inside)
            inner = properties[parameter.inside]
            inner["properties"][parameter.key] = parameter.schema
            inner["required"] += [parameter.key] * parameter.required
    return {"type": "object", "properties": properties, "required": required}


def arguments_of(parameters: tuple[Parameter, ...], given: Mapping[Parameter, Value]) -> dict[str, Json]:
    """The arguments of a call: those of `parameters` that are given, in their order."""
    found: dict[str, Json] = {}
    for parameter in parameters:
        if parameter in given:
            place = found.setdefault(parameter.inside, {}) if parameter.inside else found
            place[parameter.key] = given[parameter].json
    return found


def values_of(specification: Specification, arguments: dict[str, Json]) -> dict[str, Json]:
    """`{name in words: value}` of the arguments of a call, defaults filled in."""
    found = {}
    for parameter in specification.parameters:
        place = arguments.get(parameter.inside, {}) if parameter.inside else arguments
        value = place.get(parameter.key, parameter.default)
        if value is not None:
            found[parameter.name] = value
    return found


def _record_parameters(topic: Topic, action: Action, style: str, rng: random.Random) -> tuple[Parameter, ...]:
    found = []
    if action.takes_id:
        name = rng.choice([f"{topic.thing} id", f"{topic.thing} id", "id", f"{topic.thing} number"])
        found.append(Parameter(name, argument_name(name, style), "record"))
    found += [_parameter(text, style, rng) for text in action.own]
    fields = list(fields_of(topic.domain))
    if topic.action in ("search", "count", "newest"):  # conditions that a record either meets or does not
        fields = [field for field in fields if field[1] not in LONG]
    count = min(len(fields), rng.randint(*action.fields)) if action.fields[1] else 0
    picked = rng.sample(fields, count)
    inside = ""
    if count and topic.action in ("update", "search", "create") and rng.random() < 0.2:
        inside = {"update": "changes", "search": "filter", "create": rng.choice(["details", "data"])}[topic.action]
    for number, (name, kind) in enumerate(picked):
        required = number == 0 or rng.random() < (0.6 if topic.action == "create" else 0.5)
        parameter = _parameter(f"{name} {kind}", style, rng, required, inside)
        # what is not named stays as it is, so a change has no defaults
        found.append(replace(parameter, default=None) if topic.action == "update" else parameter)
    if action.extra and rng.random() < 0.5:
        found.append(_parameter(rng.choice(action.extra), style, rng, required=False))
    names = [parameter.name for parameter in found]
    return tuple(parameter for number, parameter in enumerate(found) if parameter.name not in names[:number])


def _parameter(text: str, style: str, rng: random.Random, required: bool = True, inside: str = "") -> Parameter:
    """`due date date?` is an optional argument of the kind `date`."""
    required = required and not text.endswith("?")
    text = text.removesuffix("?")
    name, one_of, options = text.partition(" one_of ")
    if one_of:
        kind = f"one_of {options}"
    else:
        name, _, kind = text.rpartition(" ")
    default: Json = None
    if not required and (one_of or kind in DEFAULTS):
        default = options.split("/")[0] if one_of else DEFAULTS[kind]
    hint = rng.choice(HINTS[kind]) if kind in HINTS and rng.random() < 0.15 else ""
    return Parameter(name, argument_name(name, style), kind, required, default, hint, inside)
