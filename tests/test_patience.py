"""Deadlines of tests: those of a quiet machine at least, more on a slow or a busy one."""

import os

import pytest

from tests import patience
from tests.patience import MOST, patient


@pytest.mark.parametrize(
    ("slowness", "load", "expected"),
    [(0.5, 0.0, 10.0), (3.0, 0.0, 30.0), (1.0, 8.0, 40.0), (3.0, 8.0, 40.0), (99.0, 0.0, 10 * MOST)],
)
def test_a_deadline_grows_with_the_slowness_and_the_load_of_the_machine(monkeypatch, slowness, load, expected):
    monkeypatch.setattr(patience, "slowness", lambda: slowness)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert patient(10.0) == expected
