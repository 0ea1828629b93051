"""Rules, and the sum of what they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.rlhf.rewards import Judge, RewardError, share_usable, total_score
from dist_lm.rlhf.rollouts import ScoredRollouts
from dist_lm.rlhf.rules import Failure, Rule, RuleInput, length_rule, parses_rule
from tests.rlhf.toy import rollouts_with


def judged(request: str = "", completion: str = "", new_tokens: int = 1, whole: bool = True) -> RuleInput:
    return RuleInput(f"user\n{request}\nassistant\n", completion, new_tokens, whole, request=request)


def only(rule: Rule, judged: RuleInput) -> float | Failure:
    (score,) = rule([judged], lambda: None)
    return score


def test_length_earns_most_at_its_target():
    rule = length_rule(8)
    assert [only(rule, judged(new_tokens=n)) for n in (0, 4, 8, 12, 16, 40)] == [0, 0.5, 1, 0.5, 0, 0]


def test_parses_looks_at_the_document_or_the_completion_without_a_line_that_was_cut_off():
    document, completion = parses_rule("python", "document"), parses_rule("python", "completion")
    half = judged("def f(x):\n", "    return x\n")
    assert (only(document, half), only(completion, half)) == (1, 0)
    cut = judged("x = 1\n", "y = 2\nz = (", whole=False)
    assert (only(document, cut), only(document, replace(cut, whole=True))) == (1, 0)
    assert only(parses_rule("sql", "completion"), judged(completion="SELECT 1;")) == 1


def test_a_parser_without_a_verdict_gives_no_score(monkeypatch):
    monkeypatch.setattr("dist_lm.rlhf.rules.parses_continued", lambda *given: None)
    monkeypatch.setattr("dist_lm.rlhf.rules.parses", lambda *given: None)
    for of in ("document", "completion"):
        assert only(parses_rule("bash", of), judged()) == Failure("the parser of bash gave no verdict in time")


def test_a_persons_function_gets_the_texts_of_request_and_completion():
    parts = {"common": RewardPartConfig(kind="function", function="tests.rlhf.toy_rewards:words_in_common")}
    rollouts = rollouts_with([1, 2], [2, 1])
    texts = {tuple(part.tolist()): text for one, texts in zip(rollouts, (("a b", "b c"), ("a", "d")), strict=True)
             for part, text in zip((one.prompt, one.completion), texts, strict=True)}  # fmt: skip
    with Judge(parts, lambda tokens: texts[tuple(tokens)], 0.0) as judge:
        assert judge(rollouts).scores["common"].tolist() == [1.0, 0.0]
    parts["code"] = RewardPartConfig(kind="parses")
    with Judge(parts, lambda tokens: texts[tuple(tokens)], 0.0, request_of=lambda tokens: "d = (") as judge:
        found = judge(rollouts).scores
        assert (found["common"].tolist(), found["code"].tolist()) == ([0.0, 1.0], [0.0, 0.0])


@pytest.mark.usefixtures("one_rank")
def test_a_rollout_without_a_score_leaves_with_its_tokens_and_scores():
    rollouts = rollouts_with([2, 1, 3], [3, 2, 1], positions=[5, 6, 7])
    scores = {"a": np.array([1.0, np.nan, 3.0]), "b": np.array([4.0, 5.0, 6.0])}
    scored = share_usable(ScoredRollouts(rollouts, scores))
    assert scored.metrics == {"rlhf/left_out": pytest.approx(1 / 3), "rlhf/failed_a": 1, "rlhf/failed_b": 0}
    assert {name: score.tolist() for name, score in scored.rule_score_B.items()} == {"a": [1, 3], "b": [4, 6]}
    kept = [one for place, one in enumerate(rollouts) if place != 1]
    for found, expected in zip(scored.rollouts, kept, strict=True):
        for name, value in vars(expected).items():
            assert np.array_equal(getattr(found, name), value), name
    with pytest.raises(RewardError, match="none of the 3 completions"):
        share_usable(ScoredRollouts(rollouts, {"a": np.full(3, np.nan)}))
    none = share_usable(ScoredRollouts(rollouts, {"a": np.full(3, np.nan)}), some=False)
    assert (len(none.rollouts), none.kept_D.tolist(), len(none.rule_score_B["a"])) == (0, [False] * 3, 0)


def test_the_score_is_the_weighted_sum_and_what_was_cut_off_pays():
    parts = {
        "a": RewardPartConfig(kind="length", weight=2.0, target=1),
        "b": RewardPartConfig(kind="parses", weight=-0.5),
    }
    score = {"a": torch.tensor([1.0, 0.5, 0.0]), "b": torch.tensor([0.0, 1.0, 1.0])}
    whole = torch.tensor([True, True, False])
    found = total_score(score, parts, whole, missing_eos_penalty=3.0)
    assert found.tolist() == [2.0, 0.5, -3.5]
