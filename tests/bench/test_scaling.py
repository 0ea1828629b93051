"""What a configuration will learn, expected from runs of narrow models."""

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from dist_lm.bench import scaling
from dist_lm.bench.scaling import Rung, _interval, law_of, narrowed, numbers_of, run_scaling, shortened, steps_of
from dist_lm.bench.scaling_law import Expected, ScalingLaw
from dist_lm.config.stage import MuonConfig, StageConfig
from dist_lm.errors import ConfigError, UserError
from dist_lm.prepare.compose import compose_config
from tests.conftest import TINY
from tests.training_run import linked, prepare, train

SETTINGS = (
    *("stage=code", *TINY, "stage.global_batch=8", "stage.micro_batch=4", "stage.lr=1e-2", "stage.steps=40"),
    *("stage.warmup_steps=5", "stage.dropout=0.1", "stage.label_smoothing=0.1", "model.init_std=0.1"),
)
SIZES, LENGTHS = (2e5, 4.4e5, 7.9e5, 1.8e6), (6.5e4, 1.3e5, 2.6e5, 5.2e5)
GRID = [(size, length) for size in SIZES for length in LENGTHS]


def true_loss(parameters: float, tokens: float) -> float:
    return 0.8 + 8 * parameters**-0.2 + 60 * tokens**-0.35


def law_with_noise(deviation: float, seed: int, seeds: int = 2) -> ScalingLaw:
    """Of rungs with a misfit and seeds with noise, both of this deviation."""
    draw = np.random.default_rng(seed)
    misfit, noise = draw.normal(0, deviation, len(GRID)), draw.normal(0, deviation, (seeds, len(GRID)))
    losses = np.array([true_loss(*rung) for rung in GRID]) + misfit + noise
    return ScalingLaw.fit(*zip(*GRID, strict=True), losses.T.tolist())


@pytest.mark.heavy
def test_a_law_is_found_again_and_goes_on_beyond_its_runs():
    law = law_with_noise(0.0, 0)
    for run in (*GRID, (3e6, 2e6), (1e5, 3e4)):
        assert law.loss(*run) == pytest.approx(true_loss(*run), abs=5e-3)
    expected = law.expected(3e6, 2e6)
    assert expected.low <= expected.value <= expected.high
    assert expected.high - expected.low < 0.01


@pytest.mark.heavy
def test_the_interval_holds_new_runs_and_grows_with_distance():
    inside = []
    for seed in range(10):
        law = law_with_noise(0.01, seed)
        new = true_loss(3e6, 2e6) + np.random.default_rng(100 + seed).normal(0, 0.01, 2).sum()
        found = law.expected(3e6, 2e6)
        inside.append(found.low <= new <= found.high)
    assert sum(inside) >= 8
    near, far = law.expected(8e5, 5e5), law.expected(5e7, 5e7)
    assert near.high - near.low < far.high - far.low


@pytest.mark.heavy
def test_seeds_are_no_rungs():
    draw = np.random.default_rng(0)
    losses = [[true_loss(*rung) + draw.normal(0, 0.01)] for rung in GRID]
    two, eight = (ScalingLaw.fit(*zip(*GRID, strict=True), [one * seeds for one in losses]) for seeds in (2, 8))
    assert two.expected(3e6, 2e6) == eight.expected(3e6, 2e6)  # no noise, and a misfit that all seeds of a rung share
    apart = [[one[0] - 0.05, one[0] + 0.05] for one in losses]
    wide, narrow = ScalingLaw.fit(*zip(*GRID, strict=True), apart).expected(3e6, 2e6), two.expected(3e6, 2e6)
    assert wide.high - wide.low > narrow.high - narrow.low + 0.1  # one run more has the noise of one


def test_samples_without_a_law_are_named():
    assert _interval(Expected(1.0, 0.5, 2.0, 0.02)) == "1.000 (0.500 to 2.000) bits per byte"
    assert "30% of the resampled rungs determine no law" in _interval(Expected(1.0, 0.5, 2.0, 0.3))


