"""Files of `stage.eval_tasks` and of prompts that change while a run goes on."""

import json
from pathlib import Path

import pytest

from dist_lm.config.root import Config
from dist_lm.errors import ArtefactError
from dist_lm.evaluation.in_loop import loop_tasks
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.run import begin_attempt
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.conftest import TINY, TINY_MODEL

PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": "def one():\n",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
    "entry_point": "one",
}


def config_with(file: Path, task: str = "humaneval") -> Config:
    return compose_config(["stage=code", *TINY, f"stage.eval_tasks={{{task}: 4}}", f"eval.humaneval={file}"])


@pytest.mark.heavy
def test_a_file_that_changed_is_refused_on_the_ranks_too(tiny_work, tmp_path):
    run = WorkDirectory(tmp_path / "work").run("code", "default")
    run.create()
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps(PROBLEM))
    run.note_files(config_with(file).noted_files)
    run.require_files(config_with(file).noted_files)
    file.write_text(json.dumps(PROBLEM | {"task_id": "HumanEval/1"}))
    with pytest.raises(ArtefactError, match=r"eval\.humaneval=.*problems\.jsonl: has changed since .*code/default"):
        loop_tasks(config_with(file), run, Tokenizer.load(tiny_work.tokenizer_model))
    run.require_files(config_with(file, "own_sql").noted_files)  # a file that no task reads
    other = file.rename(tmp_path / "more_problems.jsonl")
    run.require_files(config_with(other).noted_files)
    run.note_files(config_with(other).noted_files)
    assert len(durable.read_json(run.noted_files)) == 2


def test_a_run_without_files_of_tasks_writes_nothing(tmp_path):
    run = WorkDirectory(tmp_path / "work").run("code", "default")
    run.create()
    run.note_files(config_with(tmp_path / "none.jsonl", "own_sql").noted_files)
    assert not run.noted_files.exists()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("has_figures", "version", "hidden_seed"), [(False, "2", 0), (True, "1", None)], ids=["new run", "earlier release"]
)
def test_a_run_keeps_the_tests_of_our_problems_that_it_began_with(
    tiny_work, tmp_path, monkeypatch, has_figures: bool, version: str, hidden_seed: int | None
):
    """Found: a curve of eval/own_sql/pass@1 that falls where a new release went on, because its tests are harder."""
    run = WorkDirectory(tmp_path / "work").run("code", "default")
    run.create()
    if has_figures:
        run.task_samples("own_sql", 4).parent.mkdir(parents=True)
    config = config_with(tmp_path / "none.jsonl", "own_sql")
    for _ in range(2):
        begin_attempt(config, run)
        assert durable.read_json(run.noted_files) == {"eval.tests": version}
        assert durable.CHECKSUM in run.noted_files.read_text()
        run.task_samples("own_sql", 8).parent.mkdir(parents=True, exist_ok=True)

    asked = []
    monkeypatch.setattr("dist_lm.evaluation.in_loop.items_of", lambda task, asking, *rest: asked.append(asking) or [])
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    loop_tasks(config, run, tokenizer)
    assert [asking.hidden_seed for asking in asked] == [hidden_seed]
    run.noted_files.write_text('{"eval.tests": "3"}')
    with pytest.raises(ArtefactError, match=r"code/default: began with version 3 of the tests .*this release has 2"):
        loop_tasks(config, run, tokenizer)


@pytest.mark.heavy
def test_prompts_of_a_run_keep_their_content_and_their_number_of_files(tmp_path):
    run = WorkDirectory(tmp_path / "work").run("rlhf", "default")
    run.create()
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("Say one word\n")
    where = ("rlhf.prompts_from", f"{tmp_path}/?.txt"), ("rlhf.held_out_from", f"{tmp_path}/a.txt")
    config = compose_config(["stage=rlhf", *TINY_MODEL, *(f"{key}={path}" for key, path in where)])
    run.note_files(config.noted_files)
    run.require_files(config.noted_files)
    (tmp_path / "c.txt").write_text("Say one word\n")
    with pytest.raises(
        ArtefactError, match=r"rlhf\.prompts_from=.*txt: has changed since .*, or choose another run_id"
    ):
        run.require_files(config.noted_files)
    (tmp_path / "c.txt").unlink()
    (tmp_path / "a.txt").write_text("Say one word\nSay two words\n")
    for key, path in where:
        with pytest.raises(ArtefactError, match=f"^{key}="):
            run.require_files(compose_config(["stage=rlhf", *TINY_MODEL, f"{key}={path}"]).noted_files)
