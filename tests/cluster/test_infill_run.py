"""Runs with fill-in-the-middle: what they measure, and what it costs and gives at nano (a bar)."""

from pathlib import Path
from statistics import mean

import pytest

from dist_lm.errors import ConfigError
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.registry import stage_named
from dist_lm.storage.run_directory import WorkDirectory
from tests.cluster.launched import code_metrics
from tests.conftest import TINY
from tests.training_run import linked, numbers, prepare, train

SEEDS, STEPS = (0, 1, 2), 400
RATES = {"left": 1e-9, "fim": 0.5}  # the rate of `left` chooses no piece, and the middles are judged all the same


@pytest.mark.bars
@pytest.mark.cluster
def test_a_run_measures_middles_and_leaves_val_as_it_is(tiny_work: WorkDirectory, tmp_path: Path) -> None:
    work = linked(tiny_work, tmp_path / "work")
    settings = (
        "stage.init_from=none",
        "stage.eval_at_start=true",
        "stage.steps=4",
        "stage.eval_every=2",
        "stage.checkpoint_every=2",
    )
    found = {}
    for name, rate in (("off", 0.0), *RATES.items()):
        run = prepare(work, name, *settings, f"stage.fim_rate={rate}", stage="code")
        train(run, 1)
        found[name] = numbers(run)
    infill = {"val/infill_loss", "val/infill_loss_spm", "val/infill_loss_left"}
    assert infill <= found["fim"][4].keys()
    assert not infill & found["off"][4].keys()
    assert found["fim"][0]["val/loss"] == found["off"][0]["val/loss"]
    for step, metrics in found["off"].items():
        assert {name: value for name, value in found["left"][step].items() if name not in infill} == metrics
    assert found["fim"][4]["train/loss"] != found["off"][4]["train/loss"]


def test_conversations_are_not_rearranged() -> None:
    config = compose_config(["stage=code", *TINY, "stage.corpus=tools", "stage.fim_rate=0.5"])
    with pytest.raises(ConfigError, match=r"^stage.fim_rate=0.5: stage.corpus=tools holds no texts"):
        stage_named("code").check(config)
    with pytest.raises(ConfigError, match=r"^stage.fim_rate=1.5: expected in \[0, 1\]"):
        compose_config(["stage=code", "stage.fim_rate=1.5"])


@pytest.mark.bars
@pytest.mark.timeout(3600)
@pytest.mark.cluster
def test_half_of_the_pieces_rearranged_cost_three_per_cent_and_middles_gain(tmp_path: Path) -> None:
    """At nano on the local corpus, with equal tokens: the mean of three seeds."""
    found = {}
    for name, rate in RATES.items():
        for seed in SEEDS:
            words = (f"seed={seed}", f"stage.fim_rate={rate}", f"stage.steps={STEPS}", "stage.checkpoint_every=0")
            found[name, seed] = code_metrics(tmp_path / f"work{seed}", name, *words)
    loss = {name: mean(found[name, seed]["val/loss"] for seed in SEEDS) for name in RATES}
    infill, spm = (mean(found["fim", seed][f"val/infill_loss{form}"] for seed in SEEDS) for form in ("", "_spm"))
    left = mean(found["left", seed]["val/infill_loss_left"] for seed in SEEDS)
    print(f"val/loss {loss}, middles: {infill:.4f} as PSM, {spm:.4f} as SPM, {left:.4f} from the left")
    assert loss["fim"] <= 1.03 * loss["left"]
    assert infill < left  # in the form in which `generate` asks
