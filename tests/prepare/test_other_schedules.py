"""Runs that go on under another schedule: what continues exactly is planned, the rest is refused by name."""

import json
import re
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial

import pytest

from dist_lm.config.root import Config, save_config
from dist_lm.config.stage import MuonConfig
from dist_lm.data.manifest import record_content
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.prepare.plan import make_plan
from dist_lm.stages.registry import stage_named
from dist_lm.stages.stage import Action, Look, run_of
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint_files
from dist_lm.training.state import TrainState
from tests.conftest import composed, tiny
from tests.training_run import linked

BASE = {"steps": 20, "warmup_steps": 2, "init_from": "none"}
COSINE = {"schedule": "cosine"}
WSD = {"schedule": "wsd"}
COOLED = {"muon": MuonConfig(momentum_cooldown_steps=4)}


@pytest.fixture
def work(tiny_work: WorkDirectory, tmp_path) -> WorkDirectory:
    return linked(tiny_work, tmp_path / "work")


def config_of(work: WorkDirectory, stage: str = "language", run_id: str = "default", **keys) -> Config:
    config = deepcopy(composed([f"stage={stage}", *tiny(stage)]))
    return replace(config, work_dir=str(work.path), run_id=run_id, stage=replace(config.stage, **(BASE | keys)))


def look(config: Config) -> Look:
    return stage_named(config.stage.name).look(config, is_target=True, rebuilt=())


def make_run(work: WorkDirectory, at=(20,), stage: str = "language", **keys) -> RunDirectory:
    """A finished run of 20 steps with checkpoints."""
    config = look(config_of(work, stage, **keys)).config
    run = run_of(config)
    run.create()
    save_config(config, run.config)
    record_content(run, config.corpus_names)
    for step in at:
        directory = run.checkpoints / checkpoint_files.step_name(step)
        directory.mkdir()
        checkpoint_files.write_state(directory, TrainState(step=step), asdict(config.model))
        checkpoint_files.write_pointer(run.checkpoints, checkpoint_files.LATEST, directory)
    run.result.write_text(json.dumps({"steps": 20}))
    return run


@pytest.mark.heavy
def test_a_finished_constant_run_goes_on_with_more_steps(work):
    make_run(work, **WSD)
    assert look(config_of(work, **WSD)).action is Action.READY
    found = look(config_of(work, **WSD, steps=40))
    assert found.action is Action.RESUME
    assert re.fullmatch(r"from step_00000020 to step 40, [\d.]+ epochs of language", found.detail)
    decay = {"decay_steps": 5, "decay": "linear", "min_lr_ratio": 0.0}
    assert look(config_of(work, **WSD, steps=25, **decay)).action is Action.RESUME


@pytest.mark.parametrize(
    ("of_run", "given", "said"),
    [
        (
            COSINE,
            COSINE | {"steps": 40},
            r"steps=40 \(was 20\): it has taken 20 steps, and step 4 would have had another rate",
        ),
        (WSD | {"decay_steps": 5}, WSD | {"steps": 40, "decay_steps": 5}, "and step 16 would have had another rate"),
        (WSD | COOLED, WSD | COOLED | {"steps": 40}, "and step 17 would have had another rate or momentum"),
        (WSD, WSD | {"decay_steps": 5}, r"stage.decay_steps=5 \(was 0\)"),
        (WSD, WSD | {"steps": 10}, r"stage.steps=10 \(was 20\): it has taken 20 steps\. "),
    ],
)
def test_what_would_be_another_curve_is_refused_with_the_ways_out(work, of_run, given, said):
    make_run(work, **of_run)
    with pytest.raises(ConfigError, match=said) as refused:
        look(config_of(work, **given))
    assert "stage.branch_from=" in str(refused.value)
    assert "choose another run_id than default, or branch" in str(refused.value)
    assert "stage.schedule=wsd can go on" in str(refused.value)


def test_a_key_that_is_none_of_the_schedule_is_refused_as_before(work):
    make_run(work, **WSD)
    with pytest.raises(ConfigError, match=r"stage.lr=0.5 \(was 0.03\).*: give them the same values, or choose another"):
        look(config_of(work, **WSD, steps=40, lr=0.5))


def test_a_later_stage_takes_a_finished_run_of_any_length(work):
    make_run(work, **WSD)
    config = config_of(work, **WSD, steps=40)
    assert stage_named("language").look(config, is_target=False, rebuilt=()).action is Action.READY


