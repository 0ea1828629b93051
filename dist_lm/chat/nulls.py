"""Arguments as a call spells them: all that the schema names, `null` for those that are not given.

`{"city": "Oslo"}` for a schema of city, date and unit is spelled `{"city": "Oslo", "date": null, "unit": null}`. So a
model that writes a call never has to decide at one place both which key comes next and whether it was given: keys
follow each other as in the schema, and behind a key stands what was said of it. (OpenAI's structured outputs ask for
the same: every field required, and null for what is optional.)

Only where the schema itself takes no null; elsewhere null is a value, and is said where it is given. An argument that
must be given and is spelled null is not given.
"""

from typing import Any

from dist_lm.chat.errors import ChatError
from dist_lm.chat.json_text import DEEPEST, shown
from dist_lm.chat.messages import Json


def with_nulls(value: Json, schema: Json, where: str, depth: int = 0) -> Json:
    """`value` with null for every property of `schema` that it does not have; `without_nulls` gives `value` back.

    What is given keeps its order; what is not stands where the schema has it, before what comes after it there.

    Raises:
        ChatError: it holds a null that would not come back; the message begins with `where`.
    """
    if depth > DEEPEST:
        return value  # for `json_text.write` to refuse
    if type(value) is list:
        return [with_nulls(item, _items(schema), where, depth + 1) for item in value]
    if type(value) is not dict:
        return value
    properties = _properties(schema)
    absent = [name for name, part in properties.items() if name not in value and _takes_no_null(part)]
    place = {name: number for number, name in enumerate(properties)}
    spelled: dict[str, Json] = {}
    for name, inner in value.items():
        part = properties.get(name)
        if inner is None and _takes_no_null(part):
            raise ChatError(f"{where}: {shown(name)} is null, which its schema does not take: leave it out")
        while absent and place[absent[0]] < place.get(name, -1):
            spelled[absent.pop(0)] = None
        spelled[name] = with_nulls(inner, part, where, depth + 1)
    return spelled | dict.fromkeys(absent)


def without_nulls(value: Json, schema: Json) -> Json:
    """`value` without the nulls that its schema does not take. At most `DEEPEST` deep, as `json_text.read` gives it."""
    if type(value) is list:
        return [without_nulls(item, _items(schema)) for item in value]
    if type(value) is not dict:
        return value
    properties = _properties(schema)
    return {
        name: without_nulls(inner, properties.get(name))
        for name, inner in value.items()
        if inner is not None or not _takes_no_null(properties.get(name))
    }


def _properties(schema: Json) -> dict[str, Json]:
    found = schema.get("properties") if type(schema) is dict else None
    return found if type(found) is dict else {}


def _items(schema: Json) -> Json:
    return schema.get("items") if type(schema) is dict else None


def _takes_no_null(schema: Json) -> bool:
    """Whether a schema says so itself, by the types or the values it names."""
    if type(schema) is not dict:
        return False
    kinds: Any = schema.get("type")
    named = (kinds,) if type(kinds) is str else kinds if type(kinds) is list else ("null",)
    values = schema.get("enum")
    return "null" not in named or (type(values) is list and None not in values)
