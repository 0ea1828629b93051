"""`python -m dist_lm tools bfcl RUN`: score a model on the single-turn questions of the Berkeley Function Calling
Leaderboard (BFCL).

Calls are scored by BFCL's rules for Python (`bfcl_eval/eval_checker/ast_eval/ast_checker.py`, Apache-2.0), quirks
included. An answer lists the accepted values of each argument, and "" among them if the argument may be left out. An
integer is accepted as a float, but not inside a list. A value may have the type of the accepted values instead of the
declared type (BFCL calls such a value a variable), and is then compared unchanged.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dist_lm.chat.compare import standard_text
from dist_lm.chat.messages import Call, Json, Message
from dist_lm.errors import require
from dist_lm.evaluation.bfcl_questions import BfclAnswer, BfclQuestion, find_data, read_questions
from dist_lm.evaluation.figures import request_of
from dist_lm.evaluation.tasks import BFCL, TURN_TOKENS, Asking, bfcl_items
from dist_lm.evaluation.tool_score import matched
from dist_lm.generation.load import LoadedModel, load_model
from dist_lm.generation.request import only_answers
from dist_lm.generation.session import build_engine
from dist_lm.parallel.mesh import option_device
from dist_lm.storage import durable
from dist_lm.tokenizer.tokenizer import shown

SEQUENCES = 32  # the cache holds this many whole contexts, up to CACHE_TOKENS
CACHE_TOKENS = 65536
FEW_TURNS = 0.1  # a smaller share of parsed turns means that the model has not learned the format
PYTHON_TYPES: dict[str, type] = {  # BFCL's type name -> type of a value
    "string": str,
    "any": str,
    "integer": int,
    "float": float,
    "number": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
}
LISTS = ("array", "tuple")


@dataclass(frozen=True)
class BfclResult:
    """The result of one question."""

    question: BfclQuestion
    right: bool
    is_turn: bool
    found: str  # the text the model wrote; empty if the question was not asked
    note: str = ""  # why it was not asked


def evaluate(path: Path, tokenizer: Path | None, limit: int, json_file: Path | None, device: str) -> None:
    """Run the verb.

    Raises:
        UserError: names the option, the missing package or the fault of the checkpoint.
    """
    require(limit >= 0, "--limit", limit, "0 (all) or a positive integer")
    if json_file:  # checked before the model spends an hour on answers
        require(
            json_file.parent.is_dir() and not json_file.is_dir(), "--json", json_file, "a file in a folder that exists"
        )
    chosen = option_device(device)
    questions = read_questions(find_data(), limit=limit)
    loaded = load_model(path, tokenizer)
    results = answer(questions, loaded, chosen, Console(stderr=True))
    print_table(loaded.name, results, Console(highlight=False))
    if json_file:
        durable.write_text(json_file, "".join(json.dumps(_record(one), ensure_ascii=False) + "\n" for one in results))


def answer(
    questions: Sequence[BfclQuestion], loaded: LoadedModel, device: torch.device, progress: Console
) -> list[BfclResult]:
    """Answer all questions greedily and score the answers. Results are in the order of the questions."""
    tokenizer = loaded.tokenizer
    engine = build_engine(loaded, device, SEQUENCES, CACHE_TOKENS)
    items = bfcl_items(Asking.greedy(tokenizer, loaded.config.max_seq_len, True, TURN_TOKENS), questions)
    found: dict[int, BfclResult] = {}
    for number, item in enumerate(items):
        if item.error:
            found[number] = BfclResult(questions[number], False, False, "", item.error)
        else:
            engine.submit(request_of(number, BFCL, item, 0))
    answers, left = only_answers(engine.results(), loaded.name), len(items) - len(found)
    quiet = not progress.is_terminal
    for done in track(answers, "answering", left, console=progress, disable=quiet, transient=True):
        number = int(done.request)
        record = items[number].judge(done, None)()
        text = shown(done.tokens, tokenizer)
        found[number] = BfclResult(questions[number], record["passed"], record["is_turn"], text)
    return [found[number] for number in range(len(questions))]


def is_right(turn: Message | None, question: BfclQuestion) -> bool:
    """Score a turn; one that does not parse (None) counts as a turn without calls, as on the leaderboard."""
    calls = turn.calls if turn else ()
    if question.category.endswith("irrelevance"):
        return not calls
    if question.category.endswith("relevance"):
        return bool(calls)
    return right_calls(calls, question.answers, question.functions)


def right_calls(calls: Sequence[Call], answers: Sequence[BfclAnswer], functions: Sequence[dict[str, Any]]) -> bool:
    """Whether the calls match `answers` one to one, in any order. `functions`: BFCL's descriptions."""
    described = {function["name"]: function for function in functions}

    def same(call: Call, answer: BfclAnswer) -> bool:
        ((name, allowed),) = answer.items()
        return right_call(call, name, allowed, described[name])

    return len(calls) == len(answers) == matched(calls, answers, same)


