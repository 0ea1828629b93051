"""Executed code as a reward: scores, bombs, errors of the sandbox, and runs beside generation."""

import shutil
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_lm.generation.request import Answer, Request
from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.rlhf.rewards import Judge, RewardError, Tasks
from dist_lm.rlhf.rules import Failure, RuleInput, TestsRule
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import Limits, Program, Test, Verdict, infrastructure_error
from dist_lm.sandbox.task import Task, task_of
from tests.rlhf.toy import PROMPTS, TOKENS, EngineRollouts, Toy, engine_of, rollouts_with, supply_in, toy

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
PATIENT = RewardPartConfig(kind="tests", cpu_s=2.0, wall_s=60.0, workers=2)
ADD = Task("python", (Test(code="assert add(1, 2) == 3"), Test(code="assert add(0, 0) == 0"), Test(code="add(1, 'a')")))
TASKS = {"add": ADD, "double": Task("bash", (Test(stdin="2", stdout="4"), Test(stdin="5", stdout="10")))}
RIGHT = "```python\ndef add(a, b):\n    return a + b\n```"


@pytest.fixture
def rule_of() -> Iterator:
    made: list[TestsRule] = []

    def make(**keys) -> TestsRule:
        made.append(TestsRule("rlhf.rewards.mine", replace(PATIENT, **keys), TASKS, trust_me=False))
        return made[-1]

    yield make
    for rule in made:
        rule.close()


def asked(rule: TestsRule, *answers: tuple[str, str]) -> list:
    judged = [RuleInput(prompt, answer, 1, True, position) for position, (prompt, answer) in enumerate(answers)]
    return list(rule(judged, lambda: None))


def test_score_is_the_share_of_tests_passed_or_all(rule_of):
    answers = [
        ("add", RIGHT),
        ("add", "def add(a, b): return 0"),
        ("add", "no code"),
        ("double", "echo $((2 * $(cat)))"),
    ]
    assert asked(rule_of(), *answers) == [pytest.approx(2 / 3), pytest.approx(2 / 3), 0.0, 1.0]
    assert asked(rule_of(score="all"), *answers) == [0.0, 0.0, 0.0, 1.0]


def test_a_bomb_scores_0_and_changes_no_other(rule_of):
    rule = rule_of(cpu_s=0.2)
    found = asked(rule, ("double", "while :; do :; done"), ("double", "tail /dev/zero"), ("double", "echo 4"))
    assert found == [0.0, 0.0, 0.5]


def test_an_error_of_the_sandbox_is_no_score(rule_of, monkeypatch):
    rule = rule_of()
    run = SandboxPool._run

    def broken(pool: SandboxPool, program: Program, limits: Limits) -> Verdict:
        return infrastructure_error(program, "no core") if program.source == "x" else run(pool, program, limits)

    monkeypatch.setattr(SandboxPool, "_run", broken)
    failed, fine = asked(rule, ("double", "x"), ("double", "echo 4"))
    assert failed == Failure("the sandbox failed: no core")
    assert fine == 0.5


def test_a_verdict_that_ends_with_a_timeout_is_not_waited_for(rule_of, monkeypatch):
    def lost(pool: SandboxPool, program: Program, limits: Limits) -> Verdict:
        raise TimeoutError("connection timed out")

    monkeypatch.setattr(SandboxPool, "_run", lost)
    looks = iter(range(100))
    judged = [RuleInput("double", "echo 4", 1, True, 0)]
    with pytest.raises(TimeoutError, match="connection timed out"):
        list(rule_of()(judged, lambda: next(looks)))


def test_a_prompt_without_tests_is_refused(rule_of):
    with pytest.raises(RewardError, match=r"rlhf\.rewards\.mine: no tests for the prompt 'other'"):
        asked(rule_of(), ("other", RIGHT))


def test_programs_start_while_completions_are_drawn_and_run_once(rule_of, monkeypatch):
    """What began before is not run again when it is judged."""
    rule, ran = rule_of(), []
    submit = SandboxPool.submit

    def counted(pool: SandboxPool, program: Program, limits: Limits):
        ran.append(program)
        return submit(pool, program, limits)

    monkeypatch.setattr(SandboxPool, "submit", counted)
    judged = [RuleInput("double", f"echo {n}", 1, True, n) for n in (4, 10)]
    for one in judged:
        rule.begin(one)
    assert len(ran) == 2
    assert list(rule(judged, lambda: None)) == [0.5, 0.5]
    assert len(ran) == 2
    assert asked(rule, ("double", "echo 4")) == [0.5]  # another position: no program of before
    assert len(ran) == 3


