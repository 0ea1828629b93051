"""Signals to the launcher: noted once, insisted on by a second Ctrl-C, and handed back afterwards."""

import io
import os
import signal

import pytest

from dist_lm.launcher.process import SIGNALS, watch_signals
from dist_lm.tracking.console import Console


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_said(number):
    errors = io.StringIO()
    before = signal.getsignal(number)
    with watch_signals(Console(errors=errors)) as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.number == number
    assert signal.getsignal(number) is before
    assert f"received {signal.Signals(number).name}: writing a checkpoint" in errors.getvalue()


def test_a_second_ctrl_c_ends_at_once():
    with watch_signals(Console(errors=io.StringIO())):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
