"""The log's lines on conversations without a reward."""

import logging

from dist_lm.environments.protocol import Failure, Task, Verdict
from dist_lm.rlhf.failure_notes import FailureNotes


def noted(caplog, *failures: tuple[Failure, str]) -> FailureNotes:
    """Returns the notes of conversations of tasks 0, 1, ... that failed like this, as sample 7 of each."""
    caplog.set_level(logging.INFO)
    notes = FailureNotes()
    for number, failure in enumerate(failures):
        notes.note(Task.of(str(number), {}), 7, Verdict.failed(*failure))
    return notes


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_broken_environment_is_one_warning_of_each_reason_and_a_sum(caplog):
    """Finds a screen full of the same line, and one that does not tell how many conversations failed."""
    notes = noted(caplog, *[("crashed", "KeyError: 'x'")] * 49, ("timeout", ""))
    notes.summarise(64)
    assert warnings(caplog) == [
        "task 0, sample 7 has no reward: crashed: KeyError: 'x'",
        "task 49, sample 7 has no reward: timeout",
        "50 of 64 conversations have no reward (crashed 49, timeout 1); the log names each",
    ]
    assert len(caplog.records) == 51


def test_failures_that_were_all_named_are_not_summed_up(caplog):
    notes = noted(caplog, ("crashed", "no"), ("timeout", "late"))
    notes.note(Task.of("9", {}), 0, Verdict.of(0.0))
    notes.summarise(3)
    assert len(warnings(caplog)) == len(caplog.records) == 2


def test_what_an_environment_says_cannot_write_a_line_of_its_own(caplog):
    """Finds a detail that moves the cursor of the terminal, or that looks like another line of the log."""
    noted(caplog, ("crashed", "a\x1b[2J\0b\nWARNING all is well"))
    assert warnings(caplog) == [r"task 0, sample 7 has no reward: crashed: a\x1b[2J\x00b WARNING all is well"]
