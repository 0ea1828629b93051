"""A program without a verdict runs again, alone, before and after a control: it cannot choose `infrastructure`."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from dist_lm.sandbox import sandbox as module
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import Limits, Program, Verdict
from dist_lm.sandbox.sandbox import Fences, Sandbox
from tests.patience import patient

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
PROGRAM = Program("python", "print(1)")
LIMITS = Limits(cpu_s=0.5, wall_s=4)


def verdict(outcome: str, seconds: float = 0.1, cpu_seconds: float = 0.1) -> Verdict:
    return Verdict(outcome, (outcome == "passed",), ("",), outcome, seconds, cpu_seconds)  # type: ignore[arg-type]


STARVED, ENDED = verdict("infrastructure", seconds=4.0, cpu_seconds=0.01), verdict("infrastructure", seconds=0.0)
QUIET, BUSY, BROKEN = verdict("passed"), verdict("passed", seconds=2.0), verdict("infrastructure")


@pytest.fixture
def runs(monkeypatch) -> Callable[..., list[Program]]:
    """(verdicts of the program, verdicts of the control) -> the programs that were run, filled as they are."""

    def play(programs: list[Verdict], controls: list[Verdict]) -> list[Program]:
        ran: list[Program] = []

        def run_once(self: Sandbox, program: Program, limits: Limits) -> Verdict:
            ran.append(program)
            return (controls if program.source == module._CONTROL else programs).pop(0)

        monkeypatch.setattr(Sandbox, "_run_once", run_once)
        return ran

    return play


def ran_once() -> Sandbox:
    return Sandbox(_fences=Fences(False, False, 0, False, False))


@pytest.mark.parametrize(
    ("programs", "controls", "outcome"),
    [
        ([verdict("failed")], [], "failed"),
        ([STARVED, verdict("passed")], [QUIET], "passed"),
        ([STARVED, verdict("timeout")], [QUIET], "timeout"),
        ([STARVED, STARVED], [QUIET, QUIET], "timeout"),
        ([ENDED, ENDED], [QUIET, QUIET], "failed"),
        ([STARVED], [BUSY], "infrastructure"),
        ([ENDED], [BROKEN], "infrastructure"),
        ([STARVED, STARVED], [QUIET, BUSY], "infrastructure"),
    ],
)
def test_only_a_machine_that_starves_the_control_too_is_to_blame(runs, programs, controls, outcome):
    ran = runs(list(programs), list(controls))
    assert ran_once().run(PROGRAM, LIMITS).outcome == outcome
    assert len(ran) == len(programs) + len(controls)


def test_a_program_with_a_verdict_costs_no_control(runs):
    ran = runs([verdict("timeout")], [])
    ran_once().run(PROGRAM, LIMITS)
    assert ran == [PROGRAM]


def test_the_control_needs_a_real_core():
    """Its cost is known: a tenth of a second of CPU time."""
    with Sandbox() as sandbox:
        control = sandbox._run_once(Program("python", module._CONTROL), Limits(cpu_s=1.0, wall_s=10.0))
    assert control.outcome == "passed"
    assert 0.09 < control.cpu_seconds < patient(0.3)


def test_a_second_run_is_alone_in_its_pool(monkeypatch):
    """Others end before it and begin after it, also several second runs at once."""
    lock = threading.Lock()
    running: set[int] = set()
    beside: list[int] = []  # programs that ran beside a second run
    seen: set[str] = set()

    def run_once(self: Sandbox, program: Program, limits: Limits) -> Verdict:
        number = threading.get_ident()
        is_second = program.source in seen or program.source == module._CONTROL
        with lock:
            running.add(number)
            seen.add(program.source)
        threading.Event().wait(0.01)
        with lock:
            if is_second:
                beside.append(len(running - {number}))
            running.remove(number)
        is_starved = program.source.startswith("starve") and not is_second
        return STARVED if is_starved else QUIET

    monkeypatch.setattr(Sandbox, "_run_once", run_once)
    monkeypatch.setattr("dist_lm.sandbox.pool.fences", lambda trust_me: None)
    programs = [Program("python", f"{'starve' if i % 3 == 0 else 'quick'} {i}") for i in range(24)]
    with SandboxPool(workers=4) as pool:
        assert {verdict.outcome for verdict in pool.run(programs, LIMITS)} == {"passed"}
    assert len(beside) == 16  # a control and a second run for each of eight
    assert not any(beside)


BUSY_SESSIONS = 40
BURNERS = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
children = []
for _ in range(int(sys.argv[2])):
    children.append(os.fork())
    if children[-1] == 0:
        os.setsid()  # the kernel shares a core among sessions first
        import ctypes
        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # ends with the parent
        while True:
            pass
print(flush=True)
os.wait()
"""


@pytest.fixture
def busy_core() -> Iterator[int]:
    """A core that many processes outside the sandbox use all the time."""
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-c", BURNERS, str(core), str(BUSY_SESSIONS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield core
        process.kill()


@pytest.mark.heavy  # two minutes of CPU, which others wait for
def test_a_program_that_chooses_a_busy_core_is_not_starved(busy_core: int, caplog: pytest.LogCaptureFixture):
    """It waits by its own choice: on a core that others use, and with the lowest priority."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs a second core")
    source = f"""
import os
os.sched_setaffinity(0, {{{busy_core}}})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while True: pass
"""
    limits = Limits(cpu_s=0.1, wall_s=3.0)
    with Sandbox() as sandbox:
        verdict = sandbox.run(Program("python", source), limits)
        if not verdict.judged and not sandbox._control_passes(limits):
            pytest.skip("this machine has no core for a control either")
    # On a busy core even its end can take longer than the sandbox waits. Without a verdict twice, where a control has
    # one, it counts as failed; a program that fails by itself has not waited for a core.
    if verdict.outcome != "timeout":
        assert verdict.outcome == "failed"
        assert "no verdict twice, where a control has one" in caplog.text