def test_a_judge_begins_with_the_texts_that_it_judges_later():
    texts = {(1,): "double", (2, 3): "echo 4", (2,): "echo 10"}
    decode = lambda tokens: texts[tuple(tokens)]  # noqa: E731
    parts = {"mine": PATIENT, "short": RewardPartConfig(kind="length", target=1)}
    with Judge(parts, decode, 0.0, tasks=Tasks(TASKS)) as judge:
        made = rollouts_with([1, 1], [2, 1])
        made = replace(made, tokens_N=np.array([1, 2, 3, 1, 2]))
        request = Request("0", [1])
        judge.begin(request, Answer("0", 0, 1, (2, 3), "", (0.0, 0.0), (0.0, 0.0), "eot", 0, 0))
        begun = judge._beside_generation[0]._running
        assert set(begun) == {RuleInput("double", "echo 4", 2, True, 0, 0, request="double")}
        scored = judge(made)
        assert scored.scores["mine"].tolist() == [0.5, 0.5]
        assert {name: mark.tolist() for name, mark in scored.marks.items()} == {
            "forged": [False, False],
            "lookups": [False, False],
        }
        assert not begun


# --- hidden tests ---

SUM_OF_LIST = task_of(
    {
        "language": "python",
        "tests": ["assert f([1, 2]) == 3"],
        "hidden": {
            "solution": "def f(x): return sum(x)",
            "call": "f",
            "arguments": [{"list": {"int": [1, 99]}, "length": [2, 5]}],
        },
    }
)


