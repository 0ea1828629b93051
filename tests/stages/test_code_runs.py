"""Samples of stage `code` are executed: which run, and what is not known."""

import shutil

import pytest

from dist_lm.sandbox import sandbox
from dist_lm.stages.code import runs
from dist_lm.stages.sampling import Sample

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")


def samples() -> list[Sample]:
    texts = [("python", "x = ", "1\n"), ("python", "x = ", "y\n"), ("bash", "ech", "o"), ("bash", "", "nothing_there")]
    cut_off = Sample(4, "python", "x = 1\n", "y = 2\nz = unfinis", finished=False)
    return [*(Sample(index, *text, finished=True) for index, text in enumerate(texts)), cut_off]


def test_a_sample_runs_if_it_parses_and_ends_without_an_error():
    found = [True, True, True, True, True]
    assert runs(samples(), found, trust_me=False) == [True, False, True, False, True]
    assert runs(samples(), [False, None, *found[2:]], trust_me=False) == [False, None, True, False, True]


def test_without_a_sandbox_nothing_is_executed(monkeypatch, caplog):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    sandbox.fences.cache_clear()
    assert runs(samples(), [True] * 5, trust_me=False) == [None] * 5
    assert "bubblewrap is not installed" in caplog.text
    sandbox.fences.cache_clear()
