"""Checkpoints as files: whole or not there, damage found and named, the one before used."""

import errno
import json
import logging
import os
import shutil
from dataclasses import asdict, replace

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.prepare.compose import compose_config
from dist_lm.storage import durable
from dist_lm.training import checkpoint_files as files
from dist_lm.training.adapters import adapted_model, check_same_adapters
from dist_lm.training.checkpoint import read_contents
from dist_lm.training.state import TrainState

MODEL = {"d_model": 8}


def make(checkpoints, step, content=b"weights"):
    directory = checkpoints / files.step_name(step)
    directory.mkdir(parents=True)
    (directory / "shard-00001.safetensors").write_bytes(content)
    files.write_state(directory, TrainState(step=step, tokens=10 * step), MODEL)
    files.write_manifest(
        directory,
        {name: durable.sha256_of(directory / name) for name in ("shard-00001.safetensors", files.STATE)},
    )
    files.write_pointer(checkpoints, files.LATEST, directory)
    return directory


def test_state_and_pointer_read_back(tmp_path):
    directory = make(tmp_path, 3)
    assert files.read_state(directory) == (TrainState(step=3, tokens=30), MODEL)
    assert files.read_pointer(tmp_path, files.LATEST) == directory
    assert files.read_pointer(tmp_path, files.BEST) is None
    files.verify(directory)


def test_without_the_checkpoint_that_it_names_latest_is_the_one_from_which_ranks_continue(tmp_path):
    make(tmp_path, 1)
    before = make(tmp_path, 2)
    shutil.move(make(tmp_path, 3), tmp_path / "step_00000003.removed")
    files.write_pointer(tmp_path, files.BEST, tmp_path / files.step_name(3))
    assert files.read_pointer(tmp_path, files.LATEST) == before == files.newest_intact(files.steps_in(tmp_path))
    assert files.newest_step(tmp_path) == 2
    (tmp_path / files.LATEST).unlink()
    assert files.find_checkpoint(tmp_path) == before
    assert files.read_pointer(tmp_path, files.BEST) is None


@pytest.mark.parametrize("adapters", [{}, {"lora": 7}, {"lora": {"ranks": 1}}, {"lora": {"rank": -1}}])
def test_a_damaged_record_of_adapters_names_its_checkpoint(tmp_path, adapters):
    """Finds a KeyError, a TypeError or an error that names no file in place of the checkpoint."""
    model = compose_config(["stage=language", "model=nano"]).model
    files.write_state(tmp_path, TrainState(), asdict(model), adapters)
    for read in (adapted_model, lambda directory: check_same_adapters(directory, model)):
        with pytest.raises(ArtefactError, match=f"checkpoint {tmp_path}: state.json does not describe adapters"):
            read(tmp_path)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte, "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, expected"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["flipped", "cut", "gone"],
)
@pytest.mark.parametrize("name", ["shard-00001.safetensors", files.STATE])
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path, caplog, damage, words, name):
    make(tmp_path, 1)
    newest = make(tmp_path, 2)
    damage(newest / name)
    with pytest.raises(ArtefactError, match=words) as found:
        files.verify(newest)
    assert name in str(found.value)
    with caplog.at_level(logging.WARNING):
        assert files.newest_intact(files.steps_in(tmp_path)) == tmp_path / files.step_name(1)
    assert name in caplog.text
    assert "using the checkpoint before it" in caplog.text


def test_a_file_of_tensors_that_is_not_its_own_is_damage(tmp_path):
    """The reader takes every such file: one of another save would mix two steps without a word."""
    make(tmp_path, 1)
    newest = make(tmp_path, 2)
    (newest / "notes.txt").write_text("mine")
    files.verify(newest)
    (newest / "shard-00002.safetensors").write_bytes(b"of another save")
    with pytest.raises(ArtefactError, match=r"shard-00002\.safetensors does not belong to it"):
        files.verify(newest)
    assert files.newest_intact(files.steps_in(tmp_path)) == tmp_path / files.step_name(1)


