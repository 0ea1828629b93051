"""A server that stalls, errors or vanishes at random costs a run nothing, and `wandb sync` brings it every row."""

import io
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_lm.config import TrackingConfig
from dist_lm.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.wandb_run import WandbRun
from tests.wandb_server import WandbServer

ROUNDS = 2
STEPS, STEP_S = 1500, 0.05


def followed(run: RunDirectory, server: WandbServer, home: Path, mode: str) -> tuple[float, str]:
    """(seconds that a launcher took, id) for a run of `STEPS` steps that are `STEP_S` apart."""
    run.create()
    began = time.monotonic()
    wandb_run = WandbRun.start(
        {},
        run,
        TrackingConfig(name="wandb", mode=mode),
        job_type="code",
        group="first",
        git_commit=None,
        command=[],
        environ=os.environ | server.environ(home),
        console=Console(output=io.StringIO(), errors=io.StringIO()),
    )
    assert wandb_run is not None
    for step in range(1, STEPS + 1):
        wandb_run.log(step, {"train/loss": 1.0 / step, "perf/step_s": STEP_S})
        time.sleep(max(0.0, began + step * STEP_S - time.monotonic()))
    wandb_run.finish("finished", 240.0)
    return time.monotonic() - began, wandb_run.id


def disturb(server: WandbServer, over: threading.Event, seed: int) -> None:
    """Stall, fail and vanish, in turns of a few seconds."""
    chance = random.Random(seed)
    while not over.is_set():
        trouble = chance.choice(("stall", "error", "vanish", "none"))
        server.stall, server.vanish = trouble == "stall", trouble == "vanish"
        server.error = chance.choice((500, 502, 503)) if trouble == "error" else None
        over.wait(chance.uniform(1.0, 5.0))


def heal(server: WandbServer) -> None:
    server.stall = server.vanish = False
    server.error = None


@pytest.mark.heavy
@pytest.mark.timeout(2400)
def test_a_run_is_as_fast_and_every_row_arrives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times: dict[str, list[float]] = {"offline": [], "online": [], "chaos": []}
    with WandbServer() as server:
        for turn in range(ROUNDS):
            for kind in times:
                run = RunDirectory(tmp_path / kind / "runs" / "code" / str(turn))
                over = threading.Event()
                trouble = threading.Thread(target=disturb, args=(server, over, turn))
                if kind == "chaos":
                    trouble.start()
                mode = "offline" if kind == "offline" else "online"
                took, identity = followed(run, server, tmp_path, mode)
                times[kind].append(took)
                over.set()
                if kind == "chaos":
                    trouble.join()
                heal(server)
                rows_before = len(server.runs[identity].steps()) if identity in server.runs else 0
                command = [Path(sys.executable).with_name("wandb"), "sync", str(run.wandb)]
                environ = os.environ | server.environ(tmp_path)
                subprocess.run(command, env=environ, cwd=tmp_path, check=True, capture_output=True)
                with capsys.disabled():
                    print(f"{kind} {turn}: {took:.1f} s, {rows_before} of {STEPS} rows at the end")
                losses = {step: row["train/loss"] for step, row in server.run(identity).steps().items()}
                assert losses == {step: pytest.approx(1.0 / step) for step in range(1, STEPS + 1)}
    assert server.unforeseen == []
    with capsys.disabled():
        usual = min(times["offline"])
        print({kind: f"{min(took):.1f} s ({100 * (min(took) / usual - 1):+.1f} %)" for kind, took in times.items()})
