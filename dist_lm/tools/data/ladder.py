"""What lies between copying and choosing a tool, in steps that a small model takes one at a time.

Which tool is meant is looked up: words of the request are found again in a description, and what stands behind that is
said. None of these steps is learned without the one before it, and in a mixture of all of them hardly any is
(docs/log.md), so each is a corpus that leads the stage for a while (`stage.lead`):

    lists      `cancel order: red`         asked by `cancel order`
    wishes     `Cancel an order: red`      asked by `please cancel the order for Ada Novak, at 12:30`
    choosing   tools without arguments, asked by requests of all kinds (`episodes.choosing`)

Then what a call is given, in two steps:

    slots      `{"bill": 60, "tip": 12}`   for `tip = 12, 60 as the bill`; arguments are made up
    filling    the same of tools, asked by requests of all kinds (`episodes.filling`)
"""

import random

from dist_lm.chat.json_text import write
from dist_lm.chat.messages import Json, Message
from dist_lm.chat.nulls import with_nulls
from dist_lm.tools.data.actions import ACTIONS
from dist_lm.tools.data.choice import in_turn
from dist_lm.tools.data.drills import BEFORE, any_word
from dist_lm.tools.data.naming import STYLE_WEIGHTS, STYLES, argument_name, article
from dist_lm.tools.data.phrasing import piece
from dist_lm.tools.data.specification import Parameter, arguments_of, schema_with, sketch_of
from dist_lm.tools.data.values import draw
from dist_lm.tools.data.words import words

ENTRIES = (2, 5)  # of a list: least, most
ASKED = (3, 6)
TOLD = ("person", "city", "code", "date", "clock", "word", "amount", "email")  # kinds of what a wish holds beside
BETWEEN = (" with ", ", ", " and the ", " for ", " ")

FIELDS = (1, 2, 2, 3, 3, 4, 5)
FIELD_KINDS = (
    *("word", "word", "word", "amount", "amount", "few", "decimal", "flag", "code", "given", "date", "words", "size"),
    *("one_of", "one_of"),  # of made-up options
)
OPTIONS = (2, 4)  # of such a field: least, most
ALIKE = 0.5  # of forms have fields of one kind: only their names tell them apart
KINDS_ALIKE = ("word", "amount", "amount", "few", "given", "code", "date", "one_of")
DESCRIBED = 0.15  # of fields
HELD = 0.25  # of forms have an object inside
WITH_OPTIONAL = 0.5  # of forms have fields that need not be there
FILLED = (1, 3)  # times: from the second time on, keys are copied from the answer before, not looked up in the form
GIVEN = (0.0, 0.3, 0.7, 1.0, 1.0)  # shares of the fields that are said, one a form
NOTHING = ("nothing", "none of it", "leave it empty", "not yet")  # where none is
SEPARATORS = (", ", "; ", " and ")


def lists(rng: random.Random) -> list[Message]:
    """What is said to belong to a verb and a thing, asked for in the same words."""
    said = {f"{verb} {thing}": any_word(rng) for verb, thing in _deeds(rng)}
    asked = rng.choices(list(said), k=rng.randint(*ASKED))
    return _told_and_asked(said, [(key, said[key]) for key in asked])


def wishes(rng: random.Random) -> list[Message]:
    """The same in a sentence, asked for in another one that holds more than that."""
    deeds = _deeds(rng)
    said = {f"{verb.capitalize()} {article(thing)}": any_word(rng) for verb, thing in deeds}
    values = list(said.values())
    asked = rng.choices(range(len(deeds)), k=rng.randint(*ASKED))
    return _told_and_asked(said, [(_wish(*deeds[number], rng), values[number]) for number in asked])


