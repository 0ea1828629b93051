"""No panel of a stage's board is empty for a run of that stage: what ranks write, as an offline wandb run holds it."""

import io
import json
import subprocess
import sys

import pytest

from dist_lm.config import TrackingConfig
from dist_lm.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.dashboard.layout import board_of
from dist_lm.tracking.dashboard.show import newest_offline
from dist_lm.tracking.metrics import read_metrics
from dist_lm.tracking.wandb_run import WandbRun
from tests.cluster.test_reward_run import SETTINGS as REWARD_SETTINGS
from tests.cluster.test_reward_run import work as ranked_work  # noqa: F401 - a fixture
from tests.cluster.test_rlhf_run import reference as rlhf_run  # noqa: F401 - a fixture
from tests.cluster.test_rlhf_run import started_work  # noqa: F401 - a fixture
from tests.training_run import linked, prepare, train

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def history(run: RunDirectory, stage: str) -> set[str]:
    """The names of metrics in an offline wandb run of what a run has written."""
    errors = io.StringIO()
    wandb_run = WandbRun.start(
        {},
        run,
        TrackingConfig(name="wandb", mode="offline"),
        job_type=stage,
        group="default",
        git_commit=None,
        command=[],
        environ={},
        console=Console(errors=errors),
    )
    assert wandb_run is not None
    for line in read_metrics(run.metrics):
        wandb_run.log(line["step"], line)
    wandb_run.finish("finished")
    assert errors.getvalue() == ""
    (log,) = newest_offline(run).glob("*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    said = subprocess.run(inspect, cwd=run.path, check=True, capture_output=True, text=True).stdout
    records = map(json.loads, said.splitlines())
    return {name for record in records if record["type"] == "history" for name in record["history"]["item"]}


def assert_no_panel_is_empty(run: RunDirectory, stage: str) -> None:
    names = history(run, stage)
    written = [panel for panel in board_of(stage).panels if panel.metrics[0].group != "system"]
    empty = [panel.title for panel in written if not any(map(panel.shows, names))]
    assert empty == [], sorted(names)


@pytest.mark.parametrize(
    "stage", ["language", *(pytest.param(stage, marks=pytest.mark.heavy) for stage in ("code", "tools"))]
)
def test_stages_that_predict_text(tiny_work, tmp_path, stage: str) -> None:
    run = prepare(linked(tiny_work, tmp_path / "work"), "panels", "stage.init_from=none", stage=stage)
    train(run, ranks=1)
    assert_no_panel_is_empty(run, stage)


@pytest.mark.heavy
def test_the_reward_model(ranked_work, tmp_path) -> None:  # noqa: F811
    start = ranked_work.run("tools", "default").path
    run = prepare(ranked_work, "panels", *REWARD_SETTINGS, f"stage.init_from={start}", stage="reward")
    train(run, ranks=1)
    assert_no_panel_is_empty(run, "reward")


@pytest.mark.heavy
def test_reinforcement_learning(rlhf_run) -> None:  # noqa: F811
    assert_no_panel_is_empty(rlhf_run, "rlhf")
