"""The material of a conversation: its tools, the arguments of calls, and the records that the tools work on."""

import random
from collections.abc import Callable, Iterable
from copy import deepcopy
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
from dist_lm.tools.data.phrasing import ArgumentValues
from dist_lm.tools.data.values import Value, code, draw, sometimes_quoted

RICH = ("create", "search", "update")  # actions chosen twice as often: their arguments are of all kinds
CONDITIONS = ("search", "count", "newest")  # actions whose arguments are conditions on records
TRIES = 5  # draws for a value that no other argument has
OPTIONAL = 0.4  # share of optional arguments that a call has
COMPUTED = 0.3  # share of formulas and services among the tools of a shelf that has some
Record = dict[str, Json]
COMMENTS, TAGS = "_comments", "_tags"  # fields that actions add to records; no domain has such names


class ToolError(Exception):
    """The tool refuses a call; the message becomes the result of the call, so it is no error of this program."""


@dataclass
class World:
    """The records of one conversation, by subject and id, and the execution of calls on them."""

    rng: random.Random
    records: dict[str, dict[str, Record]] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)  # names of tools that fail once, as if a server were down
    before_calls: "list[World] | None" = None  # copies of the world before each call; None: none are made

    def put(self, subject: str, domain: str, fields: Record | None = None, record_id: str | None = None) -> str:
        """Adds a record with the fields of its domain, of which `fields` sets some; returns the id."""
        records = self.records.setdefault(subject, {})
        record_id = record_id or self._free_id(records)
        records[record_id] = {name: draw(kind, self.rng).json for name, kind in fields_of(domain)} | (fields or {})
        return record_id

    def execute(self, specification: Specification, call: Call) -> Json:
        """Returns the result of a call, which may add, change or delete records.

        Args:
            call: fits the tool's schema.

        Raises:
            ToolError: the tool is busy (only this time), there is no record with that id, or none that `newest` asks
                for.
        """
        if self.before_calls is not None:
            self.before_calls.append(self.copy())

        # A busy tool fails once; the repeated call succeeds.
        if call.name in self.busy:
            self.busy.remove(call.name)
            raise ToolError("the server is busy, try again")

        arguments = values_of(specification, call.arguments)

        if specification.family != "record":
            return formula_of(specification.action).run(arguments)

        id_parameter = specification.id_parameter
        if id_parameter is None:
            return self._without_id(specification, arguments)

        record_id = arguments.pop(id_parameter.name)
        return self._with_id(specification, record_id, arguments)

    def copy(self) -> "World":
        """Returns a world of its own in the same state, which makes no copies."""
        rng = random.Random()  # noqa: S311  (text, not secrets)
        rng.setstate(self.rng.getstate())
        return World(rng, deepcopy(self.records), {*self.busy})

    def _without_id(self, specification: Specification, arguments: Record) -> Json:
        """Executes a call that names no record: it creates one, or counts or finds those that meet all conditions.

        Arguments that are fields of the record are the new record's values, or conditions. An optional argument with
        its default value is no condition.

        Returns:
            By the action, `{"id": new id}` for `create` and `{"count": number}` for `count`. `newest` gives
            `{"id": id}` of the record that was added last. `search` gives `{"ids": [...]}`, the first `limit` ids (10
            without that argument) in the order in which records were added, perhaps none.

        Raises:
            ToolError: `newest`, and no record fits.
        """
        records = self.records.setdefault(specification.subject, {})
        field_names = {name for name, _ in fields_of(specification.domain)}
        fields = {name: value for name, value in arguments.items() if name in field_names}

        # Arguments such as `notify` are no fields of the record.
        if specification.action == "create":
            return {"id": self.put(specification.subject, specification.domain, fields)}

        # The other actions search; `limit` and the like are no conditions.
        conditions = _conditions(specification, fields)
        matching = [
            record_id
            for record_id, record in records.items()
            if all(record.get(name) == condition for name, condition in conditions.items())
        ]

        if specification.action == "count":
            return {"count": len(matching)}

        if specification.action == "newest":
            if not matching:
                raise ToolError(f"no {specification.subject} matches")
            return {"id": matching[-1]}

        # An invented field may be called `limit`, too.
        limit = arguments.get("limit", 10)
        return {"ids": matching[:limit] if isinstance(limit, int) else matching[:10]}

    def _with_id(self, specification: Specification, record_id: str, arguments: Record) -> Json:
        """Reads, changes or deletes a record, and returns what the tool says of it.

        Raises:
            ToolError: there is no such record; the message names one whose id has the same characters.
        """
        records = self.records.setdefault(specification.subject, {})
        if record_id not in records:
            # A mistyped id has the characters of the right one, in another order.
            similar = [other_id for other_id in records if sorted(other_id) == sorted(record_id)]
            hint = f", did you mean {similar[0]}?" if similar else ""
            raise ToolError(f"no {specification.subject} {record_id}{hint}")

        record = records[record_id]
        action = specification.action

        if action == "lookup":
            fields = [name for name, kind in fields_of(specification.domain) if kind not in ("address", "size")]
            # Three fields, whose position depends on the subject alone.
            start = len(specification.subject) % (len(fields) - 2)
            return {name.replace(" ", "_"): record[name] for name in fields[start : start + 3]}

        if action == "delete":
            del records[record_id]
            return {"deleted": record_id}

        if action == "update":
            record.update(arguments)
            return {"id": record_id, "updated": len(arguments)}

        if action == "comment":
            comments = record[COMMENTS] = [*record.get(COMMENTS, []), arguments["text"]]
            return {"id": record_id, "comments": len(comments)}

        if action == "tag":
            tags = record[TAGS] = list(dict.fromkeys([*record.get(TAGS, []), *arguments["tags"]]))
            return {"id": record_id, "tags": tags}

        # The other actions record their arguments and return what they did.
        record.update(arguments)
        effect = {
            "assign": lambda: {"assignee": arguments["assignee"]},
            "rename": lambda: {"name": arguments["new name"]},
            "approve": lambda: {"approved": True},
            "share": lambda: {"sent_to": arguments["email"]},
            "schedule": lambda: {"day": arguments["day"], "time": arguments["time"]},
            "archive": lambda: {"archived": True},
        }[action]()
        return {"id": record_id, **effect}

    def _free_id(self, records: dict[str, Record]) -> str:
        while True:
            new_id = code(self.rng)
            if new_id not in records:
                return new_id


