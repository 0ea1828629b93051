"""Epochs: the steps of a number of passes, the same counts as the streams have, and when a launch warns."""

import math
from pathlib import Path

import pytest

from dist_lm.data.epochs import (
    CorpusPass,
    epochs_of,
    in_words,
    ranking_sequences,
    repetition_warning,
    shares_of,
    text_sequences,
)
from dist_lm.data.infill import Infill, InfillMarks
from dist_lm.data.packing import TOO_LONG
from dist_lm.data.sequences import CorpusSequences, Mix, packed
from tests.data.synthetic_corpus import corpus, lengths


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
@pytest.mark.parametrize("seq_len", [16, 61])
def test_the_plan_counts_the_sequences_that_the_stream_has(tmp_path: Path, seq_len: int, fim_rate: float, masked: bool):
    if masked and fim_rate:
        pytest.skip("conversations are not rearranged")
    tokens = corpus(tmp_path, lengths(40, 50), masked)
    infill = Infill(fim_rate, InfillMarks(2, 3, 4)) if fim_rate else None
    assert text_sequences(tokens, seq_len, fim_rate) == CorpusSequences(tokens, 0, seq_len, infill=infill).n_sequences


@pytest.mark.parametrize("too_long", TOO_LONG)
def test_the_plan_counts_long_conversations_as_the_stream_does(tmp_path: Path, too_long: str):
    """Finds steps of stage.epochs, and passes of a phase, that leave out conversations which training splits."""
    tokens = corpus(tmp_path, lengths(40, 50), masked=True)
    n_sequences = CorpusSequences(tokens, 0, 16, too_long=too_long).n_sequences
    assert text_sequences(tokens, 16, too_long=too_long) == n_sequences


def test_the_plan_counts_rankings_as_their_stream_does(tmp_path: Path):
    tokens = corpus(tmp_path, lengths(40, 50), masked=True)
    assert ranking_sequences(tokens, 64) == packed(tokens, 64, kind="rankings").n_rows


@pytest.mark.parametrize("mix", [{}, {"language": 0.1}, {"language": 0.1, "tools": 0.25}])
@pytest.mark.parametrize(("epochs", "global_batch", "n_sequences"), [(3, 16, 50), (1, 7, 1000), (0.5, 3, 31)])
def test_the_steps_of_epochs_read_the_own_corpus_that_often(epochs, global_batch, n_sequences, mix):
    shares = shares_of("code", mix)
    own = CorpusPass("code", n_sequences, shares["code"])
    steps = own.steps(epochs, global_batch)
    # As the stream deals them out: exact per 100 sequences.
    order = Mix(list(mix.values()), seed=3)
    counts = [sum(order.locate(number)[0] == 0 for number in range(n * global_batch)) for n in (steps - 1, steps)]
    assert own.epochs(steps * global_batch) >= epochs - 1e-9
    assert own.epochs((steps - 1) * global_batch) < epochs
    assert math.isclose(counts[1], epochs * n_sequences, abs_tol=global_batch + 100)


def test_a_share_that_floats_cannot_hold_costs_no_step():
    share = shares_of("code", {"language": 0.1, "tools": 0.2})["code"]
    assert CorpusPass("code", 70, share).steps(1, 1) == 100


def test_metrics_and_words_name_every_corpus():
    passes = (CorpusPass("code", 100, 0.9), CorpusPass("language", 1000, 0.1))
    assert epochs_of(passes, 1000) == {"train/epochs": 9.0, "train/epochs_language": 0.1}
    assert in_words(passes, 1000) == "9.0 epochs of code, 0.1 of language"
    assert epochs_of((), 1000) == {}
    assert in_words((), 1000) == ""


def test_a_launch_warns_above_ten_passes():
    """Fifty pairs, twenty steps: eighty passes that nobody saw."""
    pairs = CorpusPass("tools", 4)
    assert repetition_warning("tools", [pairs], 10, 4) == ""
    warning = repetition_warning("tools", [pairs], 20, 16)
    assert warning == (
        "stage=tools: 20 steps read tools 80 times: a model learns such text by heart; stage.epochs=3 takes 1 step"
    )
    mixed = [CorpusPass("code", 10_000, 0.9), CorpusPass("notes", 5, 0.1)]
    assert repetition_warning("code", mixed, 60, 16) == (
        "stage=code: 60 steps read notes 19 times: a model learns such text by heart"
    )
