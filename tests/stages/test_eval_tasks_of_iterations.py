"""Tasks in stage rlhf: answered by the engine that draws rollouts, with the policy of their iteration."""

from pathlib import Path

import pytest

from dist_lm.evaluation.in_loop import LoopTasks
from dist_lm.evaluation.tasks import Item
from dist_lm.generation.request import SamplingParams
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.rollouts import EngineRollouts
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.stages.rlhf.controller import answer_tasks
from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.test_rlhf_run import prepare, work_of
from tests.rlhf.toy import MODEL, engine_of
from tests.stages.test_eval_tasks import figures_of, rest_of, tasks_of
from tests.training_run import copy_until, linked, numbers, train, write_untrained

SETTINGS = ("stage.steps=4", "stage.eval_new_tokens=6", "rlhf.held_out_prompts=0")
TASKS = "stage.eval_tasks={own_sql: 3}"


@pytest.fixture(scope="module")
def started(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    work = linked(tiny_work, tmp_path_factory.mktemp("started"))
    write_untrained(work, "tools", 0)
    return work


@pytest.mark.parametrize(
    "staleness", [pytest.param(0, marks=pytest.mark.bars), pytest.param(1, marks=pytest.mark.heavy)]
)
def test_figures_are_there_once_after_a_kill_and_training_is_the_same(started, tmp_path: Path, staleness: int):
    own = (*SETTINGS, f"rlhf.max_staleness={staleness}")
    run = prepare(work_of(started, tmp_path / "tasks"), *own, TASKS)
    train(run, 1)
    plain = prepare(work_of(started, tmp_path / "plain"), *own)
    train(plain, 1)
    assert rest_of(run) == rest_of(plain)
    assert {step: len(records["own_sql"]) for step, records in tasks_of(run).items()} == {3: 50, 4: 50}
    assert tasks_of(run)[3] != tasks_of(run)[4]
    assert set(figures_of(run).values()) == {1}
    assert {step for step, _, _ in figures_of(run)} == {3, 4}

    work = work_of(started, tmp_path / "killed")
    killed = work.run("rlhf", "default")
    copy_until(run, killed, 2)  # it has figures of later iterations
    prepare(work, *own, TASKS)
    train(killed, 1)
    assert numbers(killed) == numbers(run)
    assert tasks_of(killed) == tasks_of(run)
    assert figures_of(killed) == figures_of(run)


def test_a_question_that_the_engine_refuses_is_recorded_and_does_not_end_training():
    def item(name: str, token: int) -> Item:
        passed = {"passed": True, "outcome": "passed"}
        return Item(name, "", [token], SamplingParams(2), 1, lambda *_: lambda: passed)

    tasks = LoopTasks({"bfcl": 0}, {"bfcl": [item("strange", 10**6), item("known", 1)]}, steps=1, seed=0)
    source, model = EngineRollouts(engine_of()), Transformer(MODEL)
    initialise(model, 0)
    source.load_weights(model.state_dict(), 0)
    records = answer_tasks(source, tasks, SandboxPool, ["bfcl"])["bfcl"]
    assert [(one["id"], one["outcome"]) for one in records] == [("strange", "refused"), ("known", "passed")]
    assert records[0]["error"].startswith("prompt has token 1000000")
