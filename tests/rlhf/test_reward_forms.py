"""Reward functions of TRL and verl, and our own with the row: what each is called with, and what its answer means."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.rlhf.reward_forms import Judged, form_of, scores
from dist_lm.rlhf.reward_function import answers
from dist_lm.rlhf.rewards import Judge, share_usable, total_score
from dist_lm.rlhf.rollouts import ScoredRollouts, ShuffledPrompts, concatenated
from dist_lm.rlhf.rules import Failure, FunctionRule, PromptRow, RuleInput, whole_prompts
from dist_lm.rlhf.schedule import positions_with_signal
from tests.patience import patient
from tests.rlhf import toy_rewards
from tests.rlhf.toy import rollouts_with

PATIENT_S = patient(60.0)
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"})


def judged(completion: str, messages: Sequence[Any] = CHAT, **columns: Any) -> Judged:
    return Judged("2 + 2?", completion, [7] * len(completion), messages, {"prompt": list(messages), **columns})


def called(function: Callable[..., Any], *completions: Judged) -> list[Any]:
    return scores(function, form_of(function), completions)


def test_a_function_of_two_texts_is_called_as_ever_and_may_ask_for_the_row_and_the_turns():
    assert called(lambda prompt, answer: f"{prompt} {answer}", judged("4")) == ["2 + 2? 4"]
    assert called(toy_rewards.matches_row, judged("4", answer="4")) == [1.0]
    assert called(toy_rewards.matches_row, judged("4")) == [None]
    assert called(toy_rewards.counts_turns, judged("4")) == [2.0]
    assert not form_of(toy_rewards.one).reads_rows
    assert form_of(max).name == "plain"  # no signature


def test_trls_function_gets_lists_as_trl_passes_them():
    """Turns where the row has turns, texts where it has a text; a row without a column has None there."""
    seen: dict[str, Any] = {}

    def f(prompts: list, completions: list, **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    text = Judged("x", "y", (1, 2), [{"role": "user", "content": "x"}], {"prompt": "x", "source": "web"})
    assert called(f, judged("4", answer="4"), text) == [0.0, 0.0]
    assert seen["prompts"] == [list(CHAT), "x"]
    assert seen["completions"] == [[{"role": "assistant", "content": "4"}], "y"]
    assert seen["completion_ids"] == [[7], [1, 2]]
    assert (seen["answer"], seen["source"]) == (["4", None], [None, "web"])
    assert "prompt" not in seen
    seen["log_metric"]("name", 1.0)  # TRL's callables are there and do nothing

    assert called(toy_rewards.trl_matches, judged("4", solution="4"), judged("5", solution=None)) == [1.0, None]
    assert form_of(toy_rewards.trl_matches).columns == {"solution"}
    assert called(toy_rewards.trl_async, judged("four"), judged("4")) == [4.0, 1.0]


def test_functions_that_trl_ships_work():
    from trl.rewards import get_soft_overlong_punishment, think_format_reward

    assert called(think_format_reward, judged("<think>2 + 2</think>4"), judged("4")) == [1.0, 0.0]
    punish = get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)
    assert called(punish, judged("1"), judged("123"), judged("12345")) == [0.0, -0.5, -1.0]


def test_verls_function_gets_source_truth_and_extra_info():
    row = {"data_source": "gsm8k", "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"index": 3}}
    assert called(toy_rewards.verl_score, judged("4", **row)) == [1.0]
    assert called(toy_rewards.verl_score, judged("4", ground_truth="5")) == [0.0]
    assert called(toy_rewards.verl_scores, judged("4", **row), judged("5", ground_truth="5")) == [1.0, 1.0]
    assert called(lambda solution_str, ground_truth: ground_truth, judged("4", **row)) == ["4"]
    assert form_of(toy_rewards.verl_score).needs_ground_truth
    assert form_of(toy_rewards.verl_scores).is_batched


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (toy_rewards.openrlhf_reward, "missing a required argument: 'labels'"),
        (lambda: 1.0, "too many positional arguments"),
        (lambda solution_str, tokenizer: 1.0, "needs tokenizer, which data_source, solution_str"),
    ],
)
def test_a_function_of_another_form_is_refused_before_it_is_called(function, words):
    with pytest.raises(ValueError, match=words):
        form_of(function)


def test_what_a_batched_function_returns_wrongly_is_named():
    def answered(value: Any) -> list[dict[str, Any]]:
        def f(completions: list) -> Any:
            return value

        return answers(f, form_of(f), [judged("a"), judged("b")])

    assert answered(torch.tensor([1.0, 0.5])) == [{"value": 1.0}, {"value": 0.5}]
    assert answered((np.float32(2), None)) == [{"value": 2.0}, {"none": True}]
    assert answered([1.0, "x"]) == [{"value": 1.0}, {"failure": "returned 'x'; expected a finite number"}]
    for value, words in ((1.0, "a float; expected a list of 2"), ([1.0], "1 values for 2"), ({"score": 1.0}, "a dict")):
        assert all(words in answer["failure"] and answer["call"] for answer in answered(value))


# --- in its process ---


def inputs_of(texts: Sequence[str], samples: int = 1) -> list[RuleInput]:
    row = PromptRow(CHAT, {"prompt": "x"})
    return [RuleInput("", text, 1, True, position=i // samples, row=row) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("bad", "reason"), [("raise", "ValueError: one of them"), ("die", "ended its process"), ("short", "1 values for 2")]
)
def test_a_failing_call_costs_one_prompt_with_all_its_completions(bad, reason):
    """Group rewards compare the completions of a prompt, so these are never called apart."""
    rule = FunctionRule("tests.rlhf.toy_rewards:trl_sizes", "key", PATIENT_S)
    try:
        found = list(rule(inputs_of(["a", "b", "c", bad, "d", "nan"], samples=2), lambda: None))
    finally:
        rule.close()
    assert found[:2] == [2.0, 2.0]
    assert all(isinstance(score, Failure) and reason in score.reason for score in found[2:4])
    assert found[4] == 2.0
    assert isinstance(found[5], Failure)


def test_a_call_that_hangs_is_made_again_prompt_by_prompt():
    rule = FunctionRule("tests.rlhf.toy_rewards:trl_sizes", "key", 2.0)
    try:
        first, hung, last = rule(inputs_of(["a", "hang", "b"]), lambda: None)
    finally:
        rule.close()
    assert (first, last) == (1.0, 1.0)
    assert isinstance(hung, Failure)
    assert "took longer than 2 s" in hung.reason


def test_batches_hold_whole_prompts():
    sizes = [[len(batch) for batch in whole_prompts(inputs_of("x" * 10, samples), 4)] for samples in (1, 2, 3, 5, 10)]
    assert sizes == [[4, 4, 2], [4, 4, 2], [3, 3, 4], [5, 5], [10]]


# --- not applicable ---


def judge_of(function: str, texts: Sequence[str], rows: Sequence[dict[str, Any]], **parts: Any) -> ScoredRollouts:
    """The scores of one completion of each row."""
    settings = {"mine": RewardPartConfig(kind="function", function=f"tests.rlhf.toy_rewards:{function}")} | parts
    rollouts = rollouts_with([1] * len(rows), [1] * len(rows))
    read = iter([text for completion in texts for text in ("", completion)])
    found = [PromptRow(CHAT, {"prompt": list(CHAT), **row}) for row in rows]
    with Judge(settings, lambda tokens: next(read), 0.0, row_of=lambda position: found[position]) as judge:
        return judge(rollouts)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("function", ["matches_row", "trl_matches"])
def test_none_adds_nothing_and_is_no_failure(function):
    size = RewardPartConfig(kind="length", target=1)
    rows = [{"answer": text, "solution": text} for text in ("4", "5", None)]
    scored = judge_of(function, ["4", "4", "4"], rows, size=size)
    assert scored.scores["mine"].tolist() == [1.0, 0.0, 0.0]
    assert {name: array.tolist() for name, array in scored.skipped.items()} == {"mine": [False, False, True]}

    usable = share_usable(scored)
    assert usable.kept_D.all()
    assert usable.means(usable.rule_score_B) == {"mine": 0.5, "size": 1.0}  # over those it applies to
    assert usable.metrics["rlhf/skipped_mine"] == 1
    assert usable.metrics["rlhf/failed_mine"] == 0
    parts = {"mine": RewardPartConfig(weight=1.0), "size": RewardPartConfig(weight=1.0)}
    assert total_score(usable.rule_score_B, parts, torch.ones(3, dtype=torch.bool), 0.0).tolist() == [2.0, 1.0, 1.0]


@pytest.mark.usefixtures("one_rank")
def test_a_completion_that_no_part_applies_to_is_left_out_without_a_failure():
    """As in TRL, where its advantage is 0. A reward model scores it, so then it stays."""
    scored = judge_of("matches_row", ["4", "4"], [{"answer": "4"}, {"answer": None}])
    assert share_usable(scored).kept_D.tolist() == [True, False]
    assert share_usable(scored).metrics == {"rlhf/left_out": 0.5, "rlhf/failed_mine": 0, "rlhf/skipped_mine": 1}
    assert share_usable(scored, has_reward_model=True).kept_D.all()
    pair = concatenated([scored, ScoredRollouts(scored.rollouts, {"mine": np.array([0.0, 1.0])})])
    assert pair.skipped["mine"].tolist() == [False, True, False, False]
    assert pair.of_prompts(np.array([1]), 0).skipped["mine"].tolist() == [True, False]

    # Its 0 is no score, so it makes no signal beside a score of 1.
    same = ScoredRollouts(
        rollouts_with([1, 1], [1, 1], positions=[3, 3]), {"mine": np.array([1.0, 0.0])},
        skipped={"mine": np.array([False, True])},
    )  # fmt: skip
    assert positions_with_signal(same, {"mine": RewardPartConfig(kind="function")}) == []


# --- rows by position ---


def test_each_completion_gets_the_row_of_its_own_prompt_in_every_epoch():
    """Equal prompts may have different rows, so the text does not find the row: the position does."""
    order = ShuffledPrompts([[1], [1], [2], [3]], seed=5)
    rows = [PromptRow(CHAT, {"answer": str(i)}) for i in range(4)]
    positions = [*range(12)]
    rollouts = rollouts_with([1] * 12, [1] * 12, positions=positions)
    parts = {"mine": RewardPartConfig(kind="function", function="tests.rlhf.toy_rewards:matches_row")}
    texts = iter([text for position in positions for text in ("", str(order.index(position)))])
    with Judge(parts, lambda tokens: next(texts), 0.0, row_of=lambda position: rows[order.index(position)]) as judge:
        assert judge(rollouts).scores["mine"].tolist() == [1.0] * 12
        texts = iter([text for position in range(4) for text in ("", str(position))])
        held_out = judge.for_prompts(lambda position: rows[position])
        assert held_out(rollouts_with([1] * 4, [1] * 4)).scores["mine"].tolist() == [1.0] * 4
    assert [order.prompts[order.index(position)] for position in positions] == order(0, 12)
    assert order(3, 6) == order(0, 12)[3:9]
