"""The words of user and assistant: requests in many ways, arguments in several notations, and answers."""

import json
import random

from dist_lm.chat.messages import Json
from dist_lm.tools.data.actions import BY_KEY
from dist_lm.tools.data.catalogue import Parameter, Specification, formula_of
from dist_lm.tools.data.formulas import VERBS
from dist_lm.tools.data.values import Value, plural_kind
from dist_lm.tools.data.words import article, plural, upper_first

ArgumentValues = dict[Parameter, Value]  # the arguments of a call, in the order of the request

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
SETTINGS = {True: ("on", "yes", "true"), False: ("off", "no", "false")}  # words for a flag
PRONOUNS = ("it", "that")
PARTICLES = (" up", " over", " away")  # endings of verbs that no `it` follows
CLAUSE_VERBS = ("tell me", "find out", "check", "I want to know")  # before `whether`
LINKS = ("with ", "for ", "in ", "on ", "at ", "to ", "of ", "saying ", "and ")
NEAR = {  # kind -> phrases without the argument's name, for the only argument of its kind
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


def request(specification: Specification, arguments: ArgumentValues, rng: random.Random) -> str:
    """Returns a request for one call that names every one of `arguments`, in their order, as a sentence or question of
    its own."""
    body, phrases = _body_and_phrases(specification, arguments, rng)

    # A question takes no opening such as `please`, and ends with a question mark.
    question = body.startswith(("how ", "what ", "tell me", "I need", "I want", "I would"))
    opening = "" if question else rng.choice(OPENINGS)
    text = upper_first(opening + _sentence(body, phrases, rng))

    text += "?" if question or opening in ("Can you ", "Could you ") else rng.choice([".", ".", ""])
    if rng.random() < 0.08:
        text = f"{rng.choice(ASIDES)} {text}"

    return text


def instruction(specification: Specification, arguments: ArgumentValues, rng: random.Random, it: str = "") -> str:
    """Returns the request as part of a longer sentence; `it` is the pronoun for a record that the sentence has
    named."""
    body, phrases = _body_and_phrases(specification, arguments, rng, it)
    return body + _in_a_row(phrases, " and ")


def argument_phrase(parameter: Parameter, value: Value, alone: bool, rng: random.Random) -> str:
    """Returns one argument in words, to stand after the body of a request: `with limit 5`, or `: ...`.

    Args:
        alone: whether no other argument is of its kind; then its name may be left out, as in `for 20 EUR`.
    """
    name = parameter.name
    wording = value.wording
    kind = parameter.kind

    # A flag or one of several options needs the name of its argument: `on` alone has no meaning.
    if kind == "flag":
        setting = rng.choice(SETTINGS[value.json])
        return rng.choice([f"{name}: {setting}", f"with {name} {setting}", f"{name} {setting}", f"{name} = {setting}"])

    if kind.startswith("one_of"):
        return rng.choice([f"with {name} {wording}", f"{name} {wording}", f"{name}: {wording}", f"{name} = {wording}"])

    if alone and kind in NEAR and rng.random() < 0.5:
        return rng.choice(NEAR[kind]).format(wording)

    # Lists and objects are too long for the forms in which the name comes last.
    forms = [
        f"with {name} {wording}",
        f"{name} {wording}",
        f"{name}: {wording}",
        f"with the {name} {wording}",
        f"{name} = {wording}",
    ]
    if not plural_kind(kind):
        forms += [f"with {wording} as the {name}", f"the {name} is {wording}"]
    return rng.choice(forms)


def describe(specification: Specification, rng: random.Random) -> str:
    """Returns what a tool does, without arguments: `cancel an order`."""
    if specification.family != "record":
        return f"{rng.choice(['find out', 'tell you'])} {formula_of(specification.action).phrase}"
    return _verb_and_subject(specification, article(specification.subject), rng)


def in_words(value: Json) -> str:
    """Returns a value in words: yes or no, lists with commas (`none` if empty), objects as `name value`; numbers and
    texts stay as they are in the result."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(in_words, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(part)}" for name, part in value.items())
    if isinstance(value, str):
        return value
    return json.dumps(value)


def answer(specification: Specification, record_id: str | None, result: Json, rng: random.Random) -> str:
    """Returns the answer of the assistant that puts a result in words.

    Args:
        record_id: the record that the call is about; None if it is about none.
        result: as returned by `World.execute`, no error.
    """
    subject = specification.subject

    if specification.family != "record":
        phrase = formula_of(specification.action).phrase
        if isinstance(result, dict):
            if rng.random() < 0.4:
                return f"Here is {phrase}: {facts(result)}."
            return upper_first(f"{facts(result)}.")
        return rng.choice([f"The answer is {in_words(result)}.", f"It is {in_words(result)}.", f"{in_words(result)}."])

    action = specification.action
    if action == "create":
        return rng.choice(["The new {} has the id {}.", "Done: {} {}.", "Created {} {}."]).format(subject, result["id"])

    if action == "lookup":
        return f"{subject.capitalize()} {record_id}: {facts(result)}."

    if action == "search":
        ids = result["ids"]
        if not ids:
            return f"There are no such {plural(subject)}."
        if len(ids) > 1:
            subject = plural(subject)
        return rng.choice(["Found {}: {}.", "{} found: {}."]).format(subject, in_words(ids))

    if action == "newest":
        return f"The latest {subject} is {result['id']}."
    if action == "count":
        return rng.choice(["The count is {}.", "There are {}.", "I found {}."]).format(result["count"])

    # The other actions return the record's id and perhaps what they changed.
    changes = {name: value for name, value in result.items() if name not in ("id", "deleted")}
    closing = f": {facts(changes)}." if changes and rng.random() < 0.6 else "."
    confirmation = rng.choice(["Done with {} {}", "{} {} is done", "Ready: {} {}"]).format(subject, record_id)
    return upper_first(confirmation + closing)


def facts(result: dict[str, Json]) -> str:
    """Returns a result in words, such as `status paid, total 12`."""
    return ", ".join(f"{name.replace('_', ' ')} {in_words(value)}" for name, value in result.items())


def question_back(missing: Parameter, rng: random.Random) -> str:
    """Returns the question for an argument that a call still needs."""
    forms = ["What is the {}?", "Which {}?", "I need the {} for that.", "Please give me the {}."]
    return rng.choice(forms).format(missing.name)


def nothing_fits(rng: random.Random) -> str:
    """Returns the answer to a request that no tool serves."""
    return rng.choice(
        [
            "None of my tools can do that.",
            "I have no tool for that.",
            "Sorry, I cannot do that with the tools I have.",
        ]
    )


def _body_and_phrases(
    specification: Specification, arguments: ArgumentValues, rng: random.Random, it: str = ""
) -> tuple[str, list[str]]:
    """Returns the beginning of a request, without arguments, and a phrase for each argument except the record.

    Args:
        it: pronoun for the record, which an earlier part of the request names; empty: none.
    """
    further_arguments = [(parameter, value) for parameter, value in arguments.items() if parameter.kind != "record"]
    record = next((value for parameter, value in arguments.items() if parameter.kind == "record"), None)

    if specification.family != "record":
        phrase = formula_of(specification.action).phrase
        # `compute whether` is no English, so a clause has verbs of its own.
        verbs = VERBS[specification.family][1]
        if phrase.startswith(("whether ", "which ", "how ")):
            verbs = CLAUSE_VERBS
        body = f"{rng.choice(verbs)} {phrase}"
    elif it:
        body = _verb_and_subject(specification, it, rng)
    elif record is not None:
        body = _verb_and_subject(specification, _record(specification.subject, record.wording, rng), rng)
    else:
        body = _verb_and_subject(specification, article(specification.subject), rng)

    # A short form such as `for 20 EUR` says which argument it is only if no other has its kind.
    kinds = [parameter.kind for parameter, _ in further_arguments]
    return body, [
        argument_phrase(parameter, value, kinds.count(parameter.kind) == 1, rng)
        for parameter, value in further_arguments
    ]


def _record(subject: str, record_id: str, rng: random.Random) -> str:
    """Returns a record such as `order AB-12` in words."""
    return rng.choice(
        [
            f"{subject} {record_id}",
            f"the {subject} {record_id}",
            f"{subject} number {record_id}",
            f"the {subject} with id {record_id}",
            f"the {subject} with the id {record_id}",
        ]
    )


def _verb_and_subject(specification: Specification, subject: str, rng: random.Random) -> str:
    """Returns the verb and object of a request, such as `cancel order AB-12`, `find all orders` or `how many orders are
    there`.

    Args:
        subject: the record in words, or a pronoun; not used where a request speaks of records in general.
    """
    action = BY_KEY[specification.action]
    # `hand over it` is wrong, so such verbs are left out before a pronoun.
    verbs = [verb for verb in action.request_verbs if subject not in PRONOUNS or not verb.endswith(PARTICLES)]

    # Half of the requests use the verb of the tool's name, if it is one that people say.
    verb = specification.verb
    if verb not in verbs or rng.random() >= 0.5:
        verb = rng.choice(verbs)

    if specification.action == "count":
        return f"{verb} {plural(specification.subject)}{' are there' if verb == 'how many' else ''}"

    if specification.action == "search":
        return f"{verb} {rng.choice(['', 'all ', 'the '])}{plural(specification.subject)}"

    if specification.action == "newest":
        return f"{verb} {specification.subject}"

    return f"{verb} {subject}"


def _sentence(body: str, phrases: list[str], rng: random.Random) -> str:
    """Returns a sentence of a body and its arguments: in brackets, after a colon, as a list, or in a row."""
    layout = rng.random()

    # The items of a list need no prepositions.
    plain = [phrase.removeprefix("with ").removeprefix(": ") for phrase in phrases]

    if len(phrases) > 1 and layout < 0.12:
        return f"{body} ({', '.join(plain)})"
    if len(phrases) > 1 and layout < 0.24:
        return f"{body}: {'; '.join(plain)}"
    if phrases and layout < 0.3:
        return body + "".join(f"\n- {phrase}" for phrase in plain)

    return body + _in_a_row(phrases, rng.choice([" ", ", ", " and "]))


def _in_a_row(phrases: list[str], separator: str) -> str:
    """Returns the arguments one after the other, as they continue the body of a request."""
    separators = [" ", *[separator] * len(phrases)]
    return "".join(map(_with_separator, phrases, separators))


def _with_separator(phrase: str, separator: str) -> str:
    """Returns an argument with its separator: a space alone only before a word such as `with`, else a comma."""
    if phrase.startswith(":"):
        return phrase
    if separator == " " and not phrase.startswith(LINKS):
        separator = ", "
    return separator + phrase
