"""Finds tests that say little about an answer, by reading them: nothing is executed.

A test that compares the answer with itself holds for every constant (HumanEval/33). One that computes the expected
value from a list after the answer had it holds for an answer that empties the list and returns it. If all tests of a
task expect the same value, an answer that always gives this value passes. A form of test that is not known here is not
weak.
"""

import ast
import builtins
import re
from collections.abc import Iterable, Mapping, Sequence

from dist_lm.sandbox.program import Test

NAMED = 3  # tasks of each kind that a message names
_BASH_TEST = re.compile(r"""\[\[? "?\$\([^()]*\)"? (?:==?|-eq) (\$?'[^']*'|"[^"$`]*"|[\w.-]+) \]\]?""")


def note_of_weak(tasks: Mapping[str, tuple[str, Sequence[Test]]]) -> str:
    """Returns a note that names some of the weak tasks of a file; empty: there are none.

    A task is weak if a test in Python compares the answer with itself (`compares_itself`) or with an argument that the
    answer may have changed (`expects_argument`), or if a constant answer passes, in any language (`constant_answer`).
    The note has a clause for each of these kinds that occurs, in this order and joined by semicolons, each with the
    first `NAMED` tasks and the number of the others. A task may be in several clauses.

    Args:
        tasks: name -> language and tests.

    Raises:
        SyntaxError: a Python test cannot be parsed; one that `task.refuse_broken` accepts always can.
    """
    same = [name for name, (language, tests) in tasks.items() if language == "python" and compares_itself(tests)]
    changed = [name for name, (language, tests) in tasks.items() if language == "python" and expects_argument(tests)]
    constant = [name for name, (language, tests) in tasks.items() if constant_answer(language, tests) is not None]
    notes = []
    if same:
        notes.append(f"tests of {_some(same)} compare the answer with itself")
    if changed:
        notes.append(
            f"tests of {_some(changed)} compute what they expect from an argument that the answer may have changed"
        )
    if constant:
        notes.append(f"a constant answer passes {_some(constant)}")
    return "; ".join(notes)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def only_defines(code: str) -> bool:
    """Returns whether code of Python defines and imports, and does nothing else, as functions for pytest do."""
    return all(isinstance(node, _DEFINITIONS) or _is_text(node) for node in ast.parse(code).body)


_DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom | ast.Pass


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def compares_itself(tests: Iterable[Test]) -> bool:
    """Returns whether an assertion of some test of Python compares two values of functions that the test does not
    define itself, and nothing else."""
    for test in tests:
        tree = ast.parse(test.code)
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
        defined |= {alias.asname or alias.name for node in imports for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare) and len(node.test.comparators) == 1:
                sides = node.test.left, node.test.comparators[0]
                left, right = (_called(side) - defined for side in sides)
                if left and right and all(_is_constant_but_calls(side) for side in sides):
                    return True
    return False


def expects_argument(tests: Iterable[Test]) -> bool:
    """Returns whether some test of Python compares a call with a value computed from a list, set or dict that the test
    made and gave to the call as an argument."""
    for test in tests:
        tree = ast.parse(test.code)
        assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
        changeable = {
            target.id
            for assignment in assignments
            for target in assignment.targets
            if isinstance(target, ast.Name) and isinstance(assignment.value, _CHANGEABLE)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Call):
                arguments = {argument.id for argument in node.left.args if isinstance(argument, ast.Name)}
                expected = {
                    name.id for side in node.comparators for name in ast.walk(side) if isinstance(name, ast.Name)
                }
                if arguments & expected & changeable:
                    return True
    return False


_CHANGEABLE = ast.List | ast.Set | ast.Dict | ast.ListComp | ast.SetComp | ast.DictComp


def constant_answer(language: str, tests: Sequence[Test]) -> str | None:
    """Returns the value that all tests of a task expect, as text of its language; None: they differ, or their form is
    not known."""
    expected = {value for test in tests for value in _expected(language, test)}
    if len(expected) == 1:
        return expected.pop()
    return None


def _expected(language: str, test: Test) -> list[str | None]:
    """Returns the values that a test compares the answer with, in the order of the test.

    A value of Python is written as `repr` does, one of Bash without its quotes. None stands for each statement whose
    form is not known; Python's imports do not count. The list is empty if a test in Python or Bash has no such
    statement. An expected output is the only value of its test, without blanks around it, and code beside it counts as
    one None. Python's `assert f(x)` expects `True`, `assert not f(x)` expects `False`. Code of SQL is one None.

    Raises:
        SyntaxError: the code of a test in Python cannot be parsed.
    """
    if test.stdout is not None:
        return [test.stdout.strip(), *([None] if test.code else [])]
    if language == "python":
        return _expected_in_python(test.code)
    if language == "bash":
        conditions = [part.strip() for part in re.split(r"&&|\n", test.code) if part.strip()]
        matches = [_BASH_TEST.fullmatch(condition) for condition in conditions]
        return [match and match[1].removeprefix("$").strip("'\"") for match in matches]
    return [None]


def _expected_in_python(code: str) -> list[str | None]:
    """Returns the literal that each assertion compares a call with, as `repr` writes it; None for any other statement
    or assertion. Imports do not count."""
    tree = ast.parse(code)
    statements = tree.body
    # HumanEval's tests are the body of `check`.
    checks = [node for node in statements if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if checks:
        statements = [node for node in checks[-1].body if not isinstance(node, ast.Expr | ast.Pass)]

    values: list[str | None] = []
    for node in statements:
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        values.append(_expected_by(node.test) if isinstance(node, ast.Assert) else None)
    return values


def _expected_by(condition: ast.expr) -> str | None:
    """Returns the literal that a condition compares a call with: `f(x) == 3` gives `3`, `f(x)` gives `True`, `not f(x)`
    gives `False`; None for any other condition."""
    if isinstance(condition, ast.Call):
        return "True" if isinstance(condition.func, ast.Name) and not _called_in_arguments(condition) else None
    if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
        return "False" if isinstance(condition.operand, ast.Call) else None
    if not isinstance(condition, ast.Compare) or len(condition.ops) != 1:
        return None
    if not isinstance(condition.left, ast.Call) or not isinstance(condition.ops[0], ast.Eq | ast.Is):
        return None
    try:
        return repr(ast.literal_eval(condition.comparators[0]))
    except (ValueError, TypeError, MemoryError, RecursionError):
        return None


def _called(node: ast.AST) -> set[str]:
    """Returns the names of functions that an expression calls, built-in ones left out."""
    calls = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
    return {name.id for name in calls if isinstance(name, ast.Name)} - {*dir(builtins)}


def _called_in_arguments(call: ast.Call) -> bool:
    return any(isinstance(node, ast.Call) for argument in call.args for node in ast.walk(argument))


def _is_constant_but_calls(side: ast.expr) -> bool:
    """Whether nothing of a side but its calls could tell a wrong answer from a right one: it has no operators."""
    return not any(isinstance(node, ast.BinOp | ast.BoolOp | ast.Compare) for node in ast.walk(side))