def test_the_keys_of_an_earlier_stage_are_named_as_the_command_gives_them(work):
    run = make_run(work, **COSINE)
    run.result.unlink()
    said = r"stages\.language\.steps=40 \(was 20\): .* stage=language stage.branch_from="
    with pytest.raises(ConfigError, match=said):
        stage_named("language").look(config_of(work, **COSINE, steps=40), is_target=False, rebuilt=())


@pytest.mark.heavy
def test_a_branch_is_another_run_that_begins_at_the_checkpoint(work):
    run = make_run(work, at=(10, 20), **WSD)
    branch = partial(config_of, work, run_id="branch", **WSD)
    found = look(branch(branch_from=f"{run.path}@10", steps=15, decay_steps=5))
    assert found.action is Action.BUILD
    origin = "from runs/language/default/checkpoints/step_000000"
    assert re.fullmatch(rf"to step 15, [\d.]+ epochs of language, {origin}10", found.detail)
    for name in (run.path, run.checkpoints, run.checkpoints / "step_00000020"):
        found = look(branch(branch_from=str(name), steps=30))
        assert re.fullmatch(rf"to step 30, [\d.]+ epochs of language, {origin}20", found.detail)


def test_a_branch_needs_no_stage_before_and_keeps_the_start_of_its_run(work):
    begun = make_run(work, stage="code", **WSD)
    branch = config_of(work, "code", "branch", **WSD, branch_from=str(begun.path), init_from="auto", steps=30)
    before = f"work_dir={work.path}"
    plan = make_plan(
        "code", lambda name: branch if name == "code" else composed([f"stage={name}", *tiny(name), before])
    )
    assert "language" not in {one.name for one in plan.stages}
    assert plan.target.config.stage.init_from == "none"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"branch_from": "RUN@11"}, r"@11: no checkpoint of step 11 there; steps with a checkpoint: 10, 20"),
        ({"branch_from": "RUN/nowhere"}, "nowhere: no checkpoint there"),
        ({"steps": 10}, r"stage.steps=10: expected more than 10, the steps of .*@10"),
        ({"decay_steps": 6}, "stage.decay_steps=6: expected at most 5: the branch begins at step 10 of 15"),
        ({"lr": 0.5}, r"its run has other settings: stage.lr=0.5 \(was 0.03\)"),
        ({"global_batch": 32}, r"its run has other settings: stage.global_batch=32"),
    ],
)
def test_a_branch_that_cannot_be_is_refused_before_anything_starts(work, given, said):
    run = make_run(work, at=(10, 20), **WSD)
    keys = {"branch_from": "RUN@10", "steps": 15} | given
    keys["branch_from"] = str(keys["branch_from"]).replace("RUN", str(run.path))
    with pytest.raises((ConfigError, ArtefactError), match=said):
        look(config_of(work, run_id="branch", **WSD, **keys))


@pytest.mark.heavy
def test_a_branch_of_another_model_stage_or_content_or_of_a_lone_checkpoint_is_refused(work, tmp_path):
    run = make_run(work, at=(10, 20), **WSD)
    branch = partial(config_of, work, run_id="branch", **WSD, steps=30, branch_from=str(run.path))
    other = branch()
    with pytest.raises(ArtefactError, match=r"another model: model.d_ff=120 \(checkpoint: 80\)"):
        look(replace(other, model=replace(other.model, d_ff=120)))
    with pytest.raises(ConfigError, match=r"a run of stage=language; expected RUN@STEP of stage=code"):
        look(branch(stage="code"))
    recorded = durable.read_json(run.corpora)
    recorded["language"]["train"] = "0" * 64
    durable.write_json(run.corpora, recorded)
    with pytest.raises(ArtefactError, match=r"trained on other content of corpus language"):
        look(branch())
    alone = (run.checkpoints / "step_00000020").rename(tmp_path / "alone")
    with pytest.raises(ConfigError, match=r"a checkpoint without its run; expected RUN@STEP"):
        look(branch(branch_from=str(alone)))


def test_weights_alone_also_come_from_a_step_of_a_run(work):
    run = make_run(work, at=(10, 20), **WSD)
    found = look(config_of(work, "code", "new", init_from=f"{run.path}@10"))
    assert found.detail.endswith("from runs/language/default/checkpoints/step_00000010")


@pytest.mark.parametrize(("key", "value"), [("schedule", "wsd"), ("branch_from", "somewhere"), ("ema_decay", 0.9)])
def test_rlhf_refuses_what_its_iterations_do_not_follow(key, value):
    with pytest.raises(ConfigError, match=f"stage.{key}={value}: no such key of stage rlhf: leave it out"):
        composed(["stage=rlhf", f"stage.{key}={value}"])
