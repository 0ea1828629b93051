"""Rankings of one's own."""

import json

import pytest

from dist_lm.chat.messages import Message
from dist_lm.chat.ranking import Judgement
from dist_lm.data.sources.rankings import read_rankings
from dist_lm.errors import ArtefactError

GOOD = {"prompt": "Q", "completions": ["a", "b"], "ranks": [0, 1]}


def test_ranks_and_judgements():
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    lines = [
        json.dumps(GOOD),
        "",
        json.dumps({"prompt": turns, "completions": ["a", "b", "c"], "judgements": [[2, 0], [1, 0, 0.5]]}),
    ]
    first, second = read_rankings(lines, "mine.jsonl")
    assert (first.prompt.messages, first.completions, first.ranks) == ((Message("user", "Q"),), ("a", "b"), (0, 1))
    assert second.prompt.messages == (Message("system", "S"), Message("user", "Q"))
    assert second.judgements == (Judgement(2, 0), Judgement(1, 0, 0.5))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[", "no JSON \\(Expecting value at character 1\\)"),
        pytest.param("[" * 100_000, "no JSON \\(nested too deeply\\)", id="deep"),  # a RecursionError is no ValueError
        ({**GOOD, "prompt": None}, "prompt: expected a text, or a list of turns"),
        ({**GOOD, "rank": [0]}, "expected an object of prompt, completions"),
        ({**GOOD, "completions": ["a"], "ranks": [0]}, "1 completions; expected 2 to 16"),
        ({**GOOD, "completions": ["a", 1]}, "completions: expected a list of texts"),
        ({**GOOD, "completions": ["a", ""]}, "completion 1: empty"),
        ({**GOOD, "ranks": [0]}, "1 ranks of 2 completions"),
        ({**GOOD, "ranks": [0, 0]}, "all completions are tied"),
        ({**GOOD, "ranks": [0, True]}, "ranks: expected a list of integers"),
        ({**GOOD, "judgements": [[0, 1]]}, "ranks and judgements: expected one of the two, found both"),
        ({"prompt": "Q", "completions": ["a", "b"]}, "ranks and judgements: expected one of the two, found none"),
        ({"prompt": "Q", "completions": ["a", "b"], "judgements": [[0, 2]]}, "judgement 0: better=0 worse=2"),
        ({"prompt": "Q", "completions": ["a", "b"], "judgements": [[0, 1, -1]]}, "margin=-1.0"),
        (
            {"prompt": "Q", "completions": ["a", "b", "a"], "ranks": [0, 1, 2]},
            "completion 2: the same text as an earlier",
        ),
        ({"prompt": "Q", "completions": ["a", "a"], "judgements": [[0, 1]]}, "completions 0 and 1 are the same text"),
        ({"prompt": "Q", "completions": ["a", "b"], "judgements": [[0]]}, r"expected \[better, worse\]"),
        ({**GOOD, "prompt": ""}, "empty"),
        ({**GOOD, "prompt": [{"role": "tool", "content": "x"}]}, "role='tool'"),
        ({**GOOD, "prompt": [{"role": "assistant", "content": "b"}]}, "prompt: expected a last turn of user or tool"),
        (
            {**GOOD, "prompt": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}]},
            r"prompt: turn 0 \(assistant\): expected system or user",
        ),
        ({**GOOD, "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "last turn"),
    ],
)
def test_a_line_that_is_no_ranking_is_refused_by_its_number(value, words):
    line = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(ArtefactError, match=rf"mine.jsonl, line 2: .*{words}"):
        list(read_rankings([json.dumps(GOOD), line], "mine.jsonl"))
