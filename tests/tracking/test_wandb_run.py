"""wandb gets the metrics under their names, once, without secrets; its failure does not touch the run."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_lm.config import TrackingConfig
from dist_lm.errors import ConfigError
from dist_lm.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.wandb_run import WandbRun, wandb_mode


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "code" / "first")
    run.create()
    return run


def start(run: RunDirectory, errors: io.StringIO, project: str = "dist_lm") -> WandbRun:
    wandb_run = WandbRun.start(
        {"seed": 7, "hub": {"token": "sesame"}},
        run,
        TrackingConfig(name="wandb", project=project, mode="offline"),
        job_type="code",
        group="first",
        git_commit="0123abc",
        command=["launch", "stage=code", "+hub.token=sesame"],
        environ={},
        console=Console(errors=errors),
    )
    assert wandb_run is not None
    return wandb_run


def records(run: RunDirectory) -> list[dict[str, Any]]:
    """What wandb's own tool reads in the offline runs of a run directory, oldest first."""
    found = []
    for log in sorted(run.wandb.glob("offline-run-*/*.wandb"), key=lambda log: log.stat().st_mtime_ns):
        wandb = Path(sys.executable).with_name("wandb")
        output = subprocess.run(
            [wandb, "leet", "inspect", "--json", log], check=True, capture_output=True, text=True
        ).stdout
        found += [json.loads(line) for line in output.splitlines()]
    return found


def history(run: RunDirectory) -> list[tuple[int, dict[str, float]]]:
    items = [record["history"]["item"] for record in records(run) if record["type"] == "history"]
    return [
        (item["_step"], {name: value for name, value in item.items() if not name.startswith("_")}) for item in items
    ]


def test_an_offline_run_has_the_metrics_once_and_no_secret(run: RunDirectory) -> None:
    errors = io.StringIO()
    first = start(run, errors)
    first.log(1, {"step": 1, "time": 1.0, "train/loss": 3.0, "train/grad_norm": None})
    first.log(2, {"step": 2, "time": 2.0, "train/loss": 2.0})
    first.log(2, {"step": 2, "time": 2.5, "checkpoint/stall_s": 0.5})
    first.finish()
    second = start(run, errors)  # resumed from a checkpoint at step 1
    for step in (2, 3):
        second.log(step, {"step": step, "train/loss": 6.0 / step})
    second.finish()

    assert errors.getvalue() == ""
    assert second.id == first.id
    assert history(run) == [
        (1, {"train/loss": 3}),
        (2, {"train/loss": 2, "checkpoint/stall_s": 0.5}),
        (3, {"train/loss": 2}),
    ]
    started = next(record["run"] for record in records(run) if record["type"] == "run")
    assert (started["project"], started["job_type"], started["run_group"]) == ("dist_lm", "code", "first")
    assert started["config"]["update"]["git_commit"] == "0123abc"
    assert started["config"]["update"]["seed"] == 7
    for path in run.wandb.rglob("*"):
        assert not path.is_file() or b"sesame" not in path.read_bytes(), path


def test_a_failure_of_wandb_is_said_once_and_ends_nothing(run: RunDirectory) -> None:
    errors = io.StringIO()
    broken = start(run, errors, project="no/such:project")
    for step in range(3):
        broken.log(step, {"train/loss": 1.0})
    broken.finish()
    assert errors.getvalue().count("warning: wandb stopped") == 1
    assert errors.getvalue().count("\n") == 1


def test_the_mode_follows_the_login_and_never_asks(tmp_path: Path) -> None:
    auto, online = TrackingConfig(name="wandb"), TrackingConfig(name="wandb", mode="online")
    nobody = {"HOME": str(tmp_path)}
    assert wandb_mode(auto, nobody) == "offline"
    assert wandb_mode(auto, nobody | {"WANDB_API_KEY": "key"}) == "online"
    assert wandb_mode(auto, nobody | {"WANDB_API_KEY": "key", "WANDB_MODE": "offline"}) == "offline"
    assert wandb_mode(TrackingConfig(name="wandb", mode="offline"), {"WANDB_API_KEY": "key"}) == "offline"
    with pytest.raises(ConfigError, match=r"tracking\.mode=online: no wandb login"):
        wandb_mode(online, nobody)

    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode(auto, nobody) == wandb_mode(online, nobody) == "online"
    assert wandb_mode(auto, nobody | {"WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"
