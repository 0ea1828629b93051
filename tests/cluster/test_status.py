"""`cluster status`: what a person is told of a command that runs, is over, or has lost its launcher."""

import io
import json

import pytest
from rich.console import Console

from dist_lm.cluster.events import Journal, read_events
from dist_lm.cluster.heartbeat import Pulse
from dist_lm.config.root import save_config
from dist_lm.data.unfinished_builds import begin_pass
from dist_lm.errors import ArtefactError
from dist_lm.launcher.pipeline import queue_of
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.plan import Plan, PlannedStage
from dist_lm.stages.registry import stage_named
from dist_lm.stages.stage import Action, run_of
from dist_lm.storage import durable
from dist_lm.storage.lock import locked
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.metrics import MetricsWriter
from dist_lm.training.heartbeat import Phase
from dist_lm.verbs.cluster_status import as_json, print_status, read_status
from tests.conftest import TINY

NODES = [{"host": "n1", "address": "10.0.0.1"}, {"host": "n2", "address": "10.0.0.2"}]


def plan_in(work: WorkDirectory, run_id: str = "default") -> Plan:
    config = compose_config(["stage=language", *TINY, f"work_dir={work.path}", f"run_id={run_id}", "stage.steps=40"])
    actions = {"tokenizer": Action.READY, "shards": Action.READY, "language": Action.BUILD}
    stages = (PlannedStage(stage_named(name), config, action, f"of {name}") for name, action in actions.items())
    return Plan(tuple(stages))


def make_run(work: WorkDirectory, plan: Plan) -> None:
    """A run whose second attempt is at step 12, on two nodes of two ranks."""
    run = work.run("language", "default")
    run.create()
    save_config(plan.stages[-1].config, run.config)
    started = {"nodes": NODES, "ranks_per_node": 2, "device": "cuda", "layout": "dp_shard=4"}
    journal = Journal(run)
    journal.write("started", attempt=1, step=0, **started)
    journal.write("failed", attempt=1, error="rank 3 (GPU 1) on node 1 (n2): killed", rank=3, host="n2")
    journal.write("started", attempt=2, step=10, **started)
    with run.events.open("a") as file:
        file.write('{"time": 1, "ev')  # of a launcher that was killed
    journal.live([Pulse(rank, Phase.STEP, 12, 0.1 + rank, 0.5, "T" if rank == 3 else "") for rank in range(4)])
    with MetricsWriter(run.metrics) as metrics:
        metrics.write(12, {"train/loss": 3.25, "perf/tokens_per_s": 1234.0})
        metrics.write(12, {"checkpoint/stall_s": 0.1})


def shown(work: WorkDirectory) -> str:
    output = io.StringIO()
    print_status(read_status(work.path), Console(file=output, width=160))
    return output.getvalue()


@pytest.mark.heavy
def test_a_running_command_shows_stages_nodes_ranks_and_the_last_error(tmp_path):
    work = WorkDirectory(tmp_path)
    plan = plan_in(work)
    with queue_of(plan, ["launch", "stage=language", "cluster.token=sesame"], job="17") as pipeline:
        pipeline.begin("language")
        make_run(work, plan)
        (work.path / "builds" / "1a2b").mkdir(parents=True)
        begin_pass(work.path / "builds" / "1a2b", ["code"], "write", 7)
        with locked(work.run("language", "default").launch_lock):
            text = shown(work)
            status = json.loads(as_json(read_status(tmp_path)))
    for words in (
        "language-default: running",
        "job 17",
        "step 12/40  loss 3.250  1,234 tokens/s",
        "2 nodes x 2 ranks on cuda",
        "restarts after failures: 1",
        "rank 3 (GPU 1) on node 1 (n2): killed",
        "in a step (stopped)",
        "unfinished build of code, 0 of 7 tasks of pass write",
    ):
        assert words in text
    rows = {line.split()[1]: line.split() for line in text.splitlines() if "10.0.0." in line}
    assert rows["n1"][2:5] == ["10.0.0.1", "0-1", "12"]
    assert rows["n2"][2:5] == ["10.0.0.2", "2-3", "12"]
    assert status["state"] == "running"
    assert status["run"]["restarts"] == 1
    assert "sesame" not in json.dumps(status)
    assert len(list(read_events(work.run("language", "default").events))) == 3


@pytest.mark.heavy
def test_a_run_of_engines_shows_its_answers_and_its_figures(tmp_path):
    work = WorkDirectory(tmp_path)
    config = compose_config(["stage=evaluate", f"work_dir={tmp_path}", "stage.models=[m]"])
    plan, run = Plan((PlannedStage(stage_named("evaluate"), config, Action.BUILD, "code/a"),)), run_of(config)
    run.create()
    save_config(config, run.config)
    with queue_of(plan, ["launch"], job=None) as pipeline:
        pipeline.begin("evaluate")
        with MetricsWriter(run.metrics) as metrics, locked(run.launch_lock):
            assert "0 prompts answered" in shown(work)
            metrics.write(90, {"generate/engines": 2, "generate/tokens_per_s": 1234.0, "generate/eta_s": 185.0})
            text = shown(work)
        assert "90 prompts answered  2 engines  1,234 tokens/s  3:05 min left" in text
        assert "step" not in text
        assert "checkpoint" not in text
        figure = {"value": 0.46, "low": 0.3, "high": 0.6, "items": 50}
        task = {"figures": {"pass@1": figure}, "groups": {}, "ids": [], "values": []}
        durable.write_json(run.result, {"models": [{"model": "code/a", "tasks": {"own_python": task}}]})
        pipeline.end("done")
    text = shown(work)
    assert "own_python pass@1 0.460" in text
    assert "left" not in text


@pytest.mark.parametrize(("end", "state", "words"), [("done", "done", "done"), ("failed", "failed", "no luck")])
def test_a_command_that_is_over_shows_how_it_ended(tmp_path, end, state, words):
    work = WorkDirectory(tmp_path)
    with queue_of(plan_in(work), ["launch"], job=None) as pipeline:
        pipeline.begin("language")
        pipeline.end(end, "no luck" if end == "failed" else "")
    assert read_status(tmp_path).state == state
    assert words in shown(work)


def test_a_command_whose_process_is_gone_is_lost(tmp_path):
    work = WorkDirectory(tmp_path)
    with queue_of(plan_in(work), ["launch"], job=None) as pipeline:
        pipeline.begin("language")
    assert read_status(tmp_path).state == "lost"
    assert "its launcher is gone: the same command continues" in shown(work)


@pytest.mark.heavy
def test_the_newest_command_is_shown_and_others_are_named(tmp_path):
    work = WorkDirectory(tmp_path)
    for run_id in ("first", "second"):
        with queue_of(plan_in(work, run_id), ["launch"], job=None) as pipeline:
            pipeline.end("done")
    assert read_status(tmp_path).name == "language-second"
    assert read_status(tmp_path, "first").name == "language-first"
    assert "also here: language-first (done)" in shown(work)


def test_where_no_command_was_started_it_says_so(tmp_path):
    with pytest.raises(ArtefactError, match="no command was started here"):
        read_status(tmp_path)


def test_the_same_command_twice_is_refused_by_the_owners_name(tmp_path):
    plan = plan_in(WorkDirectory(tmp_path))
    with (
        queue_of(plan, ["launch"], job=None),
        pytest.raises(ArtefactError, match=r"stage=language run_id=default in .* is in use by process \d+ on"),
        queue_of(plan, ["launch"], job=None),
    ):
        pass
