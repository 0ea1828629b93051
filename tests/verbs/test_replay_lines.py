"""What `dist-lm replay` prints of an iteration, and its exit codes."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.rlhf.replay import Difference
from dist_lm.stages.rlhf.replay import IterationReplay, MetricDifference
from dist_lm.verbs.replay import print_results

EQUAL = IterationReplay(3, 2, 9, 21, 1143, "step_00000002", 0, largest_gap=0.0, threads=1, metrics=19)
TOKEN = Difference("token", "71 ' a' (-2.5)", "88 ' b' (-1.25)", turn=2, token=5)
stage = SimpleNamespace(steps=40, init_from="work/runs/tools/default")
RECORD: Any = SimpleNamespace(config=SimpleNamespace(stage=stage), run=SimpleNamespace(path="RUN"))


def printed(capsys, *results: IterationReplay, as_json: bool = False, verifies: bool = False) -> tuple[bool, list[str]]:
    is_equal = print_results(results, RECORD, as_json=as_json, verifies=verifies)
    return is_equal, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "equal (1 thread); 19 metrics equal"),
        ({"threads": None, "largest_gap": 3e-4}, "equal; log-probabilities differ by at most 0.0003; 19 metrics equal"),
        (
            {"difference": TOKEN, "differing": 2, "rollout": 4, "metrics": 0},
            "2 differ, the first is rollout 4, turn 2, token 5, token: recorded 71 ' a' (-2.5), now 88 ' b' (-1.25)",
        ),
        (
            {"metric_difference": MetricDifference("rlhf/score_mean", 0.5, 0.25), "metrics": 0},
            "equal (1 thread); rlhf/score_mean was written as 0.5, its conversations give 0.25",
        ),
    ],
)
def test_an_iteration_is_one_line(changes, expected, capsys):
    """Finds a difference that is not printed, or a line that calls an iteration equal though something differs."""
    result = replace(EQUAL, **changes)
    is_equal, lines = printed(capsys, result)
    assert lines == [f"iteration 3: 9 conversations, 21 turns, 1,143 tokens: {expected}"]
    assert is_equal == (result.difference is None and result.metric_difference is None)

    is_equal_for_programs, (line,) = printed(capsys, result, as_json=True)
    value = json.loads(line)
    assert value["equal"] == is_equal == is_equal_for_programs
    assert (value["difference"] or {}).get("token") == (5 if result.difference else None)


def test_nothing_compared_is_no_success(capsys):
    """Finds exit code 0 for a run of which no conversation was drawn again."""
    without = replace(EQUAL, weights=None, threads=None, largest_gap=None)
    is_equal, lines = printed(capsys, EQUAL, without)
    assert is_equal
    assert "not drawn again, as the weights after iteration 2 are in no checkpoint" in lines[1]
    assert lines[1].endswith("; 19 metrics equal")
    with pytest.raises(ArtefactError, match=r"RUN: no conversation was compared: .*stage.keep_checkpoints=40"):
        printed(capsys, without)
    capsys.readouterr()

    unfinished = replace(EQUAL, weights=None, not_compared=2, is_finished=False, metrics=0, threads=None)
    assert printed(capsys, unfinished, verifies=True)[1] == [
        "iteration 3: 9 conversations, 21 turns, 1,143 tokens so far: equal; 2 ended by a timeout or a failed machine, "
        "which is not compared"
    ]