def slots(rng: random.Random) -> list[Message]:
    """Made-up fields and what they hold, said barely and in any order: what belongs to which, and which is the last."""
    parameters = _fields(rng)
    schema = schema_with(parameters)
    turns = [form_of(schema, rng)]
    share = rng.choice(GIVEN)
    for _ in range(rng.randint(*FILLED)):
        given = in_turn({p: draw(p.kind, rng) for p in parameters if rng.random() < share}, rng)
        said = rng.choice(SEPARATORS).join(piece(parameter, value, False, rng) for parameter, value in given.items())
        turns += [
            Message("user", f" {said or rng.choice(NOTHING)}"),
            filled_in(arguments_of(parameters, given), schema),
        ]
    return turns


def form_of(schema: Json, rng: random.Random) -> Message:
    """What is to be filled in, as tools have it or as a sketch: `{"bill": "number", "tip": "integer"}`."""
    form = {"parameters": schema} if rng.random() < 0.5 else sketch_of(schema)
    return Message("system", write(form, "a form"))


def filled_in(arguments: dict[str, Json], schema: Json) -> Message:
    """Arguments as a call spells them, without its name."""
    return Message("assistant", write({"arguments": with_nulls(arguments, schema, "arguments")}, "arguments"))


def _fields(rng: random.Random) -> tuple[Parameter, ...]:
    style = rng.choices(STYLES, STYLE_WEIGHTS)[0]
    count = rng.choice(FIELDS)
    required = rng.randint(0, count) if rng.random() < WITH_OPTIONAL else count
    held = count - rng.randint(1, count) if rng.random() < HELD else count  # from this one on
    inside = argument_name(any_word(rng), style)
    chosen = [rng.choice(KINDS_ALIKE)] if rng.random() < ALIKE else FIELD_KINDS
    kinds = [_with_options(kind, rng) for kind in chosen]
    found: dict[str, Parameter] = {inside: Parameter("", inside, "")}
    while len(found) <= count:
        name, number = " ".join(any_word(rng) for _ in range(rng.randint(1, 2))), len(found) - 1
        key = argument_name(name, style)
        place = inside if number >= held else ""
        said = f"{any_word(rng).capitalize()} {any_word(rng)}" if rng.random() < DESCRIBED else ""
        kind = rng.choice(kinds)
        found.setdefault(key, Parameter(name, key, kind, number < required, description=said, inside=place))
    return tuple(found.values())[1:]


def _with_options(kind: str, rng: random.Random) -> str:
    """`one_of` as `values.py` has it, with options: `one_of red/green`; other kinds as they are."""
    options = dict.fromkeys(any_word(rng) for _ in range(rng.randint(*OPTIONS)))
    return f"one_of {'/'.join(options)}" if kind == "one_of" else kind


def _deeds(rng: random.Random) -> list[tuple[str, str]]:
    """Verbs with things: some share a verb, or all the thing, so that both count."""
    count = rng.randint(*ENTRIES)
    same = count <= 3 and rng.random() < 0.5
    things = [any_word(rng)] if same else [any_word(rng) for _ in range(count)]
    actions = rng.sample(ACTIONS, count)
    found: dict[tuple[str, str], str] = {}  # by action and thing
    while len(found) < count:
        action, thing = rng.choice(actions), rng.choice(things)
        found.setdefault((action.key, thing), rng.choice(action.said))
    return [(verb, thing) for (_, thing), verb in found.items()]


def _wish(verb: str, thing: str, rng: random.Random) -> str:
    """`please cancel the order for Ada Novak, at 12:30`."""
    told = "".join(
        rng.choice(BETWEEN) + rng.choice(["", f"{rng.choice(words('common'))} "]) + draw(rng.choice(TOLD), rng).said
        for _ in range(rng.randint(1, 3))
    )
    return f"{rng.choice(BEFORE)}{verb} the {thing}{told}"


def _told_and_asked(said: dict[str, str], asked: list[tuple[str, str]]) -> list[Message]:
    turns = [Message("system", "\n".join(f"{key}: {value}" for key, value in said.items()))]
    for question, value in asked:
        turns += [Message("user", f" {question}"), Message("assistant", f" {value}")]
    return turns
