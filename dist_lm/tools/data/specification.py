"""A tool as the generator knows it: beside its schema, what it means and how requests may speak of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from dist_lm.chat.messages import Json, Tool
from dist_lm.tools.data.values import Value, schema_of


@dataclass(frozen=True)
class Parameter:
    """One argument."""

    name: str  # in words: `due date`
    key: str  # in calls: `due_date`
    kind: str  # of values.py
    required: bool = True
    default: Json = None
    description: str = ""
    inside: str = ""  # key of the object that holds it; "": it stands by itself

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
    """A tool, whose name and arguments hang on nothing but what it is about and the number of its variant."""

    tool: Tool
    family: str  # record | formula | service
    domain: str
    action: str  # create, search, ...; the name of a formula or a service
    thing: str  # what it is about, in words
    verb: str  # of its name
    style: str
    parameters: tuple[Parameter, ...]
    shelf: int  # its side of the split

    @property
    def id_parameter(self) -> Parameter | None:
        """The argument that names a record."""
        return next((parameter for parameter in self.parameters if parameter.kind == "record"), None)


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
