"""A run with phases: what it measures of each corpus, and what a run that was killed reads at another layout."""

import pytest

from dist_lm.stages.exporting.files import export
from dist_lm.stages.registry import load_config
from dist_lm.training import checkpoint_files
from tests.training_run import copy_until, numbers, prepare, train

PHASES = "stage.phases=[{until: 6, mix: {code: 3, language: 1}}, {mix: {code: 1, language: 1}, lr: 0.5}]"
SHORT = (PHASES, "stage.steps=10", "stage.init_from=none", "stage.eval_every=5", "stage.dropout=0")


@pytest.mark.heavy  # trains two runs
def test_a_run_goes_on_through_its_phases_at_another_layout(work, tmp_path):
    """Finds phases that a resumed run or another number of ranks reads in another order, a rate without its factor,
    checkpoints without the mix of their steps, and a corpus without a held-out loss or a row in the model card."""
    whole = prepare(work, "whole", *SHORT, stage="code")
    result = train(whole, ranks=1)
    global_batch = load_config(whole.config).stage.global_batch
    first, second = 6 * global_batch, 4 * global_batch

    phases = [
        {"until": 6, "sequences": {"code": first * 3 // 4, "language": first // 4}},
        {"until": 10, "sequences": {"code": second // 2, "language": second // 2}},
    ]
    for directory in checkpoint_files.steps_in(whole.checkpoints):
        assert checkpoint_files.read_state(directory)[0].phases == phases
    assert "val/loss_language" in result["metrics"]
    n_language = (first // 4 + second // 2) / result["epochs"]["language"]
    assert numbers(whole)[6]["train/epochs_language"] == pytest.approx(first / 4 / n_language)
    assert numbers(whole)[7]["train/lr"] < 0.6 * numbers(whole)[6]["train/lr"]

    export(whole.path, tmp_path / "exported", "fp32")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert all(f"\n| {name} | " in card for name in ("code", "language"))

    killed = work.run("code", "killed")
    copy_until(whole, killed, step=5)
    train(killed, ranks=2)
    losses = [[numbers(run)[step]["train/loss"] for step in range(1, 11)] for run in (whole, killed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
