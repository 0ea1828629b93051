"""Tests that any answer of a kind passes are found by reading them."""

import pytest

from dist_lm.sandbox.program import Test
from dist_lm.sandbox.weak_tests import compares_itself, constant_answer, expects_argument, note_of_weak

# as HumanEval/33
SORTED = "def check(candidate):\n    assert tuple(candidate([3, 1])) == tuple(ordered([3, 1]))\ncheck(ordered)"


def test_a_test_that_compares_the_answer_with_itself_is_found():
    assert compares_itself([Test(code=SORTED)])
    assert compares_itself([Test(code="assert f(1, 2) == 3"), Test(code="assert f(1, 2) == f(2, 1)")])


@pytest.mark.parametrize(
    "code",
    [
        "assert f(g(3)) == 3",
        "assert sorted(f(3)) == list(range(3))",
        "from collections import Counter\nassert f('a') == Counter('a')",
        "def right(x): return x\nassert f(3) == right(3)",
        "assert f(3) == f(2) + 1",
        "import math\nassert f(3) == math.sqrt(9)",
    ],
)
def test_a_comparison_with_another_value_is_none_with_itself(code: str):
    assert not compares_itself([Test(code=code)])


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("v = [3, 1]\nassert ordered(v) == sorted(v)", True),
        ("for n in range(9):\n    v = [n, 1]\n    assert ordered(v) == sorted(v)", True),
        ("v = [3, 1]\nassert ordered(v) == [1, 3]", False),
        ("v = [3, 1]\nw = sorted(v)\nassert ordered(v) == w", False),
        ("v = 'ba'\nassert ordered(v) == sorted(v)", False),
    ],
)
def test_an_expected_value_of_a_changed_argument_is_found(code: str, found: bool):
    assert expects_argument([Test(code=code)]) is found


@pytest.mark.parametrize(
    ("language", "codes", "value"),
    [
        ("python", ["assert f(1) == 3"], "3"),
        ("python", ["assert f(1) == [3]", "assert f(2) == [3]\nassert f(3) == [3]"], "[3]"),
        (
            "python",
            ["def check(candidate):\n    assert candidate(1) is True\n    assert candidate(2)\ncheck(f)"],
            "True",
        ),
        ("python", ["assert f(1) == 3", "assert f(2) == 4"], None),
        ("python", ["assert f(1) == 3", "assert f(2) != 3"], None),
        ("python", ["assert f(1) == 3", "f(2)"], None),
        ("python", ["values = [1]\nassert f(values) == 3"], None),
        ("python", ["assert isinstance(f(1), int)"], None),
        ("bash", ["[ \"$(f 1)\" = '3' ]", "[[ $(f 2) == 3 ]]"], "3"),
        ("bash", ["[ \"$(f 1)\" = '3' ] && [ \"$(f 2)\" = '4' ]"], None),
        ("bash", ["cd /tmp && f x && [ -d x ]"], None),
        ("sql", ["SELECT count(*) = 3 FROM t"], None),
    ],
)
def test_a_task_that_a_constant_answer_passes_is_found(language: str, codes: list[str], value: str | None):
    assert constant_answer(language, [Test(code=code) for code in codes]) == value


def test_equal_outputs_are_a_constant_answer():
    assert constant_answer("sql", [Test(before="a", stdout="3\n"), Test(before="b", stdout="3")]) == "3"
    assert constant_answer("sql", [Test(stdout="3"), Test(stdout="4")]) is None


def test_a_note_names_some_tasks_of_each_kind():
    constant = {f"line {number}": ("python", [Test(code="assert f(1) == 3")]) for number in range(5)}
    fine = {"line 9": ("python", [Test(code="assert f(1) == 3"), Test(code="assert f(2) == 6")])}
    assert note_of_weak({**constant, "line 7": ("python", [Test(code=SORTED)]), **fine}) == (
        "tests of line 7 compare the answer with itself; a constant answer passes line 0, line 1, line 2 and 2 more"
    )
    assert note_of_weak(fine) == ""
