"""What tools do: records that are kept, found and changed, and formulas that are computed."""

import random
from dataclasses import dataclass, field

from dist_lm.chat.messages import Call, Json
from dist_lm.tools.data.catalogue import fields_of, formula_of
from dist_lm.tools.data.specification import Specification, values_of
from dist_lm.tools.data.values import code, draw

Record = dict[str, Json]
COMMENTS, TAGS = "_comments", "_tags"  # of a record: no field has such a name


class ToolFailure(Exception):  # noqa: N818  a tool's own word for what went wrong
    """A call that the tool refuses; the message is its answer."""


@dataclass
class World:
    """The records of one conversation, by thing and id, and what happens to them."""

    rng: random.Random
    records: dict[str, dict[str, Record]] = field(default_factory=dict)
    busy: set[str] = field(default_factory=set)  # tools that fail once, as if a server were down

    def put(self, thing: str, domain: str, known: Record | None = None, record_id: str | None = None) -> str:
        """A new record with the fields of its domain, those in `known` as they are; its id."""
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


def _conditions(specification: Specification, given: Record) -> Record:
    """What a search asks for: optional conditions at their default ask for nothing."""
    optional = {p.name: p.default for p in specification.parameters if not p.required}
    return {name: value for name, value in given.items() if name not in optional or optional[name] != value}
