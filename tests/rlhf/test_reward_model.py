"""Scores of texts at their last token, and their normaliser."""

import json

import numpy as np
import pytest

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError
from dist_lm.model.initialise import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.reward_model import last_token_scores, normaliser_of, read_normaliser
from dist_lm.storage.run_directory import RunDirectory

CONFIG = ModelConfig(
    name="t", d_model=16, n_layers=2, n_heads=2, d_ff=32, max_seq_len=64, vocab_size=50, head="scalar", init_std=0.3
)


def test_normalised_scores_have_mean_0_and_deviation_1() -> None:
    scores = np.random.default_rng(0).normal(5, 3, 400)
    normalised = normaliser_of(scores.tolist())(scores)
    assert normalised.mean() == pytest.approx(0, abs=1e-12)
    assert normalised.std() == pytest.approx(1)


def test_a_normaliser_is_read_from_a_finished_run(tmp_path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(ArtefactError, match="not finished"):
        read_normaliser(run)
    run.result.write_text(json.dumps({"normaliser": {"mean": 2.0, "std": 4.0}}))
    assert read_normaliser(run)(10.0) == 2.0
    run.result.write_text(json.dumps({"normaliser": {"mean": 2.0, "std": 0.0}}))
    with pytest.raises(ArtefactError, match="the same score"):
        read_normaliser(run)
    run.result.write_text("{}")
    with pytest.raises(ArtefactError, match="expected a run of stage=reward"):
        read_normaliser(run)


def test_a_score_is_that_of_the_last_real_token_whatever_fills_the_row() -> None:
    model = Transformer(CONFIG)
    initialise(model, 1)
    draw = np.random.default_rng(1)
    sequences = [draw.integers(0, 50, n).tolist() for n in (3, 17, 1, 9, 17)]
    together = last_token_scores(model, sequences, batch=4)
    alone = [float(last_token_scores(model, [one])[0]) for one in sequences]
    assert together == pytest.approx(alone, abs=1e-5)
    assert np.std(alone) > 0.01
    assert last_token_scores(model, [[*sequences[0], 7]])[0] != pytest.approx(alone[0], abs=1e-4)