def test_an_index_that_is_not_its_own_is_damage(tmp_path):
    """Finds an index put into a checkpoint that was written without one, which a load would follow."""
    directory = make(tmp_path, 1)
    (directory / files.INDEX).write_text('{"files": [], "tensors": {}}')
    with pytest.raises(ArtefactError, match=r"index\.json does not belong to it"):
        files.verify(directory)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a": {"sha256": "", "bytes": Infinity}}'], ids=["deep", "infinite"]
)
@pytest.mark.parametrize("read", [files.read_state, files.read_manifest, read_contents], ids=lambda read: read.__name__)
def test_json_that_no_save_writes_is_refused(tmp_path, read, content):
    """Finds JSON whose error is not one of a damaged file: a first rank that ends with it leaves the others waiting."""
    for name in (files.STATE, files.MANIFEST, files.INDEX):
        (tmp_path / name).write_text(content)
    with pytest.raises(ArtefactError, match="cannot be read"):
        read(tmp_path)


def test_a_damaged_start_is_refused_and_others_are_named(tmp_path):
    make(tmp_path, 1)
    flip_a_byte(make(tmp_path, 2) / files.STATE)
    with pytest.raises(ArtefactError, match=r"state\.json is damaged .*other checkpoints of the run: step_00000001"):
        files.require_intact(files.find_checkpoint(tmp_path))


def test_when_every_checkpoint_is_damaged_the_run_does_not_silently_start_anew(tmp_path):
    (make(tmp_path, 1) / files.MANIFEST).unlink()
    with pytest.raises(ArtefactError, match="no intact checkpoint"):
        files.newest_intact(files.steps_in(tmp_path))


def test_a_save_that_was_killed_is_not_a_checkpoint(tmp_path):
    make(tmp_path, 1)
    (tmp_path / ".step_00000002").mkdir()
    assert files.newest_intact(files.steps_in(tmp_path)) == tmp_path / files.step_name(1)
    files.prune(tmp_path, keep=3)
    assert not (tmp_path / ".step_00000002").exists()


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 6):
        make(tmp_path, step)
    files.write_pointer(tmp_path, files.BEST, tmp_path / files.step_name(2))
    files.prune(tmp_path, keep=2)
    assert [path.name for path in files.steps_in(tmp_path)] == [files.step_name(step) for step in (2, 4, 5)]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_damaged_checkpoints_that_a_run_went_back_behind_do_not_take_the_place_of_its_own(tmp_path, keep):
    for step in (3, 4, 5):
        make(tmp_path, step)
    for step in (4, 5):
        flip_a_byte(tmp_path / files.step_name(step) / "shard-00001.safetensors")
    assert files.newest_intact(files.steps_in(tmp_path)) == tmp_path / files.step_name(3)
    shutil.rmtree(tmp_path / files.step_name(4))
    again = make(tmp_path, 4)
    files.tidy(tmp_path, TrainState(step=4), keep)
    assert files.newest_intact(files.steps_in(tmp_path)) == files.read_pointer(tmp_path, files.LATEST) == again
    assert [path.name for path in files.steps_in(tmp_path)] == [files.step_name(step) for step in (3, 4)[-keep:]]


def test_a_file_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    make(tmp_path, 1)
    newest = make(tmp_path, 2)
    read = durable.sha256_of

    def failing(path):
        if path.parent == newest:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path)

    monkeypatch.setattr(durable, "sha256_of", failing)
    assert files.newest_intact(files.steps_in(tmp_path)) == tmp_path / files.step_name(1)
    with pytest.raises(ArtefactError, match=r"shard-00001\.safetensors cannot be read \(Input/output error\)"):
        files.verify(newest)


def test_ranks_that_share_the_reading_see_all_damage(tmp_path):
    directory = make(tmp_path, 1)
    for name in ("shard-00001.safetensors", files.STATE):
        flip_a_byte(directory / name)
        found = [files.first_damage(directory, share=(rank, 3)) for rank in range(3)]
        assert [damage for damage in found if damage] == [
            f"checkpoint {directory}: {name} is damaged (SHA-256 differs from {files.MANIFEST})"
        ]
        flip_a_byte(directory / name)


