"""Training from a model of transformers, at any layout."""

import pytest

from dist_lm.stages.importing.snapshot import import_model
from dist_lm.tracking.metrics import read_metrics
from tests.conftest import VOCAB_SIZE
from tests.interop.hf_models import our_model, small
from tests.stages.test_export import saved
from tests.training_run import linked, prepare, tolerance, train

SHAPE = ("model.norm=rmsnorm", "model.ffn=swiglu", "model.bias=false", "model.rope_base=500.0", "model.init_std=0.05")
SHORT = ("stage.steps=3", "stage.warmup_steps=1", "stage.checkpoint_every=3", "stage.eval_every=3")


@pytest.mark.bars  # test_hf_start.py trains from an import
@pytest.mark.cluster
def test_a_run_trains_from_an_import_at_any_layout(tiny_work, tmp_path):
    work = linked(tiny_work, tmp_path / "work")
    config = small("Llama", d_model=40, d_ff=80, max_seq_len=256, vocab_size=VOCAB_SIZE, rope_base=500.0)
    imported = import_model(str(saved(tmp_path / "hf", our_model(config), work)), "mine", work).path
    losses = []
    for run_id, ranks, *more in (("one", 1), ("cut", 2, "parallel.tp=2"), ("new", 1, "stage.init_from=none")):
        start = () if run_id == "new" else (f"stage.init_from={imported}",)
        run = prepare(work, run_id, *SHAPE, *SHORT, *start, *more)
        train(run, ranks)
        losses.append([line["train/loss"] for line in read_metrics(run.metrics) if "train/loss" in line])
    one, cut, new = losses
    assert len(one) == 3
    assert cut == pytest.approx(one, rel=tolerance("train/loss"))
    assert one[0] != pytest.approx(new[0], rel=1e-3)
