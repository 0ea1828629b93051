"""The table that a command ends with, and what it says to do next."""

import io
import json

import pytest

from dist_lm.launcher import outcome
from dist_lm.launcher.outcome import key_figures, next_commands, print_outcome
from dist_lm.launcher.pipeline import QueuedStage
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.plan import Plan, PlannedStage, plan_command
from dist_lm.stages.registry import all_stages, stage_named
from dist_lm.stages.stage import Action, run_of
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.tracking.registry import metric_of
from tests.conftest import tiny
from tests.prepare.planned import make_run, plan_of

COMMAND = ["launch.py", "stage=code", "work_dir=my work"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Stage language is done, stage code has come to step 3."""
    work = tmp_path_factory.mktemp("outcome") / "my work"
    stages = []
    for name in ("language", "code"):
        config = compose_config([f"stage={name}", f"work_dir={work}", "stage.steps=9"])
        run = run_of(config)
        run.create()
        with MetricsWriter(run.metrics) as metrics:
            for step in (1, 2, 3):
                metrics.write(step, {"train/loss": 5.0 - step, "val/bits_per_byte": 3.0 - step / 2})
        stages.append(PlannedStage(stage_named(name), config, Action.BUILD, "9 steps"))
    result = {"steps": 9, "seconds": 70.0, "metrics": {"val/bits_per_byte": 1.25}, "before": {"val/bits_per_byte": 8.0}}
    run_of(stages[0].config).result.write_text(json.dumps(result))
    return Plan(tuple(stages))


def printed(plan: Plan, stages: list[QueuedStage], state, width: int = 500) -> str:
    output = io.StringIO()
    console = Console(output)
    console._out.width = width
    print_outcome(plan, stages, state, COMMAND, console)
    return output.getvalue()


def test_each_stage_is_a_row_with_steps_time_figures_and_place(plan: Plan) -> None:
    queue = [QueuedStage("language", "done", ""), QueuedStage("code", "stopped", "", 12.0)]
    rows = {line.split()[0]: line for line in printed(plan, queue, "stopped").splitlines()}
    assert rows["language"].split()[1:5] == ["there", "9", "70", "s"]
    assert "val bits/byte 8.000 -> 1.250" in rows["language"]
    assert rows["language"].split()[-1] == "runs/language/default"
    assert rows["code"].split()[1:5] == ["stopped", "3/9", "12", "s"]
    assert "val bits/byte 2.500 -> 1.500" in rows["code"]


def test_a_command_that_did_not_end_well_says_how_to_go_on(plan: Plan) -> None:
    queue = [QueuedStage("language", "done", ""), QueuedStage("code", "failed", "", 12.0)]
    text = printed(plan, queue, "failed")
    assert "python -m dist_lm.launch stage=code 'work_dir=my work'" in text
    assert "python -m dist_lm cluster status" in text
    assert "generate" not in text


@pytest.mark.heavy
def test_what_is_done_can_be_talked_to_and_looked_at(plan: Plan, monkeypatch) -> None:
    stage = plan.stages[0]
    run = run_of(stage.config)
    names = [name for name, _ in next_commands(stage, "done", COMMAND)]
    assert names == ["talk to it", "serve it", "report", "next stage"]
    assert dict(next_commands(stage, "done", COMMAND))["serve it"] == f"python -m dist_lm serve '{run.path}'"
    assert "--chat" not in dict(next_commands(stage, "done", COMMAND))["talk to it"]
    monkeypatch.setattr(type(stage.stage), "answers_requests", True)
    assert dict(next_commands(stage, "done", COMMAND))["talk to it"].endswith(" --chat")
    monkeypatch.setattr(outcome, "can_be_launched", lambda overrides: False)
    assert [name for name, _ in next_commands(stage, "done", COMMAND)] == names[:-1]
    monkeypatch.undo()
    (run.wandb / "offline-run-1").mkdir(parents=True)
    commands = dict(next_commands(stage, "done", COMMAND))
    assert commands["curves"] == f"python -m dist_lm dashboard show --offline '{run.path}'"
    assert commands["next stage"] == "python -m dist_lm.launch stage=code 'work_dir=my work'"


@pytest.mark.heavy
def test_the_next_stage_goes_on_from_a_run_with_a_start_of_its_own(tmp_path) -> None:
    """Without the start, the stages before an adapted run were planned again, and the run itself was refused."""
    work = WorkDirectory(tmp_path)
    base = make_run(work, "code", done=True)
    adapted = ["run_id=adapted", f"stage.init_from={base.path}", "stage.lora.rank=4", "stage.lr=1e-4"]
    run = make_run(work, "code", *adapted, done=True)
    target = plan_of(work, *adapted).stages[-1]
    command = ["launch.py", "stage=code", *tiny("tools"), f"work_dir={work.path}", *adapted]
    (overrides,) = [text.split()[3:] for name, text in next_commands(target, "done", command) if name == "next stage"]
    assert overrides[0] == "stage=tools"
    assert f"stage.init_from={run.path}" in overrides
    assert not {"stage.lora.rank=4", "stage.lr=1e-4"} & {*overrides}
    assert [stage.name for stage in plan_command(overrides).stages] == ["tokenizer", "shards", "tools"]


@pytest.mark.heavy
def test_a_stage_whose_corpus_is_not_configured_is_no_next_stage(tmp_path) -> None:
    work = WorkDirectory(tmp_path / "work")
    (tmp_path / "lab" / "corpus").mkdir(parents=True)
    source = {"reader": "files", "path": str(tmp_path), "licence": "MIT"}
    (tmp_path / "lab" / "corpus" / "ours.yaml").write_text(json.dumps({"corpora": {"code": [source]}}))
    own = [f"hydra.searchpath=['{tmp_path}/lab']", "corpus=ours", "stage.init_from=none"]
    make_run(work, "code", *own, done=True)
    target = plan_of(work, *own).stages[-1]
    command = ["launch.py", "stage=code", *tiny("tools"), f"work_dir={work.path}", *own]
    assert "next stage" not in dict(next_commands(target, "done", command))


@pytest.mark.heavy
def test_a_command_that_began_nothing_has_no_table(plan: Plan) -> None:
    queue = [QueuedStage("language", "done", ""), QueuedStage("code", "waiting", "")]
    assert printed(plan, queue, "failed") == ""
    assert "language" in printed(plan, queue, "done")


def test_what_was_measured_once_has_no_after(tmp_path) -> None:
    run = RunDirectory(tmp_path / "runs" / "rlhf" / "stopped")
    run.create()
    rlhf, code = (stage_named(name).key_figures for name in ("rlhf", "code"))
    with MetricsWriter(run.metrics) as metrics:
        metrics.write(0, {"rlhf/win_rate": 0.54})
        for step in (1, 2, 3):
            metrics.write(step, {"rlhf/reward_mean": step / 2})
    assert key_figures(run, {}, rlhf) == ["wins 54% (step 0)", "reward 0.500 -> 1.500"]
    ended = {"steps": 3, "metrics": {"rlhf/win_rate": 0.75, "rlhf/reward_mean": 1.5}, "before": {"rlhf/win_rate": 0.54}}
    assert key_figures(run, ended, rlhf) == ["wins 54% -> 75%", "reward 0.500 -> 1.500"]
    with MetricsWriter(run.metrics) as metrics:
        metrics.write(3, {"val/loss": 2.0})
    assert key_figures(run, {"steps": 3, "metrics": {"val/loss": 2.0}, "before": {}}, code) == ["val loss 2.000"]


def test_figures_of_one_group_stand_beside_each_other(plan: Plan) -> None:
    run = run_of(plan.stages[1].config)
    result = {"metrics": {"rlhf/win_rate": 0.75, "rlhf/reward_mean": 1.0, "val/loss": 2.0}, "before": {}}
    assert key_figures(run, result, stage_named("rlhf").key_figures) == ["wins 75%", "reward 1.000"]
    assert all(metric_of(one.metric) for stage in all_stages() for line in stage.key_figures for one in line)
