"""CPU seconds of processes, from what the kernel says of them at one look after another."""

import pytest

from dist_lm.sandbox import watched
from dist_lm.sandbox.watched import UsedCpu


def process(pid: int, own: int, ended: int = 0) -> list[str]:
    """The fields of a process that used `own` ticks, and its ended children `ended`."""
    fields = [str(pid), *["0"] * 20]
    fields[12], fields[14] = str(own), str(ended)
    return fields


MISSED, MISSED_LATE = [process(2, 1)], [process(2, 1, 4)]  # a process ended during the look; its parent's time grew


@pytest.mark.parametrize(
    ("looks", "ticks"),
    [
        ([[process(2, 1)], [process(2, 5)]], 5),
        ([[process(2, 1), process(3, 4)], [process(2, 1)]], 5),  # nobody waited for 3
        ([[process(2, 1), process(3, 4)], [process(2, 1, 4)]], 5),  # its parent waited for 3
        ([[process(2, 1), process(3, 4)], [process(2, 2, 9)]], 11),
        ([[process(2, 1), process(3, 4)], [process(2, 1), process(4, 3)], [process(2, 1)]], 8),
        ([[process(2, 1), process(3, 2), process(4, 4, 3)], [process(2, 1, 9)]], 10),  # 4 waited for by 3, 3 by 2
        ([[process(2, 1), process(3, 4)], MISSED, [process(2, 1)]], 5),
        ([[process(2, 1), process(3, 4)], MISSED, [process(2, 1, 4)]], 5),
        ([[process(2, 1), process(3, 4)], MISSED_LATE, [process(2, 1, 4)]], 5),
    ],
)
def test_time_of_a_process_counts_once(monkeypatch, looks: list, ticks: int):
    monkeypatch.setattr(watched, "_TICKS", 100)
    monkeypatch.setattr(watched, "cpu_of_ended", lambda: 2.0)
    used = UsedCpu(2.0)
    for look in looks:
        seen = look, look is not MISSED and look is not MISSED_LATE
        monkeypatch.setattr(watched, "_processes_below", lambda seen=seen: seen)
        used.look()
    assert used.seconds == pytest.approx(ticks / 100)


def test_time_of_a_process_that_the_watching_one_waited_for_counts_once(monkeypatch):
    monkeypatch.setattr(watched, "_TICKS", 100)
    monkeypatch.setattr(watched, "cpu_of_ended", lambda: 2.0)
    used = UsedCpu(2.0)
    monkeypatch.setattr(watched, "_processes_below", lambda: ([process(2, 1), process(3, 4)], True))
    used.look()
    monkeypatch.setattr(watched, "cpu_of_ended", lambda: 2.047)
    monkeypatch.setattr(watched, "_processes_below", lambda: ([process(2, 1)], True))
    used.look()
    assert used.seconds == pytest.approx(0.057)
