"""What a conversation is made from: its tools, the arguments of calls, and the records that the tools work on."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dist_lm.chat.messages import Call, Json
from dist_lm.tools.data.catalogue import (
    VARIANTS,
    Parameter,
    Specification,
    Topic,
    arguments_of,
    fields_of,
    formula_of,
    specification,
    values_of,
)
from dist_lm.tools.data.phrasing import Given
from dist_lm.tools.data.values import Value, code, draw, quoted

RICH = ("create", "search", "update")  # chosen twice as often: their arguments are of all kinds
CONDITIONS = ("search", "count", "newest")
TRIES = 5  # draws for a value that no other argument has
OPTIONAL = 0.4  # share of optional arguments that are given
COMPUTED = 0.3  # share of formulas and services among the tools of a shelf that has some
Record = dict[str, Json]
COMMENTS, TAGS = "_comments", "_tags"  # fields that actions add; no domain has such names


class ToolFailure(Exception):  # noqa: N818  (part of a conversation, not an error of this program)
    """A call that the tool refuses; the message is the result."""


@dataclass
class World:
    """The records of one conversation, by thing and id, and the execution of calls on them."""

    rng: random.Random
    records: dict[str, dict[str, Record]] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)  # names of tools that fail once, as if a server were down

    def put(self, thing: str, domain: str, known: Record | None = None, record_id: str | None = None) -> str:
        """Add a record with the fields of its domain, some of them given by `known`; returns the id."""
        shelf = self.records.setdefault(thing, {})
        key = record_id or self._free_id(shelf)
        shelf[key] = {name: draw(kind, self.rng).json for name, kind in fields_of(domain)} | (known or {})
        return key

    def execute(self, specification: Specification, call: Call) -> Json:
        """The result of a call.

        Raises:
            ToolFailure: the tool refuses it.
        """
        if call.name in self.busy:
            self.busy.remove(call.name)
            raise ToolFailure("the server is busy, try again")
        given = values_of(specification, call.arguments)
        if specification.family != "record":
            return formula_of(specification.action).run(given)
        id_parameter = specification.id_parameter
        if id_parameter is None:
            return self._without_id(specification, given)
        record_id = given.pop(id_parameter.name)
        return self._with_id(specification, record_id, given)

    def _without_id(self, specification: Specification, given: Record) -> Json:
        shelf = self.records.setdefault(specification.thing, {})
        fields = {name for name, _ in fields_of(specification.domain)}
        known = {name: value for name, value in given.items() if name in fields}
        if specification.action == "create":
            return {"id": self.put(specification.thing, specification.domain, known)}
        asked = _conditions(specification, known)
        found = [key for key, record in shelf.items() if all(record.get(name) == asked[name] for name in asked)]
        if specification.action == "count":
            return {"count": len(found)}
        if specification.action == "newest":
            if not found:
                raise ToolFailure(f"no {specification.thing} matches")
            return {"id": found[-1]}
        return {"ids": found[: given.get("limit", 10)]}

    def _with_id(self, specification: Specification, record_id: str, given: Record) -> Json:
        shelf = self.records.setdefault(specification.thing, {})
        if record_id not in shelf:
            close = [key for key in shelf if sorted(key) == sorted(record_id)]
            hint = f", did you mean {close[0]}?" if close else ""
            raise ToolFailure(f"no {specification.thing} {record_id}{hint}")
        record = shelf[record_id]
        action = specification.action
        if action == "lookup":
            shown = [name for name, kind in fields_of(specification.domain) if kind not in ("address", "size")]
            start = len(specification.thing) % (len(shown) - 2)
            return {name.replace(" ", "_"): record[name] for name in shown[start : start + 3]}
        if action == "delete":
            del shelf[record_id]
            return {"deleted": record_id}
        if action == "update":
            record.update(given)
            return {"id": record_id, "updated": len(given)}
        if action == "comment":
            comments = record[COMMENTS] = [*record.get(COMMENTS, []), given["text"]]
            return {"id": record_id, "comments": len(comments)}
        if action == "tag":
            tags = record[TAGS] = list(dict.fromkeys([*record.get(TAGS, []), *given["tags"]]))
            return {"id": record_id, "tags": tags}
        record.update(given)
        done = {
            "assign": lambda: {"assignee": given["assignee"]},
            "rename": lambda: {"name": given["new name"]},
            "approve": lambda: {"approved": True},
            "share": lambda: {"sent_to": given["email"]},
            "schedule": lambda: {"day": given["day"], "time": given["time"]},
            "archive": lambda: {"archived": True},
        }[action]()
        return {"id": record_id, **done}

    def _free_id(self, shelf: dict[str, Record]) -> str:
        while True:
            key = code(self.rng)
            if key not in shelf:
                return key


@dataclass
class Scene:
    """The state of a conversation that is being written."""

    rng: random.Random
    world: World
    topics: tuple[Topic, ...]  # of one shelf
    tools: list[Specification] = field(default_factory=list)
    hidden: set[tuple[str, str]] = field(default_factory=set)  # (thing, action) of tools that must not appear

    def has(self, fits: Callable[[Topic], bool]) -> bool:
        """Whether the shelf has such a tool that is not taken yet."""
        return any(map(fits, self._free()))

    def take(self, fits: Callable[[Topic], bool] = lambda topic: True) -> Specification:
        """Pick a tool of the shelf whose topic fits, and add it to the tools."""
        found = self.pick(fits)
        self.tools.append(found)
        return found

    def pick(self, fits: Callable[[Topic], bool] = lambda topic: True) -> Specification:
        """A tool of the shelf whose topic fits and is not taken yet."""
        free = [topic for topic in self._free() if fits(topic)]
        computed = [topic for topic in free if topic.family != "record"]
        records = [topic for topic in free if topic.family == "record"]
        side = computed if computed and (not records or self.rng.random() < COMPUTED) else records
        weights = [2 if topic.action in RICH else 1 for topic in side]
        return specification(self.rng.choices(side, weights)[0], self.rng.randrange(VARIANTS))

    def add_others(self, count: int) -> None:
        """Add tools that are not needed; half of them are for the thing of a needed one."""
        things = {tool.thing for tool in self.tools}
        for _ in range(count):
            near = [topic for topic in self._free() if topic.thing in things]
            if near and self.rng.random() < 0.5:
                chosen = specification(self.rng.choice(near), self.rng.randrange(VARIANTS))
            else:
                chosen = self.pick()
            if chosen.tool.name not in {tool.tool.name for tool in self.tools}:
                self.tools.append(chosen)

    def _other_than(self, given: Given, kind: str) -> Value:
        """A value that no other argument of the kind has: no request asks for the rate from EUR to EUR."""
        taken = [value.json for parameter, value in given.items() if parameter.kind == kind]
        tries = (draw(kind, self.rng) for _ in range(TRIES))
        return next((value for value in tries if kind == "flag" or value.json not in taken), draw(kind, self.rng))

    def _free(self) -> list[Topic]:
        taken = {(tool.thing, tool.action) for tool in self.tools} | self.hidden
        return [topic for topic in self.topics if (topic.thing, topic.action) not in taken]

    def arguments(self, tool: Specification, without: Iterable[str] = ()) -> Given:
        """Values for a call of `tool`, in the order of the request; adds the records that the call finds.

        Args:
            without: names of arguments to leave out.
        """
        given: Given = {}
        for parameter in tool.parameters:
            if parameter.name in without or not (parameter.required or self.rng.random() < OPTIONAL):
                continue
            if parameter.kind == "record":
                key = self.world.put(tool.thing, tool.domain)
                given[parameter] = Value(key, quoted(key, self.rng) if self.rng.random() < 0.2 else key)
            else:
                given[parameter] = self._other_than(given, parameter.kind)
        if tool.action in CONDITIONS:
            known = {parameter.name: value.json for parameter, value in given.items()}
            for _ in range(self.rng.randint(1, 3)):
                self.world.put(tool.thing, tool.domain, known)
        return in_turn(given, self.rng)


def call_of(tool: Specification, given: Given) -> Call:
    """The call with these arguments, in the order of the schema."""
    return Call(tool.tool.name, arguments_of(tool.parameters, given))


def record_of(tool: Specification, given: Given) -> str | None:
    """The record that a call is about."""
    return next((str(value.json) for parameter, value in given.items() if parameter.kind == "record"), None)


def with_record(tool: Specification, given: Given, record_id: Json) -> Given:
    """`given` with another record, which comes first."""
    record = tool.id_parameter
    assert record is not None
    others = {parameter: value for parameter, value in given.items() if parameter.kind != "record"}
    return {record: Value(record_id, str(record_id))} | others


def in_turn(given: Given, rng: random.Random) -> Given:
    """The order of a request: any, but the record comes first and the fields of one object stay together."""
    groups: dict[str, list[Parameter]] = {}
    for parameter in given:
        groups.setdefault(parameter.inside or parameter.key, []).append(parameter)
    shuffled = rng.sample(list(groups.values()), len(groups))
    shuffled.sort(key=lambda group: all(parameter.kind != "record" for parameter in group))
    return {parameter: given[parameter] for group in shuffled for parameter in _record_first(group, rng)}


def _record_first(group: list[Parameter], rng: random.Random) -> list[Parameter]:
    return sorted(rng.sample(group, len(group)), key=lambda parameter: parameter.kind != "record")


def _conditions(specification: Specification, given: Record) -> Record:
    """The conditions of a search, without optional ones at their default."""
    optional = {p.name: p.default for p in specification.parameters if not p.required}
    return {name: value for name, value in given.items() if name not in optional or optional[name] != value}
