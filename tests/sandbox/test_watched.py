"""Time limits hold whatever a program does to the pipes and the process that watch it."""

import os
import select
import shutil
import signal
import struct
import time
from dataclasses import replace

import pytest

from dist_lm.sandbox import watched
from dist_lm.sandbox.frames import send_files, socketpair
from dist_lm.sandbox.judging import Judging
from dist_lm.sandbox.program import Limits, Program, Test
from dist_lm.sandbox.sandbox import Sandbox, fences
from dist_lm.sandbox.watched import Watched
from tests.patience import patient

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
DEADLINE_S = 30


class PipesDrainedBetween:
    """A poll after which every pipe is emptied, as a program can empty its own."""

    def __init__(self) -> None:
        self.poll_of_kernel = POLL()
        self.pipes: list[int] = []

    def register(self, file: int, events: int) -> None:
        self.pipes.append(file)
        self.poll_of_kernel.register(file, events)

    def unregister(self, file: int) -> None:
        self.poll_of_kernel.unregister(file)

    def poll(self, milliseconds: float) -> list[tuple[int, int]]:
        self.poll_of_kernel.poll(milliseconds)
        return [(self.pipes[0], select.POLLIN)]  # the watched process keeps it open and writes nothing


POLL = select.poll


def seconds_watched() -> float:
    """Watches a process that sleeps and keeps its pipes open. In a process of its own: it waits for all children."""
    pipes = [os.pipe() for _ in range(3)]
    child = os.fork()
    if child == 0:
        time.sleep(2 * DEADLINE_S)
        os._exit(0)
    for _, write_end in pipes:
        os.close(write_end)

    program = Watched(child, [read_end for read_end, _ in pipes], 1000, cpu_s=1, wall_s=0.2)
    program.watch()
    os.kill(child, signal.SIGKILL)
    return program.seconds


@pytest.mark.timeout(DEADLINE_S)
def test_a_pipe_that_was_emptied_does_not_stop_the_clock(monkeypatch):
    monkeypatch.setattr(watched.select, "poll", PipesDrainedBetween)
    watching = os.fork()
    if watching == 0:
        os._exit(seconds_watched() < 0.2)
    assert os.waitpid(watching, 0)[1] == 0


@pytest.mark.parametrize("way", ["all", "no_landlock", "namespaces"])
def test_the_first_process_of_a_run_obeys_no_signal(way: str):
    """A handler of Python, which Landlock older than version 6 does not fence, ended it."""
    found = {
        "all": fences(),
        "no_landlock": replace(fences(), landlock=0),
        "namespaces": replace(fences(), landlock=0, seccomp=False),
    }[way]
    source = """
import os, signal, time
for number in range(1, 65):
    try:
        os.kill(1, number)
    except OSError:
        pass
time.sleep(0.05)
"""
    with Sandbox(_fences=found) as sandbox:
        server = sandbox._start()
        verdict = sandbox.run(Program("python", source, (Test(), Test())), Limits(cpu_s=1, wall_s=patient(10)))
        assert verdict.outcome == "passed"
        assert sandbox._server is server, "the run was repeated"


def test_a_program_can_be_interrupted_as_usual():
    """The first process ignores SIGINT; programs do not inherit that."""
    python = (
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('yes')"
    )
    bash = "bash -c 'kill -INT $$; echo no' || echo yes"
    with Sandbox() as sandbox:
        for language, source in (("python", python), ("bash", bash)):
            verdict = sandbox.run(Program(language, source, (Test(stdout="yes"),)), Limits(wall_s=patient(4)))
            assert verdict.outcome == "passed", verdict


def test_only_what_a_judge_waited_in_this_test_counts(tmp_path):
    """One process judges many runs. On a busy machine it had soon waited so long in sum that every program that sleeps
    had no verdict."""
    stat, waited = tmp_path / "stat", tmp_path / "schedstat"
    stat.write_text(" ".join(["1 (judge) S", *["0"] * 48]))
    waited.write_text("0 90000000000 1")
    files = [os.open(path, os.O_RDONLY) for path in (stat, waited)]
    here, there = socketpair()
    judge = Judging(here, {"limits": {}, "folder": "", "language": "", "judged": []}, files[0])
    send_files(there, struct.pack("d", 0.0), files)
    judge.wait()
    assert judge.waited_seconds() == 0.0

    waited.write_text("0 95000000000 1")
    judge.judge(0, files)
    assert judge.waited_seconds() == 0.0
    waited.write_text("0 97000000000 1")
    assert judge.waited_seconds() == 2.0
    for file in (*files, here, there):
        os.close(file)
