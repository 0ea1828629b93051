"""No answer passes without solving its task, whatever it does to the test; answers that solve it pass.

A forgery is a row of `python_answers`, `bash_answers` or `sql_answers`. It must get 0 from `rlhf.rewards` of kind
`tests`: no test may pass, and what a program does is no error of the sandbox, which would give no score.
"""

import shutil
from collections.abc import Iterator

import pytest

from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.rlhf.rules import RuleInput, Score, TestsRule
from tests.forgery.bash_answers import BASH
from tests.forgery.forgery import Forgery
from tests.forgery.kinds import KINDS
from tests.forgery.python_answers import PYTHON
from tests.forgery.sql_answers import SQL
from tests.patience import patient

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
FORGERIES = [(forgery, kind) for forgery in (*PYTHON, *BASH, *SQL) for kind in forgery.kinds]
SPREAD = {
    (forgery.name, forgery.kinds[number % len(forgery.kinds)]) for number, forgery in enumerate((*PYTHON, *BASH, *SQL))
}
HONEST = [(kind, number) for kind, fields in KINDS.items() for number in range(len(fields.honest))]


def part(wall_s: float, cpu_s: float) -> RewardPartConfig:
    return RewardPartConfig(kind="tests", cpu_s=cpu_s, wall_s=wall_s, workers=1)


@pytest.fixture(scope="module")
def rules() -> Iterator[dict[str, TestsRule]]:
    parts = {"forged": part(patient(3), 0.5), "waits": part(patient(1.5), 0.5), "honest": part(patient(30), 2.0)}
    rules = {name: TestsRule("rlhf.rewards.forgery", keys, KINDS, False) for name, keys in parts.items()}  # pyright: ignore[reportArgumentType]
    yield rules
    for rule in rules.values():
        rule.close()


def score(rule: TestsRule, kind: str, code: str) -> Score:
    fence = f"```{KINDS[kind].language}\n{code}\n```"
    return next(rule([RuleInput(kind, fence, 1, True)], lambda: None))


def named(forgery: Forgery, kind: str):
    # A kind of task for each forgery is quick, all kinds in turn; the rest are the same attacks on other tests.
    marks = () if (forgery.name, kind) in SPREAD else pytest.mark.bars
    return pytest.param(forgery, kind, id=f"{forgery.name}-{kind}", marks=marks)


@pytest.mark.parametrize(("forgery", "kind"), [named(*pair) for pair in FORGERIES])
def test_no_forgery_passes_a_test(forgery: Forgery, kind: str, rules: dict[str, TestsRule]):
    answer = forgery.answer(KINDS[kind].function, KINDS[kind].stub)
    assert score(rules["waits" if forgery.waits else "forged"], kind, answer) == 0.0


@pytest.mark.parametrize(("kind", "number"), HONEST)
def test_an_answer_that_solves_its_task_passes(kind: str, number: int, rules: dict[str, TestsRule]):
    assert score(rules["honest"], kind, KINDS[kind].honest[number]) == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_wrong_answer_that_forgeries_use_passes_no_test(kind: str, rules: dict[str, TestsRule]):
    assert score(rules["honest"], kind, KINDS[kind].stub) == 0.0
