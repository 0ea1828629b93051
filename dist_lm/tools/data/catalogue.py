"""All tools: actions on the things of 24 domains, and formulas; each in several variants.

A tool is a pure function of its topic and its variant. Its shelf depends on the topic alone, not on the verb or the
style of its name, and all tools of a conversation are on one shelf.
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
INVENTED = 10_000  # invented domains of each shelf
VARIANTS = 8  # variants of each topic: they differ in names, arguments and descriptions
DEFAULTS: dict[str, Json] = {"flag": False, "few": 1}  # kind -> default of an optional argument
REQUIRED = {"create": 0.6}  # action -> share of the domain's fields that are required; 0.5 for the others
LONG = (
    "address",
    "size",
    "words",
    "people",
    "codes",
    "numbers",
    "title",
    "text",
)  # kinds that are no condition of a search
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
    """One argument of a tool."""

    name: str  # in words: `due date`
    key: str  # in calls: `due_date`
    kind: str  # a kind of values.py
    required: bool = True
    default: Json = None
    description: str = ""
    inside: str = ""  # key of the object that contains the argument; "": none

    @property
    def schema(self) -> dict[str, Json]:
        """Returns the JSON schema of the argument."""
        schema = schema_of(self.kind)
        if self.description:
            schema["description"] = self.description
        if self.default is not None:
            schema["default"] = self.default
        return schema


@dataclass(frozen=True)
class Specification:
    """A tool of the generator: its schema, and the words that requests use for it."""

    tool: Tool
    family: str  # record | formula | service
    domain: str
    action: str  # create, search, ...; the key of a formula or service
    subject: str  # the noun of the records, or the name of the computed figure
    verb: str  # the verb in the tool's name
    style: str  # one of `words.STYLES`
    parameters: tuple[Parameter, ...]
    shelf: int  # decides between train and val

    @property
    def id_parameter(self) -> Parameter | None:
        """Returns the argument that identifies a record; None if there is none."""
        return next((parameter for parameter in self.parameters if parameter.kind == "record"), None)


@dataclass(frozen=True)
class Topic:
    """The subject and the action of a tool; each topic has `VARIANTS` tools."""

    domain: str
    subject: str
    action: str  # a key of actions.py, or of a formula
    family: str


def specification(topic: Topic, variant: int) -> Specification:
    """Returns the tool of `topic` in one of its variants (0 to `VARIANTS` - 1): the same one in every call.

    Variants differ in verb, style of names, arguments and description, and may have the same name.
    """
    rng = random.Random(f"tool {topic.domain} {topic.subject} {topic.action} {variant}")  # noqa: S311  (no secrets)
    # Each variant has a seed of its own, so no other tool can change it.
    style = rng.choices(STYLES, STYLE_WEIGHTS)[0]
    noun = topic.subject

    if topic.family == "record":
        action = BY_KEY[topic.action]
        verb = rng.choice(action.verbs)
        parameters = _record_parameters(topic, action, style, rng)
        description = rng.choice(action.descriptions).format(
            a=article(topic.subject), the=topic.subject, all=plural(topic.subject)
        )
        if topic.action in ("search", "count"):
            noun = plural(noun)
    else:
        formula = formula_of(topic.action)
        verb = rng.choice(VERBS[topic.family][0])
        parameters = tuple(_parameter(text, style, rng) for text in formula.takes)
        description = f"{verb.capitalize()} {formula.phrase}"

    name = tool_name(verb, noun, style)
    tool = Tool(name, description, schema_with(parameters))
    return Specification(
        tool, topic.family, topic.domain, topic.action, topic.subject, verb, style, parameters, shelf_of(topic)
    )


def shelf_of(topic: Topic) -> int:
    """Returns the shelf of a topic, from 0 to `SHELVES` - 1: the same for all topics of a subject in one circle of
    actions, for a formula, and for all of an invented domain."""
    # An invented domain lies on one shelf with all its subjects and formulas.
    if is_invented(topic.domain):
        return int(topic.domain.removeprefix(PREFIX)) % SHELVES

    # The digest decides, so a new topic moves no other one.
    circle = BY_KEY[topic.action].circle if topic.family == "record" else 0
    digest = hashlib.blake2b(f"{topic.subject} {circle}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % SHELVES


def group_of(shelf: int) -> str:
    """Returns the hash by which a corpus splits: as a fraction of 2**64 it is (shelf + 0.2) / SHELVES.

    So a val_fraction of 1 or 2 % holds out one shelf, and 5 % hold out two.
    """
    return f"{(5 * shelf + 1) * 2**64 // (5 * SHELVES):016x}"


@cache
def shelf_topics(shelf: int) -> tuple[Topic, ...]:
    """Returns the topics of a shelf, in a fixed order."""
    return tuple(topic for topic in topics() if shelf_of(topic) == shelf)


def invented_topics(shelf: int, rng: random.Random) -> tuple[Topic, ...]:
    """Returns the topics of one invented domain of a shelf, drawn from INVENTED of them: every action on each of its
    subjects, then its formulas."""
    domain = f"{PREFIX}{shelf + SHELVES * rng.randrange(INVENTED)}"
    subjects = invented_domain(domain)[0]
    formulas = invented_formulas(domain)

    records = (Topic(domain, subject, action.key, "record") for subject in subjects for action in ACTIONS)
    return (*records, *(Topic(domain, name_of(formula), formula.key, formula.family) for formula in formulas))


@cache
def topics() -> tuple[Topic, ...]:
    """Returns all topics, except those of invented domains."""
    records = [
        Topic(domain, subject, action.key, "record")
        for domain, (subjects, _) in domains().items()
        for subject in subjects
        for action in ACTIONS
    ]

    return (*records, *(Topic(formula.domain, formula.key, formula.key, formula.family) for formula in FORMULAS))


@cache
def formula_of(key: str) -> Formula:
    """Returns the formula with this key."""
    if is_invented(key):
        return next(formula for formula in invented_formulas(key.partition(" formula ")[0]) if formula.key == key)
    return next(formula for formula in FORMULAS if formula.key == key)


def name_of(formula: Formula) -> str:
    """Returns the words of a tool's name, from what is computed: `the area of a circle` gives `circle area`."""
    measure, of, noun = formula.phrase.removeprefix("the ").partition(" of ")
    if not of:
        return measure
    return f"{noun.partition(' ')[2]} {measure}"