@dataclass
class Scene:
    """The state of a conversation that a function of `episodes` is writing."""

    rng: random.Random
    world: World
    topics: tuple[Topic, ...]  # all of one shelf
    tools: list[Specification] = field(default_factory=list)
    hidden: set[tuple[str, str]] = field(default_factory=set)  # (thing, action) of tools that must not appear

    def has(self, fits: Callable[[Topic], bool]) -> bool:
        """Returns whether the shelf has an unused tool whose topic fits."""
        return any(map(fits, self._free()))

    def take(self, fits: Callable[[Topic], bool] = lambda topic: True) -> Specification:
        """Picks an unused tool of the shelf whose topic fits, and adds it to the tools.

        Raises:
            IndexError: there is none; ask `has` first.
        """
        tool = self.pick(fits)
        self.tools.append(tool)
        return tool

    def pick(self, fits: Callable[[Topic], bool] = lambda topic: True) -> Specification:
        """Returns an unused tool of the shelf whose topic fits, without adding it to the tools.

        Raises:
            IndexError: there is none; ask `has` first.
        """
        free = [topic for topic in self._free() if fits(topic)]

        # Few topics compute, so they get a fixed share; otherwise they would hardly occur.
        computed = [topic for topic in free if topic.family != "record"]
        records = [topic for topic in free if topic.family == "record"]
        candidates = records
        if computed and (not records or self.rng.random() < COMPUTED):
            candidates = computed

        weights = [1 + (topic.action in RICH) for topic in candidates]
        return specification(self.rng.choices(candidates, weights)[0], self.rng.randrange(VARIANTS))

    def add_others(self, count: int) -> None:
        """Adds up to `count` tools that are not needed; half of them are for the subject of a needed one.

        One whose name is taken is left out.

        Raises:
            IndexError: the shelf has no unused tool.
        """
        # Tools that differ by their action alone are the hardest to tell apart.
        subjects = {tool.subject for tool in self.tools}

        for _ in range(count):
            related = [topic for topic in self._free() if topic.subject in subjects]
            if related and self.rng.random() < 0.5:
                chosen = specification(self.rng.choice(related), self.rng.randrange(VARIANTS))
            else:
                chosen = self.pick()

            # Two tools of one name could not be told apart by a call.
            if chosen.tool.name not in {tool.tool.name for tool in self.tools}:
                self.tools.append(chosen)

    def _distinct_value(self, arguments: ArgumentValues, kind: str) -> Value:
        """Returns a value that no other argument of the kind has: no request asks for the rate from EUR to EUR."""
        used = [value.json for parameter, value in arguments.items() if parameter.kind == kind]
        tries = (draw(kind, self.rng) for _ in range(TRIES))
        distinct = (value for value in tries if kind == "flag" or value.json not in used)
        return next(distinct, draw(kind, self.rng))

    def _free(self) -> list[Topic]:
        used = {(tool.subject, tool.action) for tool in self.tools} | self.hidden
        return [topic for topic in self.topics if (topic.subject, topic.action) not in used]

    def arguments(self, tool: Specification, without: Iterable[str] = ()) -> ArgumentValues:
        """Returns values for a call of `tool`, in the order of the request; adds the records that the call finds.

        Args:
            without: names of arguments to leave out.
        """
        arguments: ArgumentValues = {}

        for parameter in tool.parameters:
            if parameter.name in without or not (parameter.required or self.rng.random() < OPTIONAL):
                continue

            if parameter.kind == "record":
                # The record must exist, or the call would fail.
                record_id = self.world.put(tool.subject, tool.domain)
                arguments[parameter] = sometimes_quoted(record_id, self.rng, 0.2)
            else:
                arguments[parameter] = self._distinct_value(arguments, parameter.kind)

        # Some records meet the conditions, so most searches find one.
        if tool.action in CONDITIONS:
            conditions = {parameter.name: value.json for parameter, value in arguments.items()}
            for _ in range(self.rng.randint(1, 3)):
                self.world.put(tool.subject, tool.domain, conditions)

        return in_request_order(arguments, self.rng)