class Noted:
    """The programs that a rule has submitted, by their source."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.programs: list[Program] = []
        submit = SandboxPool.submit

        def noted(pool: SandboxPool, program: Program, limits: Limits):
            self.programs.append(program)
            return submit(pool, program, limits)

        monkeypatch.setattr(SandboxPool, "submit", noted)

    def tests_of(self, source: str) -> list[tuple[str, ...]]:
        return [tuple(test.code for test in each.tests) for each in self.programs if each.source == source]


def hidden_rule(seed: int) -> TestsRule:
    return TestsRule("rlhf.rewards.mine", PATIENT, {"sum": SUM_OF_LIST}, trust_me=False, seed=seed)


def test_hidden_tests_depend_on_seed_and_position_and_not_on_order(monkeypatch):
    """Found: other tests for the second sample of a group, or after a resumption, which judges without `begin`."""
    noted = Noted(monkeypatch)
    samples = [
        RuleInput("sum", f"def f(x): return sum(x) + {place} - {place}", 1, True, place // 2, place % 2)
        for place in range(4)
    ]
    rule = hidden_rule(seed=3)
    for rollout in samples:
        rule.begin(rollout)
    assert list(rule(samples, lambda: None)) == [1.0] * 4
    rule.close()
    first = {rollout.completion: noted.tests_of(rollout.completion) for rollout in samples}
    a, b, c, d = (tests for [tests] in first.values())
    assert len(a) == 4
    assert a == b
    assert c == d
    assert a[0] == c[0]  # the fixed one
    assert not {*a[1:]} & {*c[1:]}
    assert len([each for each in noted.programs if "sum(x)" in each.source]) == 4 + 2  # one reference a position

    again = hidden_rule(seed=3)
    assert list(again(samples[::-1], lambda: None)) == [1.0] * 4
    again.close()
    assert {name: [tests] * 2 for name, [tests] in first.items()} == {
        rollout.completion: noted.tests_of(rollout.completion) for rollout in samples
    }

    other = hidden_rule(seed=4)
    other.begin(samples[0])
    assert list(other(samples[:1], lambda: None)) == [1.0]
    other.close()
    assert noted.tests_of(samples[0].completion)[-1] != a


def test_a_table_learned_at_one_position_fails_at_another(monkeypatch):
    noted = Noted(monkeypatch)
    rule = hidden_rule(seed=0)
    assert list(rule([RuleInput("sum", "def f(x): return sum(x)", 1, True, 0)], lambda: None)) == [1.0]
    [tests] = noted.tests_of("def f(x): return sum(x)")
    pairs = [test.removeprefix("assert f(").split(") == ") for test in tests]
    table = f"def f(x): return {{{', '.join(f'repr({given}): {value}' for given, value in pairs)}}}[repr(x)]"
    assert list(rule([RuleInput("sum", table, 1, True, 0)], lambda: None)) == [1.0]
    assert list(rule([RuleInput("sum", table, 1, True, 1)], lambda: None)) == [0.25]
    rule.close()


def test_a_solution_that_fails_is_refused_by_its_prompt():
    assert SUM_OF_LIST.hidden
    broken = replace(SUM_OF_LIST, hidden=replace(SUM_OF_LIST.hidden, solution="def f(x): return x.sum()"))
    rule = TestsRule("rlhf.rewards.mine", PATIENT, {"sum": broken}, trust_me=False)
    with pytest.raises(RewardError, match=r"rlhf\.rewards\.mine: `hidden` of the prompt 'sum': the solution fails"):
        list(rule([RuleInput("sum", "def f(x): return sum(x)", 1, True)], lambda: None))
    rule.close()


# --- a whole run ---


def code_of_tokens(tokens: list[int], bombs: bool) -> str:
    """A program for a completion of the toy: one in 20 a bomb."""
    if tokens in PROMPTS:
        return str(tokens)
    kind = sum(tokens) % 20
    return "while True: pass" if bombs and kind == 0 else f"kind = {kind}"


TESTED = replace(
    TOKENS,
    samples=1,
    rewards={"tests": replace(PATIENT, cpu_s=0.5), "length": RewardPartConfig(kind="length", target=8)},
)
KINDS = Task("python", (Test(code="assert kind < 10"), Test(code="assert kind % 2")))
BY_PROMPT = {str(prompt): KINDS for prompt in PROMPTS}


def run_of_tests(monkeypatch, bombs: bool, iterations: int, **keys) -> Toy:
    """A run of the toy whose completions stand for programs."""

    def judge(parts, decode, *rest) -> Judge:
        return Judge(parts, lambda tokens: code_of_tokens(list(tokens), bombs), *rest, tasks=Tasks(BY_PROMPT))

    monkeypatch.setattr("tests.rlhf.toy.Judge", judge)
    made = toy(replace(TESTED, **keys), iterations, source=lambda: EngineRollouts(engine_of()))
    with supply_in(made).judge:
        made.run()
    return made


def expected_of(made: Toy, place: int, bombs: bool) -> list[float]:
    kinds = [sum(rollout.completion.tolist()) % 20 for rollout in made.reports[place].rollouts]
    return [0.0 if bombs and kind == 0 else ((kind < 10) + kind % 2) / 2 for kind in kinds]


def test_a_run_is_scored_by_executed_code(monkeypatch, one_rank):
    made = run_of_tests(monkeypatch, False, 2, prompts=8)
    for place, report in enumerate(made.reports):
        assert report.part_B["tests"].tolist() == expected_of(made, place, False)
        assert report.metrics["rlhf/failed_tests"] == 0


@pytest.mark.bars
def test_bombs_cost_their_limit_shared_by_the_workers(monkeypatch, one_rank, capsys):
    """In the first iteration, which draws the same rollouts with and without bombs."""
    limit, workers = TESTED.rewards["tests"].cpu_s, TESTED.rewards["tests"].workers
    took, runs = {}, {}
    for bombs in (False, True, False, True):
        made = run_of_tests(monkeypatch, bombs, 1, prompts=200)
        runs[bombs] = made
        took[bombs] = min(took.get(bombs, 1e9), made.reports[0].metrics["timing/iteration_s"])
    n_bombs = sum(sum(r.completion.tolist()) % 20 == 0 for r in runs[True].reports[0].rollouts)
    with capsys.disabled():
        allowed = n_bombs * limit / workers
        print(f"\n{n_bombs} bombs of 200: {took[True]:.2f} s, without {took[False]:.2f} s, {allowed:.2f} s allowed")
    assert torch.equal(runs[True].reports[0].part_B["length"], runs[False].reports[0].part_B["length"])
    assert runs[True].reports[0].part_B["tests"].tolist() == expected_of(runs[True], 0, True)
    assert took[True] <= took[False] * 1.1 + n_bombs * limit / workers
