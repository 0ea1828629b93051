"""Stage preference: the same numbers on any layout and after a kill, from a reference that is computed once."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dist_lm.chat.documents import encode_ranking, write_ranking
from dist_lm.chat.ranking import Ranking
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.document import Document
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.shards.identity import recipe_of
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files
from dist_lm.training.checkpoint_tensors import model_weights
from tests.cluster.test_reward_run import rankings
from tests.conftest import TINY_MODEL
from tests.training_run import (
    DEADLINE_S,
    STEPS,
    copy_until,
    finish,
    linked,
    numbers,
    prepare,
    start,
    tolerance,
    train,
    unwritten,
    write_untrained,
)

pytestmark = pytest.mark.cluster
SETTINGS = (
    "stage.seq_len=96",
    "stage.dropout=0",
    "stage.global_batch=4",
    "stage.preference.label_noise=0.1",
    "stage.lr=1e-3",
    "parallel.compute_dtype=fp32",
)
KTO = ("stage.preference.algorithm=kto", "stage.preference.beta=0.5")
LORA = ("stage.lora.rank=2", "stage.lr=3e-2")


@pytest.fixture(scope="module")
def work(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> WorkDirectory:
    """With a corpus of rankings, and an untrained run of stage tools."""
    work = linked(tiny_work, tmp_path_factory.mktemp("preference"))
    (work.path / "corpora").unlink()
    write_rankings(work, rankings(120), rankings(150)[120:])
    write_untrained(work, "tools", 4)
    return work


def write_rankings(work: WorkDirectory, train_part: list[Ranking], val_part: list[Ranking]) -> None:
    """The corpus `rankings`, of two sources."""
    tokenizer = Tokenizer.load(work.tokenizer_model)
    config = compose_config(["stage=rankings", *TINY_MODEL, f"work_dir={work.path}"])
    recipe = replace(recipe_of(config, "rankings"), documents_per_member=32, shard_tokens=4_000)
    with CorpusWriter(work.corpus("rankings"), recipe) as writer:
        for split, part in (("train", train_part), ("val", val_part)):
            for i, one in enumerate(part):
                document = Document(write_ranking(one), ("a", "b")[i % 2], f"made:{i}", "none", "0" * 64, "ranking")
                writer.write(split, encode_ranking(tokenizer, document))
        writer.finish({}, [source.licence for source in config.corpus.corpora["rankings"]])


def preference_run(work: WorkDirectory, run_id: str, *overrides: str) -> RunDirectory:
    origin = f"stage.init_from={work.run('tools', 'default').path}"
    return prepare(work, run_id, *SETTINGS, origin, *overrides, stage="preference")


@pytest.fixture(scope="module")
def reference(work: WorkDirectory) -> RunDirectory:
    """One rank, never disturbed, DPO from whole rankings."""
    run = preference_run(work, "one")
    train(run, ranks=1)
    return run


@pytest.fixture(scope="module")
def kto(work: WorkDirectory) -> RunDirectory:
    run = preference_run(work, "kto", *KTO)
    train(run, ranks=1)
    return run


@pytest.mark.heavy
def test_it_learns_and_writes_every_metric(reference: RunDirectory, kto: RunDirectory) -> None:
    found = numbers(reference)
    assert found[0]["val/loss"] == pytest.approx(mean_of_even_choices(), abs=0.02)
    assert found[0]["preference/margin"] == pytest.approx(0, abs=1e-4)
    assert found[STEPS]["val/loss"] < found[0]["val/loss"] - 0.1
    assert found[STEPS]["preference/accuracy"] > 0.9
    assert found[STEPS].keys() >= {"preference/accuracy_a", "preference/accuracy_k5", "val/loss_b"}
    assert unwritten(reference, "preference") == set()
    result = json.loads(reference.result.read_text())
    assert result["algorithm"] == "dpo from rankings, beta 0.1"
    assert result["packing"]["documents"] == 120
    by_kto = numbers(kto)
    assert by_kto[STEPS]["preference/accuracy"] > 0.9
    assert by_kto[STEPS]["train/kl"] >= 0
    assert "preference/kl" in by_kto[STEPS]


def mean_of_even_choices() -> float:
    """The loss of a model that prefers nothing, on the held-out rankings."""
    losses: list[float] = []
    for one in rankings(150)[120:]:
        k = len(one.completions)
        losses += [float(np.log(2))] * len(one.judgements) if one.judgements else np.log(range(2, k + 1)).tolist()
    return float(np.mean(losses))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("ranks", "layout", "algorithm"),
    [
        pytest.param(2, (), KTO, id="kto fsdp", marks=pytest.mark.bars),
        pytest.param(2, ("parallel.tp=2",), (), id="tp", marks=pytest.mark.bars),
        pytest.param(2, (), (), id="fsdp", marks=pytest.mark.bars),
    ],
)
def test_the_numbers_do_not_depend_on_the_layout(
    reference: RunDirectory, kto: RunDirectory, work: WorkDirectory, ranks: int, layout: tuple, algorithm: tuple
) -> None:
    run = preference_run(work, f"on_{len(layout)}_{len(algorithm)}", "stage.micro_batch=1", *layout, *algorithm)
    train(run, ranks)
    expected, found = numbers(kto if algorithm else reference), numbers(run)
    assert found.keys() == expected.keys()
    for step, line in expected.items():
        for key, value in line.items():
            assert found[step][key] == pytest.approx(value, rel=2 * tolerance(key), abs=2e-5), (step, key)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


SPOIL = {"again": lambda path: None, "without": Path.unlink, "damaged": damage}


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", ["without", *(pytest.param(name, marks=pytest.mark.bars) for name in ("again", "damaged"))]
)
def test_a_run_that_goes_on_has_its_reference_or_computes_it_again_and_ends_bit_identical(
    kto: RunDirectory, work: WorkDirectory, name: str
) -> None:
    run = work.run("preference", name)
    copy_until(kto, run, step=10)
    SPOIL[name](run.reference)
    train(run, ranks=1)
    assert numbers(run) == numbers(kto)
    found = load_file(run.reference)
    for key, value in load_file(kto.reference).items():
        assert np.array_equal(found[key], value, equal_nan=True), key


@pytest.mark.heavy
def test_a_reference_of_another_start_is_computed_again(work: WorkDirectory, reference: RunDirectory) -> None:
    write_untrained(linked_runs(work, "other"), "tools", 5)
    origin = f"stage.init_from={work.path / 'other' / 'runs' / 'tools' / 'default'}"
    run = preference_run(work, "elsewhere", "stage.steps=1", "stage.warmup_steps=0", origin)
    run.reference.write_bytes(reference.reference.read_bytes())
    train(run, ranks=1)
    before, after = load_file(reference.reference), load_file(run.reference)
    assert np.abs(before["train.logprob"] - after["train.logprob"]).max() > 0.1
    assert numbers(run)[0]["preference/margin"] == pytest.approx(0, abs=1e-4)


def linked_runs(work: WorkDirectory, name: str) -> WorkDirectory:
    (work.path / name).mkdir()
    return WorkDirectory(work.path / name)


@pytest.mark.bars
def test_adapters_learn_and_their_base_is_the_reference(work: WorkDirectory, reference: RunDirectory) -> None:
    run = preference_run(work, "lora", *LORA)
    train(run, ranks=1)
    found = numbers(run)
    assert found[0]["preference/margin"] == pytest.approx(0, abs=1e-4)
    assert found[STEPS]["preference/accuracy"] > found[0]["preference/accuracy"] + 0.2
    expected = load_file(reference.reference)
    for key, value in load_file(run.reference).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=1e-5)
    again = work.run("preference", "lora_again")
    copy_until(run, again, step=10)
    again.reference.unlink()
    train(again, ranks=1)
    assert numbers(again) == found


@pytest.mark.bars  # one that goes on is a row of the small size
def test_a_killed_run_ends_bit_identical(reference: RunDirectory, work: WorkDirectory) -> None:
    run = preference_run(work, "killed")
    process = start(run, ranks=1)
    deadline = time.monotonic() + DEADLINE_S
    while not checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST):
        assert process.poll() is None, run.rank_log(0).read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(DEADLINE_S)
    assert not run.result.exists()
    assert finish(start(run, ranks=1)) == 0
    assert numbers(run) == numbers(reference)
    for key, value in model_weights(reference.checkpoints / checkpoint_files.step_name(STEPS)).items():
        assert np.array_equal(model_weights(run.checkpoints / checkpoint_files.step_name(STEPS))[key], value), key
