"""Rules, and the sum of what they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.rlhf.rewards import Judge, RewardError, refuse_void, share_usable, total_score
from dist_lm.rlhf.rollouts import ScoredRollouts
from dist_lm.rlhf.rules import Failure, Rule, RuleInput, length_rule, parses_rule
from tests.rlhf.toy import rollouts_with


def judged(request: str = "", completion: str = "", new_tokens: int = 1, ended: bool = True) -> RuleInput:
    return RuleInput(f"user\n{request}\nassistant\n", completion, new_tokens, ended, request=request)


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
    cut = judged("x = 1\n", "y = 2\nz = (", ended=False)
    assert (only(document, cut), only(document, replace(cut, ended=True))) == (1, 0)
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


def test_a_score_that_its_weight_takes_out_of_fp32_is_none(caplog):
    """Named as a score that is no number is: by the function, before any cast."""
    function = "tests.rlhf.toy_rewards:by_order"
    parts = {
        "mine": RewardPartConfig(kind="function", function=function, weight=1e20),
        "length": RewardPartConfig(kind="length", target=1),
    }
    text_of_length = {1: "number 1e10", 2: "number 1e30", 3: ""}
    rollouts = rollouts_with([3, 3], [1, 2], positions=[5, 6])
    with Judge(parts, lambda tokens: text_of_length[len(tokens)], max_failed_fraction=0.5) as judge:
        assert np.isnan(judge(rollouts).scores["mine"]).tolist() == [False, True]
    assert f"rlhf.rewards.mine.function={function} has no score for prompt 6, sample 0: its score 1e+30 times its " in (
        caplog.text
    )


@pytest.mark.usefixtures("one_rank")
def test_scores_that_an_older_release_kept_are_left_out():
    """They are pending in its checkpoints, as fp64."""
    scores = {"a": np.array([1.0, 1e300]), "b": np.array([1.0, 1.0])}
    scored = share_usable(ScoredRollouts(rollouts_with([1, 1], [1, 1]), scores))
    assert scored.kept_D.tolist() == [True, False]
    assert scored.failed == {"a": 1, "b": 0}


def test_inputs_that_are_not_finite_name_the_part_and_its_scores():
    parts = {
        "small": RewardPartConfig(kind="length", target=1, weight=3.0),
        "large": RewardPartConfig(kind="function", function="mine:score"),
    }
    part_B = {"small": torch.tensor([0.0, 1.0]), "large": torch.tensor([-1.0, 3e38])}
    refuse_void(parts, part_B, {"advantages": torch.ones(2)})
    with pytest.raises(RewardError, match=r"rlhf.rewards.large.function=mine:score: with its scores, -1 to 3e\+38,"):
        refuse_void(parts, part_B, {"advantages": torch.tensor([1.0, torch.inf])})
    part_B["small"][0] = torch.nan
    with pytest.raises(RewardError, match=r"rlhf.rewards.small: with its scores, nan to nan, scores, advantages of an"):
        refuse_void(parts, part_B, {"scores": part_B["small"], "advantages": torch.full((2,), torch.nan)})


@pytest.mark.usefixtures("one_rank")
def test_a_rollout_without_a_score_leaves_with_its_tokens_and_scores():
    rollouts = rollouts_with([2, 1, 3], [3, 2, 1], positions=[5, 6, 7])
    scores = {"a": np.array([1.0, np.nan, 3.0]), "b": np.array([4.0, 5.0, 6.0])}
    marks = {"forged": np.array([True, True, False])}
    scored = share_usable(ScoredRollouts(rollouts, scores, marks=marks))
    failed = {"rlhf/failed_a": 1, "rlhf/failed_b": 0}
    assert scored.metrics == {"rlhf/left_out": pytest.approx(1 / 3), **failed, "reward/forged": 2}
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
