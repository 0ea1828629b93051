"""No panel of a stage's board is empty for a run of that stage: what ranks write, as an offline wandb run holds it."""

import io

import pytest

from dist_lm.config.root import TrackingConfig
from dist_lm.launcher.pool_run import run_pool_stage
from dist_lm.launcher.process import Interrupt
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.dashboard import board_of
from dist_lm.tracking.metrics import read_metrics
from dist_lm.tracking.wandb_run import WandbRun
from tests.cluster.generation_runs import Screen, plan_of, write_prompts
from tests.cluster.test_reward_run import SETTINGS as REWARD_SETTINGS
from tests.cluster.test_reward_run import work as ranked_work  # noqa: F401 - a fixture
from tests.cluster.test_rlhf_run import reference as rlhf_run  # noqa: F401 - a fixture
from tests.cluster.test_rlhf_run import started_work  # noqa: F401 - a fixture
from tests.tracking.test_dashboard import shows
from tests.tracking.wandb_files import assert_every_metric, history_names
from tests.training_run import linked, prepare, train

pytestmark = pytest.mark.cluster


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
    return history_names(run)


def assert_no_panel_is_empty(run: RunDirectory, stage: str) -> None:
    names = history(run, stage)
    written = [panel for panel in board_of(stage).panels if not all(metric.only for metric in panel.metrics)]
    empty = [panel.title for panel in written if not any(shows(panel, name) for name in names)]
    assert empty == [], sorted(names)
    assert_every_metric(names, stage)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "stage", ["code", *(pytest.param(stage, marks=pytest.mark.bars) for stage in ("language", "tools"))]
)
def test_stages_that_predict_text(tiny_work, tmp_path, stage: str) -> None:
    run = prepare(linked(tiny_work, tmp_path / "work"), "panels", "stage.init_from=none", stage=stage)
    train(run, ranks=1)
    assert_no_panel_is_empty(run, stage)


@pytest.mark.bars
def test_the_reward_model(ranked_work, tmp_path) -> None:  # noqa: F811
    start = ranked_work.run("tools", "default").path
    run = prepare(ranked_work, "panels", *REWARD_SETTINGS, f"stage.init_from={start}", stage="reward")
    train(run, ranks=1)
    assert_no_panel_is_empty(run, "reward")


@pytest.mark.heavy
def test_generation(trained, cluster, tmp_path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 60)
    assert run_pool_stage(plan_of(trained, prompts, "run_id=panels"), cluster, Screen(), Interrupt())
    assert_no_panel_is_empty(trained.run("generate", "panels"), "generate")


@pytest.mark.heavy
def test_reinforcement_learning(rlhf_run) -> None:  # noqa: F811
    assert_no_panel_is_empty(rlhf_run, "rlhf")