def fields_of(domain: str) -> tuple[tuple[str, str], ...]:
    """Returns `(name, kind)` of each field of the records of `domain`."""
    if is_invented(domain):
        return invented_domain(domain)[1]
    return domains()[domain][1]


def schema_with(parameters: tuple[Parameter, ...]) -> dict[str, Json]:
    """Returns the JSON schema of the arguments of a tool: an object, with nested objects for `Parameter.inside`."""
    properties: dict[str, Json] = {}
    required: list[str] = []

    # Arguments of one object are nested in its schema; the object is required, whatever it contains.
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


def arguments_of(parameters: tuple[Parameter, ...], values: Mapping[Parameter, Value]) -> dict[str, Json]:
    """Returns the arguments of a call as JSON: those of `parameters` that have a value, in the order of the schema.

    An argument of `Parameter.inside` stands in that object, which is absent if none of its arguments has a value.
    """
    arguments: dict[str, Json] = {}
    for parameter in parameters:
        if parameter in values:
            container = arguments
            if parameter.inside:
                container = arguments.setdefault(parameter.inside, {})
            container[parameter.key] = values[parameter].json

    return arguments


def values_of(specification: Specification, arguments: dict[str, Json]) -> dict[str, Json]:
    """Returns `{name in words: value}` of the arguments of a call, with the defaults of absent arguments; nested ones
    stand beside the others. A null, and an absent argument without a default, are left out."""
    value_by_name = {}
    for parameter in specification.parameters:
        container = arguments.get(parameter.inside, {}) if parameter.inside else arguments
        value = container.get(parameter.key, parameter.default)
        if value is not None:
            value_by_name[parameter.name] = value

    return value_by_name


def _record_parameters(topic: Topic, action: Action, style: str, rng: random.Random) -> tuple[Parameter, ...]:
    """Draws the arguments of a record tool: the record's id if the action takes one, the action's own arguments, fields
    of the domain, and sometimes one more optional argument. No two arguments have the same name in words.

    Args:
        style: the style of the arguments' names, as in `argument_name`.
    """
    parameters = []

    if action.takes_id:
        name = rng.choice([f"{topic.subject} id", f"{topic.subject} id", "id", f"{topic.subject} number"])
        parameters.append(Parameter(name, argument_name(name, style), "record"))

    parameters += [_parameter(text, style, rng) for text in action.own_arguments]

    fields = list(fields_of(topic.domain))
    # Search conditions are those that a record either meets or does not.
    if topic.action in ("search", "count", "newest"):
        fields = [field for field in fields if field[1] not in LONG]
    num_fields = min(len(fields), rng.randint(*action.fields)) if action.fields[1] else 0
    chosen_fields = rng.sample(fields, num_fields)

    # Sometimes one object contains the fields.
    inside = ""
    if num_fields and topic.action in ("update", "search", "create") and rng.random() < 0.2:
        inside = {"update": "changes", "search": "filter", "create": rng.choice(["details", "data"])}[topic.action]

    # The first field is required, so that every call has an argument of the domain.
    for number, (name, kind) in enumerate(chosen_fields):
        required = number == 0 or rng.random() < REQUIRED.get(topic.action, 0.5)
        parameter = _parameter(f"{name} {kind}", style, rng, required, inside)
        # A field that the call does not name stays as it is, so an update has no defaults.
        if topic.action == "update":
            parameter = replace(parameter, default=None)
        parameters.append(parameter)

    if action.extra and rng.random() < 0.5:
        parameters.append(_parameter(rng.choice(action.extra), style, rng, required=False))

    # An action's own argument may have the name of a field; the first of two stays.
    names = [parameter.name for parameter in parameters]
    return tuple(parameter for number, parameter in enumerate(parameters) if parameter.name not in names[:number])


def _parameter(text: str, style: str, rng: random.Random, required: bool = True, inside: str = "") -> Parameter:
    """Reads a parameter from text: `due date date?` is an optional argument `due date` of the kind `date`.

    A required parameter has no default; an optional one that of its kind, if DEFAULTS has one, or the first of
    `one_of`. Some get a hint on the notation as description.

    Args:
        required: false makes it optional, whatever the text says.
        inside: key of the object that contains the argument; empty: none.
    """
    required = required and not text.endswith("?")
    text = text.removesuffix("?")

    name, one_of, options = text.partition(" one_of ")
    if one_of:
        kind, default = f"one_of {options}", options.split("/")[0]
    else:
        name, _, kind = text.rpartition(" ")
        default = DEFAULTS.get(kind)

    # A call always names a required argument, so a default would say nothing.
    if required:
        default = None

    hint = rng.choice(HINTS[kind]) if kind in HINTS and rng.random() < 0.15 else ""
    return Parameter(name, argument_name(name, style), kind, required, default, hint, inside)
