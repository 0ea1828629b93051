"""Checks that stand in for the real ones: what `target` of a check names."""

import json
import os
import signal
import time

from dist_lm.gpu_check.launched import launched
from dist_lm.gpu_check.probe import Probe, expect
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory


def passes(probe: Probe) -> None:
    probe.note("speed tokens/s", 12345.678)


def finds_something(probe: Probe) -> None:
    probe.note("before MiB", 3)
    expect(False, "the sums differ")


def breaks(probe: Probe) -> None:
    raise RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA")


def dies(probe: Probe) -> None:
    print("the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def never_ends(probe: Probe) -> None:
    probe.note("half s", 0.5)
    if os.fork() == 0:
        os.setsid()  # as torchrun does with ranks
    time.sleep(600)


def launches(probe: Probe) -> None:
    with launched(probe, WorkDirectory(probe.folder / "work"), "stage=tokenizer") as launcher:
        launcher.send_signal(signal.SIGSTOP)  # it must not end by itself
        durable.write_text(probe.folder / "pids.json", json.dumps([os.getpid(), launcher.pid]))
        time.sleep(600)