def test_a_user_names_a_run_its_checkpoints_or_one_of_them(tmp_path):
    newest = make(tmp_path / "checkpoints", 2)
    for path in (tmp_path, tmp_path / "checkpoints", newest):
        assert files.find_checkpoint(path) == newest
    with pytest.raises(ArtefactError, match="no checkpoint there"):
        files.find_checkpoint(tmp_path / "nothing")


def test_a_model_of_others_is_refused_with_the_command_that_reads_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(ArtefactError, match=r"no checkpoint there .*; `dist-lm import` makes a run"):
            files.find_checkpoint(path)


def test_key_heads_left_open_are_as_many_as_query_heads(tmp_path):
    config = compose_config(["stage=language", "model=nano"]).model
    saved = asdict(config)
    files.check_same_model(tmp_path, saved, replace(config, n_kv_heads=config.n_heads))
    with pytest.raises(ArtefactError, match=r"model\.n_kv_heads=1 \(checkpoint: 5\)"):
        files.check_same_model(tmp_path, saved, replace(config, n_kv_heads=1))


def test_a_checkpoint_from_before_an_option_has_it_off(tmp_path):
    config = compose_config(["stage=language", "model=nano"]).model
    newer = ("qkv_bias", "parallel_residual", "rotary_fraction", "rope_scaling", "rope_factor")
    saved = {key: value for key, value in asdict(config).items() if key not in newer}
    files.check_same_model(tmp_path, saved, config)
    with pytest.raises(ArtefactError, match=r"model\.parallel_residual=True \(checkpoint: False\)"):
        files.check_same_model(tmp_path, saved, replace(config, parallel_residual=True))


def test_state_of_a_checkpoint_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / files.STATE).write_text(json.dumps({"format": files.FORMAT, "state": {"steps": 1}}))
    with pytest.raises(ArtefactError, match=r"state\.json cannot be read"):
        files.read_state(tmp_path)


def test_checkpoints_of_the_format_before_are_refused_by_name(tmp_path):
    """Format 1 had a gain per head instead of the norms of queries and keys."""
    directory = make(tmp_path, 1)
    state = json.loads((directory / files.STATE).read_text())
    (directory / files.STATE).write_text(json.dumps(state | {"format": 1}))
    with pytest.raises(
        ArtefactError, match=r"step_00000001: format 1, expected 2: another version of dist_lm wrote it"
    ):
        files.read_state(directory)


def test_a_model_for_longer_contexts_starts_from_one_for_shorter_ones(tmp_path):
    """Finds a context that cannot be extended, and positions that are scaled by mistake, in a context as long."""
    short = compose_config(["stage=language", "model=nano"]).model
    scaled = replace(short, rope_scaling="yarn", rope_factor=8.0, rope_original_len=short.max_seq_len)
    files.check_start(tmp_path, asdict(short), replace(scaled, max_seq_len=8 * short.max_seq_len))
    with pytest.raises(ArtefactError, match=r"model\.rope_scaling=yarn \(checkpoint: none\)"):
        files.check_start(tmp_path, asdict(short), scaled)
    with pytest.raises(ArtefactError, match=r"model\.rope_scaling=yarn"):
        files.check_same_model(tmp_path, asdict(short), replace(scaled, max_seq_len=8 * short.max_seq_len))


def test_a_model_of_scores_starts_from_one_of_tokens_and_not_the_other_way_round(tmp_path):
    tokens = replace(compose_config(["stage=language", "model=nano"]).model, tie_embeddings=False)
    scores = replace(tokens, head="scalar", tie_embeddings=True)
    files.check_start(tmp_path, asdict(tokens), scores)
    files.check_start(tmp_path, asdict(scores), scores)
    with pytest.raises(ArtefactError, match=r"model\.head=tokens \(checkpoint: scalar\)"):
        files.check_start(tmp_path, asdict(scores), tokens)
    with pytest.raises(ArtefactError, match=r"model\.d_ff=1 \(checkpoint"):
        files.check_start(tmp_path, asdict(tokens), replace(scores, d_ff=1))
    with pytest.raises(ArtefactError, match=r"model\.head=scalar \(checkpoint: tokens\)"):
        files.check_same_model(tmp_path, asdict(tokens), scores)
