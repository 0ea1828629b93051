"""stage.epochs: steps before the first step, in the record of the run, which a command that continues it reads."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace

import pytest

from dist_lm.config.root import Config
from dist_lm.data.epochs import MANY
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.registry import load_config
from dist_lm.stages.stage import Action, Look, run_of
from dist_lm.stages.training.stage import TrainingStage, training_stage
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training.state import TrainState
from tests.conftest import TINY, composed, tiny
from tests.training_run import begun_run

SETTINGS = ("stage.init_from=none", "stage.global_batch=4", "stage.warmup_steps=2", "stage.schedule=wsd")


def config_of(work: WorkDirectory, *overrides: str, stage: str = "code") -> Config:
    config = deepcopy(composed([f"stage={stage}", *tiny(stage), *SETTINGS, *overrides]))
    return replace(config, work_dir=str(work.path))


def stage_of(config: Config) -> TrainingStage:
    return training_stage(config.stage.name)


def look(config: Config, rebuilt: tuple[str, ...] = ()) -> Look:
    return stage_of(config).look(config, is_target=True, rebuilt=rebuilt)


def sequences(config: Config, name: str) -> int:
    """Sequences of an epoch of the tiny corpus, counted from its tokens."""
    corpus = TokenCorpus.open(run_of(config).work.corpus(name), "train")
    return (corpus.n_tokens - 1) // config.stage.seq_len


def begun(config: Config, at: int = 1) -> RunDirectory:
    return begun_run(look(config).config, TrainState(step=at))


@pytest.mark.heavy
def test_epochs_become_steps_in_the_plan_and_in_the_record(work):
    config = config_of(work, "stage.epochs=3")
    assert config.stage.steps == 0
    planned = look(config)
    steps = -(-3 * sequences(config, "code") // 4)
    assert planned.config.stage.steps == steps
    assert planned.detail == f"{steps:,} steps, 3.0 epochs of code"
    run = begun(config)
    assert (load_config(run.config).stage.steps, load_config(run.config).stage.epochs) == (steps, 3.0)


@pytest.mark.heavy
def test_the_plan_of_a_run_on_texts_opens_no_corpus(work, monkeypatch):
    """Finds a launcher that reads the length of each document, which takes minutes and 10 GB for 200 million."""
    exact = look(config_of(work, "stage.epochs=3", "stage.mix={language: 0.2}"))

    def refuse(*_: object) -> None:
        raise AssertionError("a corpus is opened")

    monkeypatch.setattr(TokenCorpus, "open", refuse)
    steps = exact.config.stage.steps
    assert look(config_of(work, "stage.epochs=3", "stage.mix={language: 0.2}")).detail == exact.detail
    assert look(config_of(work, f"stage.steps={steps}", "stage.mix={language: 0.2}")).detail == exact.detail

    with_middles = config_of(work, f"stage.steps={steps}", "stage.mix={language: 0.2}", "stage.fim_rate=0.5")
    assert look(with_middles).detail == exact.detail


def test_with_a_mix_epochs_count_the_own_corpus_and_the_others_print_theirs(work):
    config = config_of(work, "stage.epochs=2", "stage.mix={language: 0.2}")
    planned = look(config)
    steps = -(-2 * sequences(config, "code") * 10 // (4 * 8))
    assert planned.config.stage.steps == steps
    others = steps * 4 * 0.2 / sequences(config, "language")
    words, own, mixed = planned.detail.split(", ")
    assert (words, own) == (f"{steps:,} steps", "2.0 epochs of code")
    assert mixed.endswith(" of language")
    assert float(mixed.split()[0]) == pytest.approx(others, rel=0.05)


def test_without_the_corpus_the_plan_names_the_epochs_and_the_launch_counts_them(work):
    shutil.move(work.corpus("code"), work.path / "moved")
    config = config_of(work, "stage.epochs=0.5")
    assert (look(config).detail, look(config).config.stage.steps) == ("0.5 epochs of code", 0)
    shutil.move(work.path / "moved", work.corpus("code"))
    # The corpus there is not the one that this command builds.
    assert look(config, rebuilt=("shards",)).config.stage.steps == 0
    assert stage_of(config).with_steps(config).stage.steps == -(-sequences(config, "code") // 8)


@pytest.mark.heavy
def test_a_run_goes_on_to_the_steps_of_its_record(work, monkeypatch):
    config = config_of(work, "stage.epochs=3")
    run = begun(config)
    steps = load_config(run.config).stage.steps
    # Whatever the corpus would give now.
    monkeypatch.setattr(type(stage_of(config)), "passes", lambda stage, config: pytest.fail("counted again"))
    assert stage_of(config).with_steps(config).stage.steps == steps
    monkeypatch.undo()
    found = look(config)
    assert found.action is Action.RESUME
    assert found.detail == f"from step_00000001 to step {steps:,}, 3.0 epochs of code"


@pytest.mark.heavy
def test_other_epochs_are_another_schedule(work):
    run = begun(config_of(work, "stage.epochs=1"))
    more = look(config_of(work, "stage.epochs=2"))
    assert more.action is Action.RESUME
    assert more.config.stage.steps > load_config(run.config).stage.steps
    cosine = config_of(work, "stage.epochs=2", "stage.schedule=cosine", "run_id=cosine")
    begun(config_of(work, "stage.epochs=1", "stage.schedule=cosine", "run_id=cosine"), at=5)
    with pytest.raises(ConfigError, match=r"stage.epochs=2.0 \(was 1.0\); stage.steps=\d+ \(was \d+\).*another rate"):
        look(cosine)


@pytest.mark.heavy
def test_a_finished_run_of_epochs_is_finished(work):
    config = config_of(work, "stage.epochs=1")
    run = begun(config)
    steps = load_config(run.config).stage.steps
    run.result.write_text(json.dumps({"steps": steps}))
    assert look(config).action is Action.READY


@pytest.mark.heavy
def test_steps_and_epochs_are_not_both_given():
    with pytest.raises(ConfigError, match=r"stage.steps=.*: expected not together with stage.epochs=3"):
        compose_config(["stage=code", *TINY, "stage.epochs=3", "stage.steps=10"])
    with pytest.raises(ConfigError, match=r"stage.epochs=-1"):
        compose_config(["stage=code", *TINY, "stage.epochs=-1"])


def test_keys_that_do_not_fit_the_steps_are_refused_when_these_are_known(work):
    config = config_of(work, "stage.epochs=0.05", "stage.decay_steps=50000")
    with pytest.raises(ConfigError, match=r"stage.decay_steps=50000: expected at most \d+"):
        look(config)


def test_many_passes_are_warned_of_and_few_are_not(work):
    config = config_of(work)
    n = sequences(config, "code")
    few, many = (replace(config, stage=replace(config.stage, steps=passes * n // 4)) for passes in (MANY - 1, 80))
    assert stage_of(config).repetition(few) == ""
    assert "read code 80 times" in stage_of(config).repetition(many)
    assert "stage.epochs=3 takes" in stage_of(config).repetition(many)
