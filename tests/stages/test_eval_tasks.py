"""Tasks during training: the figures of stage evaluate, none lost or repeated by a kill, and the same training."""

import json
from collections import Counter

import pytest
from safetensors.torch import load_file

from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.config.cluster import ClusterConfig
from dist_lm.launcher import pool_run
from dist_lm.launcher.pool_run import run_pool_stage
from dist_lm.launcher.process import Interrupt
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.plan import make_plan
from dist_lm.storage.durable import json_lines
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.metrics import read_metrics
from tests.cluster.generation_runs import Screen
from tests.cluster.pool_of_one import Alone
from tests.conftest import TINY_MODEL
from tests.training_run import copy_until, linked, numbers, prepare, train

TASKS = "stage.eval_tasks={own_sql: 4, own_bash: 0}"
SETTINGS = ("stage.steps=8", "stage.checkpoint_every=3", "stage.eval_every=8", "stage.eval_new_tokens=6")
ANSWERED = {4: {"own_sql"}, 8: {"own_sql", "own_bash"}}


def tasks_of(run: RunDirectory) -> dict[int, dict[str, list[dict]]]:
    """The records of every task, by step."""
    found: dict[int, dict[str, list[dict]]] = {}
    for path in sorted(run.samples.glob("eval/*/step_*.jsonl")):
        step = int(path.stem.removeprefix("step_"))
        found.setdefault(step, {})[path.parent.name] = list(json_lines(path))
    return found


def figures_of(run: RunDirectory) -> Counter:
    """How often each figure is in the metrics file: (step, name, value)."""
    lines = list(read_metrics(run.metrics))
    return Counter((line["step"], name, line[name]) for line in lines for name in line if name.startswith("eval/"))


def rest_of(run: RunDirectory) -> dict[int, dict[str, float]]:
    """The other numbers of a run."""
    return {
        step: {name: value for name, value in line.items() if not name.startswith("eval/")}
        for step, line in numbers(run).items()
    }


def weights_of(run: RunDirectory, result: dict) -> dict:
    folder = run.checkpoints / result["checkpoint"]
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def trained(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, dict]:
    """A run on two ranks with tasks between its steps."""
    work = linked(tiny_work, tmp_path_factory.mktemp("evaluated") / "work")
    run = prepare(work, "tasks", *SETTINGS, TASKS)
    return run, train(run, 2)


@pytest.mark.bars  # `test_eval_tasks_of_iterations.py` has the same of stage rlhf
def test_tasks_change_nothing_of_the_training(trained):
    run, result = trained
    plain = prepare(run.work, "plain", *SETTINGS)
    other = train(plain, 2)
    assert rest_of(plain) == rest_of(run)
    ours, theirs = weights_of(run, result), weights_of(plain, other)
    assert ours.keys() == theirs.keys()
    for file, tensors in ours.items():
        assert all((tensors[name] == theirs[file][name]).all() for name in tensors), file
    assert result["metrics"].keys() - other["metrics"].keys() >= {"eval/own_sql/pass@1", "eval/own_bash/high"}


@pytest.mark.heavy
def test_every_figure_is_there_once_with_its_interval(trained):
    run, _ = trained
    names = {f"eval/{task}/{end}" for task in ("own_sql", "own_bash") for end in ("pass@1", "low", "high")}
    expected = {(step, name) for step, own in ANSWERED.items() for name in names if name.split("/")[1] in own}
    found = figures_of(run)
    assert {(step, name) for step, name, _ in found} == expected
    assert set(found.values()) == {1}
    assert {step: set(own) for step, own in tasks_of(run).items()} == ANSWERED
    assert len(tasks_of(run)[4]["own_sql"]) == 50


@pytest.mark.heavy
def test_stage_evaluate_gives_the_same_answers(trained, monkeypatch: pytest.MonkeyPatch):
    run, result = trained
    monkeypatch.setattr(pool_run, "Pool", Alone)
    monkeypatch.setattr(RayCluster, "nodes", lambda self: [])
    words = [*TINY_MODEL, "stage=evaluate", "stage.max_new_tokens=6"]
    words += ["stage.tasks=[own_sql,own_bash]", f"stage.models=[{run.path}]", f"work_dir={run.work.path}"]
    (planned,) = make_plan("evaluate", lambda _: compose_config(words)).stages
    assert run_pool_stage(planned, RayCluster("nowhere", ClusterConfig(name="local")), Screen(), Interrupt())
    judged = run.work.run("evaluate", "default")
    for task, records in tasks_of(run)[8].items():
        files = sorted(judged.samples.glob(f"*/{task}-*.jsonl"))
        assert [record for path in files for record in json_lines(path)] == records
        (model,) = json.loads(judged.result.read_text())["models"]
        figure = model["tasks"][task]["figures"]["pass@1"]
        assert result["metrics"][f"eval/{task}/pass@1"] == figure["value"]
        assert result["metrics"][f"eval/{task}/high"] == figure["high"] > 0


@pytest.mark.heavy
def test_a_killed_run_neither_loses_nor_repeats_a_figure(trained):
    reference, _ = trained
    run = reference.work.run("language", "killed")
    copy_until(reference, run, 6)  # figures of steps 4 and 8 are in its files
    train(run, 2)
    assert numbers(run) == numbers(reference)
    assert figures_of(run) == figures_of(reference)
    assert tasks_of(run) == tasks_of(reference)
