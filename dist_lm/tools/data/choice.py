"""Which tools a conversation has, and with which arguments they are called."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dist_lm.chat.messages import Call, Json
from dist_lm.tools.data.catalogue import VARIANTS, Topic, specification
from dist_lm.tools.data.execution import World
from dist_lm.tools.data.phrasing import Given
from dist_lm.tools.data.specification import Parameter, Specification, arguments_of
from dist_lm.tools.data.values import Value, draw, quoted

RICH = ("create", "search", "update")  # chosen twice as often: their arguments are of all kinds
CONDITIONS = ("search", "count", "newest")
TRIES = 5  # for a value that is not there yet
OPTIONAL = 0.4  # of optional arguments are given
COMPUTED = 0.3  # of tools are formulas and services, where the shelf has some


@dataclass
class Scene:
    """What a conversation is made from; `tools` grows while it is written."""

    rng: random.Random
    world: World
    topics: tuple[Topic, ...]  # of one shelf
    tools: list[Specification] = field(default_factory=list)
    hidden: set[tuple[str, str]] = field(default_factory=set)  # thing and action of tools it must not have

    def has(self, fits: Callable[[Topic], bool]) -> bool:
        """Whether there is such a tool to take."""
        return any(map(fits, self._free()))

    def take(self, fits: Callable[[Topic], bool] = lambda topic: True) -> Specification:
        """A tool of the shelf whose topic fits; it is among the tools from now on."""
        found = self.pick(fits)
        self.tools.append(found)
        return found

    def pick(self, fits: Callable[[Topic], bool] = lambda topic: True) -> Specification:
        """A tool of the shelf whose topic fits, none like one there is."""
        free = [topic for topic in self._free() if fits(topic)]
        computed = [topic for topic in free if topic.family != "record"]
        records = [topic for topic in free if topic.family == "record"]
        side = computed if computed and (not records or self.rng.random() < COMPUTED) else records
        weights = [2 if topic.action in RICH else 1 for topic in side]
        return specification(self.rng.choices(side, weights)[0], self.rng.randrange(VARIANTS))

    def add_others(self, count: int) -> None:
        """Tools that are not needed: half of them for the same thing as one that is."""
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
        """A value that no other argument of its kind has: nobody asks for the rate from EUR to EUR."""
        taken = [value.json for parameter, value in given.items() if parameter.kind == kind]
        tries = (draw(kind, self.rng) for _ in range(TRIES))
        return next((value for value in tries if kind == "flag" or value.json not in taken), draw(kind, self.rng))

    def _free(self) -> list[Topic]:
        taken = {(tool.thing, tool.action) for tool in self.tools} | self.hidden
        return [topic for topic in self.topics if (topic.thing, topic.action) not in taken]

    def arguments(self, tool: Specification, without: Iterable[str] = ()) -> Given:
        """Values for a call of `tool`, in the order in which they are to be said, and records for it to find.

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
    """`given` with another record, which a request says first."""
    record = tool.id_parameter
    assert record is not None
    others = {parameter: value for parameter, value in given.items() if parameter.kind != "record"}
    return {record: Value(record_id, str(record_id))} | others


def in_turn(given: Given, rng: random.Random) -> Given:
    """As a request says them: in any order, but for a record, which comes first, and for what one object holds, which
    stays together."""
    groups: dict[str, list[Parameter]] = {}
    for parameter in given:
        groups.setdefault(parameter.inside or parameter.key, []).append(parameter)
    shuffled = rng.sample(list(groups.values()), len(groups))
    shuffled.sort(key=lambda group: all(parameter.kind != "record" for parameter in group))
    return {parameter: given[parameter] for group in shuffled for parameter in _record_first(group, rng)}


def _record_first(group: list[Parameter], rng: random.Random) -> list[Parameter]:
    return sorted(rng.sample(group, len(group)), key=lambda parameter: parameter.kind != "record")
