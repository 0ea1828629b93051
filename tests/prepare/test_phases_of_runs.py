"""stage.phases in plans: what each phase reads, what cannot be filled, and what a run that has begun may change."""

from copy import deepcopy
from dataclasses import replace

import pytest

from dist_lm.config.root import Config, save_config
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ConfigError
from dist_lm.stages.registry import load_config
from dist_lm.stages.stage import PHASE_COLUMNS, Action, Look
from dist_lm.stages.training.stage import training_stage
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.readable import passes_in_words
from dist_lm.training.state import TrainState
from tests.conftest import composed, tiny
from tests.training_run import begun_run

SETTINGS = (
    *("stage.init_from=none", "stage.global_batch=4", "stage.steps=20", "stage.warmup_steps=2"),
    "stage.schedule=wsd",
)
FIRST = "{until: 10, mix: {code: 3, language: 1}}"


def config_of(work: WorkDirectory, phases: str, *overrides: str) -> Config:
    config = deepcopy(composed(["stage=code", *tiny("code"), *SETTINGS, f"stage.phases=[{phases}]", *overrides]))
    return replace(config, work_dir=str(work.path))


def look(config: Config, rebuilt: tuple[str, ...] = ()) -> Look:
    return training_stage("code").look(config, is_target=True, rebuilt=rebuilt)


def begun(config: Config, at: int) -> RunDirectory:
    phases = [phase.record() for phase in training_stage("code").phases(config)]
    return begun_run(look(config).config, TrainState(step=at, phases=phases))


def test_the_plan_says_what_each_phase_reads(work):
    """Finds sequences, tokens or passes that are not those of the phase, and a factor of the rate that is not shown."""
    config = config_of(work, FIRST + ", {mix: {code: 1, language: 0.05 epochs}, lr: 0.1}")
    n_code, n_language = (
        (TokenCorpus.open(work.corpus(name), "train").n_tokens - 1) // config.stage.seq_len
        for name in ("code", "language")
    )
    part = round(n_language / 20)
    numbers = [(30, n_code, 30), (10, n_language, 10), (40 - part, n_code, 70 - part), (part, n_language, 10 + part)]
    rows = look(config).phases
    assert {len(row) for row in rows} == {len(PHASE_COLUMNS)}
    assert [row[:2] for row in rows] == [
        ("1: steps 1 to 10", "code"),
        ("", "language"),
        ("2: steps 11 to 20, rate x 0.1", "code"),
        ("", "language"),
    ]
    assert [row[2:] for row in rows] == [
        (f"{n}", f"{n * config.stage.seq_len:,}", passes_in_words(n / epoch), passes_in_words(so_far / epoch))
        for n, epoch, so_far in numbers
    ]
    # What this command builds cannot be counted yet.
    assert look(config, rebuilt=("shards",)).phases == ()


@pytest.mark.heavy
def test_a_phase_that_a_corpus_cannot_fill_is_refused_before_anything_starts(work):
    """Finds a run that ends in its last phase, days after its start, for want of text."""
    with pytest.raises(ConfigError, match=r"max_epochs.language=0.01: phase 2 \(steps 11 to 20\) takes 20 sequences"):
        look(
            config_of(
                work, "{until: 10, mix: {code: 1}}, {mix: {code: 1, language: 1}}", "stage.max_epochs.language=0.01"
            )
        )
    with pytest.raises(ConfigError, match=r"phases\[0\].mix: phase 1 .* 80 sequences, but 50 epochs of language are"):
        look(config_of(work, "{mix: {code: 1, language: 50 epochs}}"))
    with pytest.raises(ConfigError, match=r"stage\.phases=prose: expected corpora of corpus="):
        config_of(work, "{mix: {code: 1, prose: 1}}")


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("at", "phases", "overrides"),
    [
        (10, FIRST + ", {mix: {code: 1, tools: 1}}", ()),
        (10, FIRST + ", {mix: {code: 1}, lr: 0.1}", ()),
        (10, FIRST + ", {until: 15, mix: {code: 1}}, {mix: {language: 1}}", ("stage.steps=30",)),
        (15, FIRST + ", {until: 20, mix: {code: 1}}, {mix: {language: 1}}", ("stage.steps=30",)),
        (15, "{until: 10, mix: {code: 6, language: 2}}, {mix: {code: 1}}", ()),
    ],
    ids=["mix", "rate", "division", "more steps", "same numbers"],
)
def test_later_phases_may_change(work, at, phases, overrides):
    """Finds a run that must begin anew although no step that it has taken would change."""
    run = begun(config_of(work, FIRST + ", {mix: {code: 1}}"), at)
    found = look(config_of(work, phases, *overrides))
    assert found.action is Action.RESUME
    save_config(found.config, run.config)
    assert load_config(run.config).stage.phases == found.config.stage.phases


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("at", "phases", "overrides", "said"),
    [
        (
            5,
            "{until: 10, mix: {code: 2, language: 1}}, {mix: {code: 1}}",
            (),
            r"phase 1 \(steps 1 to 10\).* 27 sequences",
        ),
        (15, "{until: 12, mix: {code: 3, language: 1}}, {mix: {code: 1}}", (), "phase 1 .* would end at step 12"),
        (15, FIRST + ", {mix: {code: 1}}", ("stage.steps=30",), r"phase 2 \(steps 11 to 20\).* would end at step 30"),
        (15, FIRST + ", {mix: {language: 1, code: 1}}", (), r"phase 2 .* in place of 40 sequences of code"),
        (15, FIRST + ", {mix: {code: 1}, lr: 0.5}", (), "step 11 would have had another rate"),
    ],
)
def test_a_phase_that_has_begun_may_not(work, at, phases, overrides, said):
    """Finds a run whose configuration no longer says what its steps have read."""
    begun(config_of(work, FIRST + ", {mix: {code: 1}}"), at)
    with pytest.raises(ConfigError, match=said):
        look(config_of(work, phases, *overrides))


@pytest.mark.heavy
def test_a_run_without_phases_keeps_its_mix(work):
    begun(replace(config_of(work, ""), run_id="plain"), 5)
    with pytest.raises(ConfigError, match=r"has taken 5 steps without stage\.phases"):
        look(replace(config_of(work, FIRST + ", {mix: {code: 1}}"), run_id="plain"))


@pytest.mark.heavy
def test_a_branch_has_other_later_phases_and_no_other_past(work):
    """Finds a branch that is refused although it changes only the future, and one that would read its past again."""
    run = begun(config_of(work, FIRST + ", {mix: {code: 1}}"), 10)
    branch = f"stage.branch_from={run.path}@10"
    found = look(replace(config_of(work, FIRST + ", {mix: {language: 1}, lr: 0.5}", branch), run_id="branch"))
    assert found.action is Action.BUILD
    with pytest.raises(ConfigError, match=r"phase 1 .* would end at step 5"):
        look(replace(config_of(work, "{until: 5, mix: {code: 1}}, {mix: {language: 1}}", branch), run_id="branch"))
