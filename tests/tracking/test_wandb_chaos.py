"""A server that stalls, errors or vanishes at random: `wandb sync` brings it every row, whatever got through before.

What that costs the run is measured by `python -m dist_lm bench tracking`.
"""

import io
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_lm.config.root import TrackingConfig
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.wandb_run import WandbRun
from tests.tracking.wandb_server import WandbServer

STEPS, STEP_S = 800, 0.05


def followed(run: RunDirectory, server: WandbServer, home: Path) -> str:
    """The id of a run of `STEPS` steps that are `STEP_S` apart, online."""
    run.create()
    wandb_run = WandbRun.start(
        {},
        run,
        TrackingConfig(name="wandb", mode="online"),
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
        time.sleep(STEP_S)
    wandb_run.finish("finished", 240.0)
    return wandb_run.id


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
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.bars)])
def test_every_row_arrives(tmp_path: Path, seed: int) -> None:
    run, over = RunDirectory(tmp_path / "runs" / "code" / "first"), threading.Event()
    with WandbServer() as server:
        trouble = threading.Thread(target=disturb, args=(server, over, seed))
        trouble.start()
        try:
            identity = followed(run, server, tmp_path)
        finally:
            over.set()
            trouble.join()
        heal(server)
        command = [Path(sys.executable).with_name("wandb"), "sync", str(run.wandb)]
        environ = os.environ | server.environ(tmp_path)
        subprocess.run(command, env=environ, cwd=tmp_path, check=True, capture_output=True)
        losses = {step: row["train/loss"] for step, row in server.run(identity).steps().items()}
    assert losses == {step: pytest.approx(1.0 / step) for step in range(1, STEPS + 1)}
    assert server.unforeseen == []