def test_runs_that_determine_no_law_are_refused():
    sizes, lengths = map(list, zip(*GRID, strict=True))
    with pytest.raises(UserError, match="3 rungs of 3 sizes with 3 numbers of tokens do not determine a law"):
        ScalingLaw.fit([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [[3.0], [2.0], [1.0]])
    with pytest.raises(UserError, match="the loss does not fall with size and tokens"):
        ScalingLaw.fit(sizes, lengths, [[-true_loss(*run)] for run in GRID])


@pytest.mark.bars
def test_a_rung_is_the_configured_run_narrowed_and_shortened(tiny_work, tmp_path):
    with (tmp_path / "table").open("w") as table:
        records = run_scaling(
            [*SETTINGS, f"work_dir={tiny_work.path}"],
            Console(file=table, width=160),
            widths="16,32,48",
            tokens="1280,2560,5120",
            seeds=2,
            json_file=tmp_path / "records.jsonl",
        )
    names = [f"{width} wide, {tokens} tokens" for tokens in (1280, 2560, 5120) for width in (16, 32, 48)]
    assert [one.case for one in records] == [*names, "expected", "expected, low", "expected, high"]
    assert [json.loads(line)["case"] for line in (tmp_path / "records.jsonl").read_text().splitlines()][:9] == names
    model = compose_config([*SETTINGS]).model
    words = (*narrowed(model, 48), "stage.init_from=none", "stage.steps=20", "stage.warmup_steps=2")
    ends, own = [], linked(tiny_work, tmp_path / "work")
    for seed in (0, 1):
        run = prepare(own, f"rung{seed}", *SETTINGS[1:], *words, f"seed={seed}", stage="code")
        ends.append(train(run, 1)["metrics"]["val/bits_per_byte"])
    found = {one.case: one.value for one in records}
    assert found["48 wide, 5120 tokens"] == pytest.approx(sum(ends) / 2, rel=1e-5)
    written = (tmp_path / "table").read_text()
    assert "48 wide, 5120 tokens: measured" in written
    assert f"as configured ({model.d_model} wide, 10240 tokens): expected {found['expected']:.3f}" in written


@pytest.mark.heavy
def test_what_the_configured_run_will_learn_is_said_though_the_others_expect_nothing(tiny_work, monkeypatch):
    def climbed(recipes, steps, *_):
        sizes = [one.config.model.d_model**2 * 24 for one in recipes]
        return [Rung(n, n, steps * 10**6, float(n * steps), (true_loss(n, steps * 1e6),) * 2) for n in sizes]

    def law_of_all(rungs):
        if len(rungs) < 9:
            raise UserError("no law")
        return law_of(rungs)

    monkeypatch.setattr(scaling, "_climb", climbed)
    monkeypatch.setattr(scaling, "law_of", law_of_all)
    console = Console(record=True, width=200, quiet=False)
    with console.capture() as captured:
        run_scaling(
            [*SETTINGS, f"work_dir={tiny_work.path}", "stage.steps=8", "stage.mix={language: 0.1}"],
            console,
            widths="16,32,48",
            tokens="300,600,1200",
            seeds=2,
            json_file=None,
        )
    *_, configured, largest, code, language = captured.get().splitlines()
    assert "as configured" in configured
    assert largest.endswith("; the others expect nothing: no law")
    assert "note: code has " in code  # rungs repeat it, the configured run does not
    assert "note: language has " in language


def test_one_seed_is_refused(tmp_path):
    options = {"widths": "16,32,48", "tokens": "1280,2560,5120", "json_file": None}
    with pytest.raises(ConfigError, match="--seeds=1: the interval holds the spread of seeds: expected at least 2"):
        run_scaling(SETTINGS, Console(), seeds=1, **options)


def test_heads_keep_their_width_and_groups_their_size():
    model = compose_config([*SETTINGS, "model.d_model=64", "model.n_heads=8", "model.n_kv_heads=2"]).model
    words = dict(word.split("=") for word in narrowed(model, 96))
    assert words["model.n_heads"] == "12"
    assert words["model.n_kv_heads"] == "3"
    assert words["model.base_width"] == "64"
    assert int(words["model.d_ff"]) == model.d_ff * 96 // 64
    with pytest.raises(ConfigError, match=r"--widths=40: .* expected a multiple of 32"):
        narrowed(model, 40)


@pytest.mark.heavy
def test_a_width_of_its_own_for_heads_stays_and_a_tied_head_is_refused():
    given = ("model.d_model=64", "model.n_heads=8", "model.n_kv_heads=2", "model.head_width=16")
    words = dict(word.split("=") for word in narrowed(compose_config([*SETTINGS, *given]).model, 96))
    assert (words["model.n_heads"], words["model.n_kv_heads"]) == ("12", "3")
    with pytest.raises(ConfigError, match=r"bench scaling needs model.tie_embeddings=false"):
        narrowed(compose_config([*SETTINGS, "model.tie_embeddings=true"]).model, 48)


def test_a_number_of_tokens_is_one_of_steps():
    stage = StageConfig(name="t", global_batch=4, seq_len=100)
    assert steps_of(stage, [400, 799, 800, 1200]) == [1, 2, 3]
    for tokens in ([399, 800, 1200, 1600], [400, 500, 800]):
        with pytest.raises(ConfigError, match=r"--tokens=.*: a step has 400 tokens .* such as 400,800,1600"):
            steps_of(stage, tokens)


def test_schedules_keep_their_shares():
    muon = MuonConfig(momentum_warmup_steps=30, momentum_cooldown_steps=10)
    stage = StageConfig(name="t", steps=200, warmup_steps=20, schedule="wsd", decay_steps=50, muon=muon)
    short = shortened(stage, 100)
    assert (short.steps, short.warmup_steps, short.decay_steps) == (100, 10, 25)
    assert (short.muon.momentum_warmup_steps, short.muon.momentum_cooldown_steps) == (15, 5)
    assert shortened(stage, 200) == replace(stage)
    assert shortened(stage, 7).warmup_steps == 1  # of 0.7
    half = shortened(replace(stage, warmup_steps=100, decay_steps=100), 7)
    assert (half.warmup_steps, half.decay_steps) == (4, 3)


@pytest.mark.parametrize(
    ("option", "text"),
    [("--widths", "64,96"), ("--widths", "64,64,96"), ("--widths", "wide"), ("--tokens", ""), ("--tokens", "1e5,0,2")],
)
def test_numbers_that_make_no_rungs_are_refused(option, text):
    with pytest.raises(ConfigError, match=f"{option}={text}: expected at least three different positive whole numbers"):
        numbers_of(option, text)
    assert numbers_of("--tokens", "4e5,1e5,2e5") == [100000, 200000, 400000]
