"""Rules, and the sum of what they say."""

import pytest
import torch

from dist_lm.config.rlhf import RewardPartConfig
from dist_lm.errors import ConfigError
from dist_lm.rlhf.rewards import Judged, RewardError, judge, length_rule, parses_rule, rules_of, total_score
from tests.rlhf.toy import rollouts_with


def judged(prompt: str = "", completion: str = "", new_tokens: int = 1, whole: bool = True) -> Judged:
    return Judged(prompt, completion, new_tokens, whole)


def words_in_common(prompt: str, completion: str) -> float:
    return len(set(prompt.split()) & set(completion.split()))


def not_a_number(prompt: str, completion: str) -> float:
    return float("nan")


def fails(prompt: str, completion: str) -> float:
    return 1 / 0


def test_length_earns_most_at_its_target():
    rule = length_rule(8)
    assert [rule(judged(new_tokens=n)) for n in (0, 4, 8, 12, 16, 40)] == [0, 0.5, 1, 0.5, 0, 0]


def test_parses_looks_at_the_document_or_the_completion_without_a_line_that_was_cut_off():
    document, completion = parses_rule("python", "document"), parses_rule("python", "completion")
    half = judged("def f(x):\n", "    return x\n")
    assert (document(half), completion(half)) == (1, 0)
    cut = judged("x = 1\n", "y = 2\nz = (", whole=False)
    assert (document(cut), document(judged("x = 1\n", "y = 2\nz = (", whole=True))) == (1, 0)
    assert parses_rule("sql", "completion")(judged(completion="SELECT 1;")) == 1


def test_a_persons_function_gets_the_texts_of_prompt_and_completion():
    rules = rules_of({"common": RewardPartConfig(kind="function", function="tests.rlhf.test_rewards:words_in_common")})
    rollouts = rollouts_with([1, 2], [2, 1])
    texts = {tuple(part.tolist()): text for one, texts in zip(rollouts, (("a b", "b c"), ("a", "d")), strict=True)
             for part, text in zip((one.prompt, one.completion), texts, strict=True)}  # fmt: skip
    assert judge(rollouts, rules, lambda tokens: texts[tuple(tokens)]) == {"common": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("function", "message"),
    [("no.such.module:f", "no.such.module"), ("tests.rlhf.test_rewards:absent", "absent")],
)
def test_a_function_that_is_not_there_is_refused_by_name(function, message):
    with pytest.raises(ConfigError, match=message):
        rules_of({"mine": RewardPartConfig(kind="function", function=function)})


def test_a_function_that_gives_no_number_is_named():
    rule = rules_of({"n": RewardPartConfig(kind="function", function="tests.rlhf.test_rewards:not_a_number")})["n"]
    with pytest.raises(RewardError, match="not_a_number returned nan"):
        rule(judged())


def test_a_function_that_fails_is_named_with_what_it_was_given():
    rule = rules_of({"n": RewardPartConfig(kind="function", function="tests.rlhf.test_rewards:fails")})["n"]
    with pytest.raises(RewardError, match=r"test_rewards:fails failed \(ZeroDivisionError: .*completion 'abc'"):
        rule(judged(completion="abc"))


def test_the_score_is_the_weighted_sum_and_what_was_cut_off_pays():
    parts = {
        "a": RewardPartConfig(kind="length", weight=2.0, target=1),
        "b": RewardPartConfig(kind="parses", weight=-0.5),
    }
    score = {"a": torch.tensor([1.0, 0.5, 0.0]), "b": torch.tensor([0.0, 1.0, 1.0])}
    whole = torch.tensor([True, True, False])
    found = total_score(score, parts, whole, missing_eos_penalty=3.0)
    assert found.tolist() == [2.0, 0.5, -3.5]