def call_of(tool: Specification, arguments: ArgumentValues) -> Call:
    """Returns the call with these arguments, in the order of the schema."""
    return Call(tool.tool.name, arguments_of(tool.parameters, arguments))


def record_of(tool: Specification, arguments: ArgumentValues) -> str | None:
    """Returns the id of the record that a call is about; None if it is about none."""
    return next((str(value.json) for parameter, value in arguments.items() if parameter.kind == "record"), None)


def with_record(tool: Specification, arguments: ArgumentValues, record_id: Json) -> ArgumentValues:
    """Returns `arguments` with another record, which comes first."""
    record = tool.id_parameter
    assert record is not None
    other_arguments = {parameter: value for parameter, value in arguments.items() if parameter.kind != "record"}
    return {record: Value(record_id, str(record_id))} | other_arguments


def in_request_order(arguments: ArgumentValues, rng: random.Random) -> ArgumentValues:
    """Returns the same arguments in a random order that suits a request: first the record, and fields of one object in
    a row."""
    groups: dict[str, list[Parameter]] = {}
    for parameter in arguments:
        groups.setdefault(parameter.inside or parameter.key, []).append(parameter)

    # Sorting is stable: the groups behind the record stay shuffled.
    shuffled = rng.sample(list(groups.values()), len(groups))
    shuffled.sort(key=lambda group: all(parameter.kind != "record" for parameter in group))
    return {parameter: arguments[parameter] for group in shuffled for parameter in _record_first(group, rng)}


def _record_first(group: list[Parameter], rng: random.Random) -> list[Parameter]:
    return sorted(rng.sample(group, len(group)), key=lambda parameter: parameter.kind != "record")


def _conditions(specification: Specification, conditions: Record) -> Record:
    """Returns the conditions of a search, without optional ones at their default."""
    optional = {p.name: p.default for p in specification.parameters if not p.required}
    return {name: value for name, value in conditions.items() if name not in optional or optional[name] != value}
