"""Random schemas: nested, with enumerations, bounds, arrays, optional properties, alternatives and references."""

from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]


def integers(low: int, size: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": low + size}


def numbers(low: int, size: int) -> Schema:
    return {"type": "number", "minimum": low, "maximum": low + size}


def texts(least: int, more: int) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": least + more}


def arrays(items: Schema, least: int, more: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}


def objects(properties: dict[str, Schema], n_required: int) -> Schema:
    required = sorted(properties)[:n_required]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def referring(part: Schema) -> Schema:
    """A reference with its own definitions, which `at_root` moves to where references look."""
    return {"$ref": "#/$defs/part", "$defs": {"part": part}}


CONSTANTS = st.one_of(st.integers(), st.text(max_size=5), st.none(), st.booleans())
SCALARS = st.one_of(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "pattern": "^[a-z]{2,4}$"},
            {"type": "string", "format": "date"},
            {"type": "integer", "exclusiveMinimum": 3, "multipleOf": 5, "maximum": 40},
        ]
    ),
    st.builds(integers, st.integers(-50, 50), st.integers(0, 90)),
    st.builds(numbers, st.integers(-9, 9), st.integers(1, 9)),
    st.builds(texts, st.integers(0, 3), st.integers(0, 5)),
    st.builds(lambda values: {"enum": values}, st.lists(CONSTANTS, min_size=1, max_size=4, unique_by=repr)),
    st.builds(lambda value: {"const": value}, CONSTANTS),
)


def _compounds(inside: st.SearchStrategy[Schema]) -> st.SearchStrategy[Schema]:
    names = st.text('abc é"\\', min_size=1, max_size=4)
    return st.one_of(
        st.builds(objects, st.dictionaries(names, inside, max_size=4), st.integers(0, 4)),
        st.builds(arrays, inside, st.integers(0, 2), st.integers(0, 2)),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inside, min_size=1, max_size=3)),
        st.builds(referring, SCALARS),
    )


def at_root(schema: Schema) -> Schema:
    """Returns a schema whose definitions lie at its root."""
    definitions: dict[str, Schema] = {}

    def moved(part: Any) -> Any:
        if isinstance(part, list):
            return [moved(each) for each in part]
        if not isinstance(part, dict):
            return part
        if part.keys() == {"$ref", "$defs"}:
            name = f"part{len(definitions)}"
            definitions[name] = part["$defs"]["part"]
            return {"$ref": f"#/$defs/{name}"}
        return {key: moved(value) for key, value in part.items()}

    root = moved(schema)
    return root | {"$defs": definitions} if definitions else root


SCHEMAS = st.recursive(SCALARS, _compounds, max_leaves=8).map(at_root)
