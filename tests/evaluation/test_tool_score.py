"""What a turn is worth, and the figures over many."""

import pytest

from dist_lm.chat.messages import Call, Message, Tool
from dist_lm.chat.template import answer_tokens
from dist_lm.evaluation.tool_score import calls_made, figures, judge, read_answer
from dist_lm.tokenizer.symbols import END
from dist_lm.tokenizer.tokenizer import Tokenizer

TOOLS = (
    Tool("add", "", {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}),
    Tool("say", "", {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}),
)


def turn(*calls: Call, text: str = "") -> Message:
    return Message("assistant", text, calls)


ONE = turn(Call("add", {"x": 1}))
TWO = turn(Call("add", {"x": 1}), Call("say", {"text": "Oslo, Norway"}))
WORDS = turn(text="No tool does that.")


@pytest.mark.parametrize(
    ("found", "expected", "facts"),
    [
        (ONE, ONE, {"parses", "valid", "names", "exact"}),
        (turn(Call("add", {"x": 2})), ONE, {"parses", "valid", "names"}),
        (turn(Call("add", {"x": "1"})), ONE, {"parses", "names"}),
        (turn(Call("say", {"text": "1"})), ONE, {"parses", "valid"}),
        (turn(Call("multiply", {"x": 1})), ONE, {"parses"}),
        (WORDS, ONE, {"refused"}),
        (None, ONE, set()),
        (TWO, ONE, {"parses", "valid"}),
        (turn(Call("say", {"text": "oslo norway"}), Call("add", {"x": 1})), TWO, {"parses", "valid", "names", "exact"}),
        (ONE, TWO, {"parses", "valid"}),
        (turn(text="Whatever."), WORDS, {"parses", "names", "exact"}),
        (ONE, WORDS, {"parses", "valid"}),
        (None, WORDS, set()),
    ],
)
def test_what_is_found_of_a_turn(found, expected, facts):
    verdict = judge(found, expected, TOOLS)
    assert {name for name in ("parses", "valid", "names", "exact", "refused") if getattr(verdict, name)} == facts


def test_a_call_found_stands_for_one_expected():
    one, other = Call("add", {"x": 1}), Call("add", {"x": 2})
    assert calls_made([one, one], [one, other], TOOLS) == 1
    assert calls_made([other, one], [one, other], TOOLS) == 2
    assert calls_made([one, one, one], [one], TOOLS) == 1


def test_calls_that_are_all_right_are_each_right():
    # 1 passes for 1.0 and not the reverse, so the first call fits both. Where it is given to the first expected call,
    # the second one seems to be missing.
    untyped = (Tool("f", "", {"type": "object", "properties": {"x": {}}, "required": ["x"]}),)
    whole, real = Call("f", {"x": 1}), Call("f", {"x": 1.0})
    verdict = judge(turn(whole, real), turn(real, whole), untyped)
    assert (verdict.right, verdict.exact) == (2, True)


def test_figures_are_shares_by_kind_and_in_all():
    verdicts = [
        ("single", judge(ONE, ONE, TOOLS)),
        ("single", judge(WORDS, ONE, TOOLS)),
        ("parallel", judge(ONE, TWO, TOOLS)),
        ("irrelevant", judge(WORDS, WORDS, TOOLS)),
        ("irrelevant", judge(ONE, WORDS, TOOLS)),
        ("irrelevant", judge(None, WORDS, TOOLS)),
    ]
    found = figures(verdicts)
    assert found["tools/parses"] == pytest.approx(2 / 3)
    assert found["tools/name_exact"] == pytest.approx(1 / 3)
    assert found["tools/args_exact"] == pytest.approx(2 / 4)  # of four calls expected
    assert found["tools/call_exact_single"] == 0.5
    assert found["tools/false_refusals"] == pytest.approx(1 / 3)
    assert found["tools/parallel_exact"] == 0
    assert found["tools/irrelevance"] == found["tools/irrelevance_irrelevant"] == pytest.approx(1 / 3)
    assert "tools/parses_irrelevant" not in found
    assert "tools/irrelevance_single" not in found
    assert figures([]) == {}


@pytest.mark.parametrize("wanted", [ONE, TWO, WORDS])
def test_an_answer_counts_only_when_it_is_a_turn_that_ended(tiny_work, wanted):
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    tokens = answer_tokens(wanted, tokenizer)
    assert tokens[-1] == tokenizer.special_ids[END]
    assert read_answer(tokens, True, tokenizer) == wanted
    assert read_answer(tokens[:-1], False, tokenizer) is None
    assert read_answer([*tokens[:-1], tokenizer.pad_id, tokens[-1]], True, tokenizer) is None
