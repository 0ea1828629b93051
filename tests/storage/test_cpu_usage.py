"""How many cores other programs leave free."""

import pytest

from dist_lm.storage import process
from dist_lm.storage.process import CpuUsage

CLOCK, IDLE, ALL, OWN = range(4)  # seconds, as in a sample


@pytest.mark.parametrize(
    ("after", "free"),
    [
        ((10, 40, 40, 0), 4),  # nothing else runs
        ((10, 30, 40, 10), 4),  # this process alone
        ((10, 0, 40, 10), 1),  # others use the other three
        ((10, 0, 40, 2), 0),  # others use all
    ],
)
def test_idle_cores_and_those_of_this_process_are_free(monkeypatch, after, free):
    samples = iter([(0.0, 0.0, 0.0, 0.0), after])
    monkeypatch.setattr(CpuUsage, "SHORTEST_S", 0.0)
    monkeypatch.setattr(CpuUsage, "_sample", staticmethod(lambda: next(samples)))
    assert CpuUsage().free_cores() == free


def test_counters_that_stand_still_say_nothing(monkeypatch):
    samples = iter([(0.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.5)])
    monkeypatch.setattr(CpuUsage, "SHORTEST_S", 0.0)
    monkeypatch.setattr(CpuUsage, "_sample", staticmethod(lambda: next(samples)))
    monkeypatch.setattr(process, "cores", lambda: 7)
    assert CpuUsage().free_cores() == 7


def test_the_real_counters_are_read():
    assert CpuUsage().free_cores() >= 0
