"""A person's reward function in a process of its own: what it may do wrong, and that it never becomes a number."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.rlhf.reward_forms import Judged, form_of
from dist_lm.rlhf.reward_function import answers
from dist_lm.rlhf.rewards import Judge
from dist_lm.rlhf.rules import Failure, FunctionRule, RewardError, RuleInput
from tests.patience import patient
from tests.rlhf import toy_rewards
from tests.rlhf.toy import rollouts_with

ORDERS = "tests.rlhf.toy_rewards:by_order"
KEY = "rlhf.rewards.mine.function"
PATIENT_S = patient(60.0)  # nothing that answers may take so long, on a loaded machine either


@pytest.fixture
def rule_of() -> Iterator[Callable[..., FunctionRule]]:
    made: list[FunctionRule] = []

    def make(function: str = ORDERS, timeout_s: float = PATIENT_S) -> FunctionRule:
        made.append(FunctionRule(function, KEY, timeout_s))
        return made[-1]

    yield make
    for rule in made:
        rule.close()


def asked(rule: FunctionRule, *orders: str) -> list[float | str | None]:
    """The scores, and the reasons where there is none."""
    judged = [RuleInput("", order, 1, True) for order in orders]
    scores = list(rule(judged, lambda: None))
    return [score.reason if isinstance(score, Failure) else score for score in scores]


def test_all_that_a_function_can_do_wrong_costs_one_completion_and_is_named(rule_of):
    rule = rule_of()
    wrong = ["raise", "exit", "text", "nan", "die"]
    found = asked(rule, "number 1.5", *(order for one in wrong for order in (one, "print 2")))
    assert found[0] == 1.5
    assert found[2::2] == [2.0] * len(wrong)
    lines = Path(toy_rewards.__file__).read_text().splitlines()
    raises, exits = (lines.index(f"            {line}") + 1 for line in ("return 1 / 0", 'raise SystemExit("no more")'))
    assert found[1::2] == [
        f"ZeroDivisionError: division by zero (toy_rewards.py line {raises})",
        f"SystemExit: no more (toy_rewards.py line {exits})",
        "returned '1.0'; expected a finite number",
        "returned nan; expected a finite number",
        "ended its process (exit code 3)",
    ]


def test_none_says_that_the_function_does_not_apply(rule_of):
    assert asked(rule_of(), "number 1", "nothing", "number 2") == [1.0, None, 2.0]


def test_a_number_that_fp32_does_not_hold_is_no_score(rule_of):
    numbers = ["1e300", "-1e39", "3.5e38", "3.4e38", "1e-300"]
    assert asked(rule_of(), *(f"number {number}" for number in numbers)) == [
        *(
            f"returned {number}; expected a number within the range of fp32"
            for number in ("1e+300", "-1e+39", "3.5e+38")
        ),
        3.4e38,
        1e-300,
    ]


def test_a_function_that_hangs_is_ended_and_started_again(rule_of):
    rule = rule_of(timeout_s=5.0)
    before, hung, after = asked(rule, "process", "hang", "process")
    assert hung == "took longer than 5 s and was ended"
    assert before != after
    assert asked(rule, "process") == [after]  # kept from batch to batch


def test_a_batch_that_is_given_up_leaves_no_answers_for_the_next(rule_of):
    rule = rule_of()
    judged = [RuleInput("", f"number {i}", 1, True) for i in range(8)]
    given_up = rule(judged, lambda: None)
    assert next(iter(given_up)) == 0.0
    given_up.close()
    assert asked(rule, "number 9") == [9.0]


def test_who_waits_for_a_function_is_known_to_be_alive(rule_of):
    beats: list[None] = []
    assert list(rule_of()([RuleInput("", "number 1", 1, True)], lambda: beats.append(None))) == [1.0]
    assert beats


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no.such.module:score", "ModuleNotFoundError: No module named 'no'"),
        ("tests.rlhf.toy_rewards:absent", "AttributeError: .*absent"),
    ],
)
def test_a_function_that_its_process_cannot_import_ends_the_run(rule_of, function, message):
    with pytest.raises(RewardError, match=rf"^{KEY}={function}: {message}"):
        asked(rule_of(function), "number 1")


def test_numbers_of_other_libraries_are_numbers():
    import numpy as np

    def answer(value: object) -> dict[str, Any]:
        def score(request: str, completion: str) -> object:
            return value

        return answers(score, form_of(score), [Judged("", "")])[0]

    for value, expected in ((np.float32(0.5), 0.5), (np.int64(2), 2.0), (True, 1.0)):
        assert answer(value) == {"value": expected}
    for value in ([1.0], 10**400, float("inf"), 1j):
        assert "failure" in answer(value)


def judge_of(orders: list[str], max_failed_fraction: float) -> tuple[Judge, Callable[[], object]]:
    parts = {
        "mine": RewardPartConfig(kind="function", function=ORDERS, timeout_s=PATIENT_S),
        "size": RewardPartConfig(kind="length", target=1),
    }
    rollouts = rollouts_with([1] * len(orders), [1] * len(orders), positions=[10 + i for i in range(len(orders))])
    texts = iter([text for order in orders for text in ("", order)])
    judge = Judge(parts, lambda tokens: next(texts), max_failed_fraction)
    return judge, lambda: judge(rollouts)


def test_a_completion_without_a_score_is_named_with_function_prompt_and_reason(caplog):
    judge, run = judge_of(["number 1", "raise", "number 3", "number 4"], 0.25)
    with judge, caplog.at_level(logging.WARNING):
        judged = run()
    assert [str(score) for score in judged.scores["mine"]] == ["1.0", "nan", "3.0", "4.0"]
    assert judged.scores["size"].tolist() == [1.0] * 4
    (line,) = (record.getMessage() for record in caplog.records)
    named, _, rest = line.partition(" (toy_rewards.py line ")
    assert named == f"{KEY}={ORDERS} has no score for prompt 11, sample 0: ZeroDivisionError: division by zero"
    assert rest.endswith("); the completion is left out")


def test_more_failures_than_allowed_stop_the_run_with_the_reason():
    judge, run = judge_of(["number 1", "raise", "nan", "number 4"], 0.25)
    reason = r"prompt 12, sample 0: returned nan.* 2 of 4 .* above rlhf\.max_failed_fraction=0\.25"
    with judge, pytest.raises(RewardError, match=rf"^{KEY}={ORDERS} has no score for {reason}"):
        run()