def right_call(call: Call, name: str, allowed: dict[str, list[Json]], function: dict[str, Any]) -> bool:
    """Whether a call names the function `name` and its arguments are accepted."""
    described = function["parameters"].get("properties", {})
    given = call.arguments
    if call.name != name or any(key not in given for key in function["parameters"].get("required", [])):
        return False
    for key, value in given.items():
        if key not in described or key not in allowed or not _right_value(value, allowed[key], described[key]):
            return False
    return all(key in given or "" in values for key, values in allowed.items())


def _right_value(value: Json, allowed: list[Json], described: dict[str, Any]) -> bool:
    kind = PYTHON_TYPES[described["type"]]
    inner = PYTHON_TYPES[described["items"]["type"]] if described["type"] in LISTS else None
    if described["type"] == "float" and type(value) is int:
        value = float(value)
    type_of_answers = _type_of(allowed)
    is_variable = type_of_answers not in (None, kind)
    if not (type(value) is kind and (inner is None or _items_fit(value, allowed, inner))):
        if type(value) is not type_of_answers:
            return False
        is_variable = True
    if is_variable:
        return value in allowed
    if kind is dict:
        return any(_right_object(value, one) for one in allowed)
    if kind is list and inner is dict:
        return any(_right_objects(value, one) for one in allowed)
    if kind is str:
        return standard_text(value) in [standard_text(one) for one in allowed if isinstance(one, str)]
    if kind is list:
        return list(map(_standard, value)) in [list(map(_standard, one)) for one in allowed]
    return value in allowed


def _type_of(allowed: list[Json]) -> type | None:
    return next((type(one) for one in allowed if one != ""), None)


def _items_fit(value: list[Json], allowed: list[Json], inner: type) -> bool:
    """Whether, for some accepted list, each item has the declared type or the type of that list's items."""
    return any(
        not isinstance(one, list) or all(type(item) is inner or type(item) is _type_of(one) for item in value)
        for one in allowed
    )


def _right_object(value: dict[str, Json], allowed: Json) -> bool:
    """`allowed`: {key: accepted values}, "" among them if the key may be left out."""
    if not isinstance(allowed, dict):
        return False
    for key, part in value.items():
        if key not in allowed or _standard(part) not in [_standard(one) for one in allowed[key]]:
            return False
    return all(key in value or "" in values for key, values in allowed.items())


def _right_objects(value: list[Json], allowed: Json) -> bool:
    if not isinstance(allowed, list) or len(value) != len(allowed):
        return False
    return all(_right_object(one, other) for one, other in zip(value, allowed, strict=True))


def _standard(value: Json) -> Json:
    return standard_text(value) if isinstance(value, str) else value


def print_table(name: str, results: Sequence[BfclResult], console: Console) -> None:
    """Print a row for each category, and advice if few answers parse or questions were skipped."""
    table = Table(title=f"BFCL, one turn, Python: {name}", title_justify="left")
    table.add_column("category")
    for column in ("questions", "right", "%", "turns, %", "not asked"):
        table.add_column(column, justify="right")
    for category in dict.fromkeys(one.question.category for one in results):
        part = [one for one in results if one.question.category == category]
        right, turns = sum(one.right for one in part), sum(one.is_turn for one in part)
        not_asked = sum(bool(one.note) for one in part)
        shares = (f"{100 * right / len(part):.1f}", f"{100 * turns / len(part):.1f}")
        table.add_row(category, f"{len(part):,}", f"{right:,}", *shares, f"{not_asked:,}" if not_asked else "")
    console.print(table)
    asked, turns = sum(not one.note for one in results), sum(one.is_turn for one in results)
    if turns < FEW_TURNS * asked:
        console.print(
            f"{turns:,} of {asked:,} answers are whole turns: this model has not learned the call format; "
            "train it with stage=tools, or for more stage.steps",
            soft_wrap=True,
        )
    if any(one.note for one in results):
        example = next(one for one in results if one.note)
        console.print(
            f"not asked, and counted as wrong: {example.question.id} ({example.note}), and others", soft_wrap=True
        )


def _record(one: BfclResult) -> dict[str, object]:
    return {
        "category": one.question.category,
        "id": one.question.id,
        "right": one.right,
        "parses": one.is_turn,
        "found": one.found,
        "expected": list(one.question.answers),
        "note": one.note,
    }
