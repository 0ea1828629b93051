"""Scores turns by the rules of the Berkeley Function Calling Leaderboard (BFCL) for Python.

The rules are those of `bfcl_eval/eval_checker/ast_eval/ast_checker.py` (Apache-2.0), quirks included. An answer lists
the accepted values of each argument, and "" among them if the argument may be left out. An integer is accepted as a
float, but not inside a list. An argument may have the type of the accepted values instead of the declared type (BFCL
calls such an argument a variable), and is then compared unchanged.
"""

from collections.abc import Sequence
from typing import Any

from dist_lm.chat.compare import standard_text
from dist_lm.chat.messages import Call, Json, Message
from dist_lm.evaluation.bfcl_questions import BfclAnswer, BfclQuestion
from dist_lm.evaluation.tool_score import matched

PYTHON_TYPES: dict[str, type] = {  # BFCL's type name -> type of an argument
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


def is_right(turn: Message | None, question: BfclQuestion) -> bool:
    """Whether a turn is right; one that does not parse (None) counts as a turn without calls, as on the leaderboard."""
    calls = turn.calls if turn else ()
    # Asked first, because this name ends like the other one.
    if question.category.endswith("irrelevance"):
        return not calls
    if question.category.endswith("relevance"):
        return bool(calls)
    return right_calls(calls, question.answers, question.functions)


def right_calls(calls: Sequence[Call], answers: Sequence[BfclAnswer], functions: Sequence[dict[str, Any]]) -> bool:
    """Returns whether the calls match `answers` one to one, in any order. `functions` are BFCL's descriptions."""
    function_of = {function["name"]: function for function in functions}

    def same(call: Call, answer: BfclAnswer) -> bool:
        ((name, accepted),) = answer.items()
        return right_call(call, name, accepted, function_of[name])

    return len(calls) == len(answers) == matched(calls, answers, same)


def right_call(call: Call, name: str, accepted: dict[str, list[Json]], function: dict[str, Any]) -> bool:
    """Returns whether a call names the function `name` and its arguments are accepted.

    Args:
        accepted: accepted values by argument; "" among them: it may be left out. An argument that it lacks is wrong.
        function: BFCL's description.
    """
    parameters = function["parameters"].get("properties", {})
    required = function["parameters"].get("required", [])
    if call.name != name or any(key not in call.arguments for key in required):
        return False
    for key, argument in call.arguments.items():
        if key not in parameters or key not in accepted or not _right_value(argument, accepted[key], parameters[key]):
            return False
    return all(key in call.arguments or "" in accepted_values for key, accepted_values in accepted.items())


def _right_value(argument: Json, accepted: list[Json], parameter: dict[str, Any]) -> bool:
    """Returns whether an argument is accepted, by BFCL's rules for its declared type; see the module."""
    declared = PYTHON_TYPES[parameter["type"]]
    declared_element = PYTHON_TYPES[parameter["items"]["type"]] if parameter["type"] in LISTS else None
    if parameter["type"] == "float" and type(argument) is int:
        argument = float(argument)

    # An argument of another type than declared may still have the type of the accepted values.
    accepted_type = _type_of(accepted)
    is_variable = accepted_type not in (None, declared)
    has_declared_type = type(argument) is declared
    if has_declared_type and declared_element is not None:
        has_declared_type = _elements_fit(argument, accepted, declared_element)
    if not has_declared_type:
        if type(argument) is not accepted_type:
            return False
        is_variable = True
    if is_variable:
        return argument in accepted

    if declared is dict:
        return any(_right_object(argument, candidate) for candidate in accepted)
    if declared is list and declared_element is dict:
        return any(_right_objects(argument, candidate) for candidate in accepted)
    if declared is str:
        return standard_text(argument) in [standard_text(text) for text in accepted if isinstance(text, str)]
    if declared is list:
        return list(map(_standard, argument)) in [list(map(_standard, candidate)) for candidate in accepted]
    return argument in accepted


def _type_of(accepted: list[Json]) -> type | None:
    """Returns the type of the first accepted value; "" stands for a missing argument and does not count."""
    return next((type(candidate) for candidate in accepted if candidate != ""), None)


def _elements_fit(argument: list[Json], accepted: list[Json], declared: type) -> bool:
    """Whether, for some accepted list, each element has the declared type or the type of that list's elements."""
    return any(
        not isinstance(candidate, list)
        or all(type(element) is declared or type(element) is _type_of(candidate) for element in argument)
        for candidate in accepted
    )


def _right_object(argument: dict[str, Json], accepted: Json) -> bool:
    """Returns whether an object is right: each key has an accepted value, and none that is needed is missing.

    Args:
        accepted: {key: accepted values}, "" among them if the key may be left out; anything else: not right.
    """
    if not isinstance(accepted, dict):
        return False
    for key, part in argument.items():
        if key not in accepted or _standard(part) not in [_standard(candidate) for candidate in accepted[key]]:
            return False
    return all(key in argument or "" in accepted_values for key, accepted_values in accepted.items())


def _right_objects(argument: list[Json], accepted: Json) -> bool:
    if not isinstance(accepted, list) or len(argument) != len(accepted):
        return False
    return all(_right_object(element, candidate) for element, candidate in zip(argument, accepted, strict=True))


def _standard(part: Json) -> Json:
    if isinstance(part, str):
        return standard_text(part)
    return part
