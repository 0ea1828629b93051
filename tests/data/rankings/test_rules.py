"""Rules that rank a model's samples."""

from dist_lm.data.rankings.rules import WEIGHTS, marks_of

PROMPT = "def total(values, rate):\n"
GOOD = "    return sum(values) * rate  # the whole of it, with the rate that was asked for\n"


def test_a_better_one_by_each_rule_has_more() -> None:
    best = marks_of(PROMPT, GOOD, parses=True)
    assert best.quality == 1.0 == round(sum(WEIGHTS.values()), 9) or best.names < 1
    assert marks_of(PROMPT, GOOD, parses=False).quality < best.quality
    assert marks_of(PROMPT, GOOD.replace("values", "other"), parses=True).names < best.names
    assert marks_of(PROMPT, GOOD * 3, parses=True).repetition < best.repetition == 1
    assert marks_of(PROMPT, "    return 1\n", parses=True).length < best.length
    assert marks_of(PROMPT, "", parses=True).quality == 0, "nothing repeats nothing, and the prompt alone may parse"


def test_marks_are_shares_whatever_is_read() -> None:
    for prompt in ("", "a b", PROMPT):
        for completion in ("", " ", "\n\n", "x", GOOD, "( " * 50):
            marks = marks_of(prompt, completion, parses=False)
            assert all(0 <= value <= 1 for value in vars(marks).values())
            assert 0 <= marks.quality <= 1
