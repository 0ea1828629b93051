"""What is loaded is what was written; what cannot be is refused in one line."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_lm.errors import ArtefactError
from dist_lm.generation.load import Openings, load_model, read_openings
from dist_lm.sandbox import limited
from dist_lm.training import checkpoint_files
from tests.tokenizer.made_json import large_json


def step(run):
    return run.checkpoints / checkpoint_files.step_name(20)


@pytest.mark.parametrize("place", ["run", "checkpoints", "step"])
def test_a_run_a_folder_of_checkpoints_and_a_checkpoint_are_the_same_model(small_run, small_model, place):
    loaded = load_model({"run": small_run.path, "checkpoints": small_run.checkpoints, "step": step(small_run)}[place])
    assert loaded.name == "code/small/step_00000020"
    assert loaded.config == small_model.config
    expected = dict(small_model.named_parameters())
    assert loaded.weights.keys() == expected.keys()
    assert all(torch.equal(loaded.weights[name], value) for name, value in expected.items())
    assert loaded.tokenizer.vocab_size == loaded.config.vocab_size


def test_a_relative_path_and_a_link_to_a_run_find_the_work_directory(own_run, tmp_path, monkeypatch):
    monkeypatch.chdir(own_run.checkpoints)
    assert load_model(Path("..")).name == load_model(Path()).name == "code/small/step_00000020"
    elsewhere = tmp_path / "elsewhere"
    shutil.move(own_run.path, elsewhere)
    own_run.path.symlink_to(elsewhere)
    assert load_model(own_run.path).run == own_run


def test_a_checkpoint_outside_a_run_needs_a_tokenizer(small_run, tmp_path):
    shutil.copytree(step(small_run), tmp_path / "alone")
    with pytest.raises(ArtefactError, match=r"lies in no run.*--tokenizer=PATH"):
        load_model(tmp_path / "alone")
    for named in (small_run.work.tokenizer_model, small_run.work.tokenizer):
        loaded = load_model(tmp_path / "alone", named)
        assert (loaded.run, loaded.name) == (None, str(tmp_path / "alone"))
    assert read_openings(loaded.run) == Openings()


@pytest.mark.heavy
def test_a_named_tokenizer_is_read_within_limits(small_run, tmp_path, monkeypatch):
    """It may come from somebody else: a vocabulary without end held the command until it was killed."""
    (tmp_path / "tokenizer.json").write_bytes(large_json(150_000))
    monkeypatch.setattr(limited, "CPU_S", 0.05)
    with pytest.raises(ArtefactError, match=r"tokenizer\.json: reading it takes more than 0\.05 s of CPU time"):
        load_model(step(small_run), tmp_path)


def flip_a_byte(run):
    path = next(step(run).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_model(run):
    rewrite_state(run, {}, {"vocab_size": 600})


def other_tokenizer(run):
    rewrite_state(run, {"tokenizer": "0" * 64}, {})


def rewrite_state(run, state_changes, model_changes):
    state, model = checkpoint_files.read_state(step(run))
    checkpoint_files.write_state(step(run), replace(state, **state_changes), model | model_changes)
    manifest = {name: file.sha256 for name, file in checkpoint_files.read_manifest(step(run)).items()}
    manifest["state.json"] = checkpoint_files.durable.sha256_of(step(run) / "state.json")
    checkpoint_files.write_manifest(step(run), manifest)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: shutil.rmtree(run.checkpoints), "no checkpoint there"),
        (flip_a_byte, "is damaged"),
        (other_model, r"knows 600 tokens, the tokenizer has 640.*--tokenizer=PATH"),
        (other_tokenizer, r"trained with tokenizer 000000000000, not [0-9a-f]{12}: use the tokenizer"),
        (lambda run: (run.work.path / "tokenizer").unlink(), r"no tokenizer there.*--tokenizer=PATH"),
    ],
    ids=["none", "damaged", "another", "another tokenizer", "tokenizer"],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(own_run, spoil, words):
    spoil(own_run)
    with pytest.raises(ArtefactError, match=words) as refusal:
        load_model(own_run.path)
    assert "\n" not in str(refusal.value)


def test_openings_are_the_prompts_that_the_stage_samples_from(small_run, own_run):
    openings = read_openings(small_run)
    assert openings.of("bash")[0].startswith("#!/bin/bash\n")
    with pytest.raises(ValueError, match=r"/lang cobol: .*no opening.*use one of bash, python, sql"):
        openings.of("cobol")
    (own_run.work.path / "corpora").unlink()
    assert str(read_openings(own_run)) == "openings for bash, python, sql"
    own_run.config.write_text("stage: [")
    with pytest.raises(ArtefactError, match=r"config\.yaml: cannot be read"):
        read_openings(own_run)
