"""A run that is trained again without documents is, in bits, one that left them out from its first step."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from dist_lm.chat.documents import encode_document
from dist_lm.config.root import save_config
from dist_lm.data.manifest import read_manifest
from dist_lm.data.shard_writer import CorpusWriter
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.data.without import text_of
from dist_lm.document import Document
from dist_lm.errors import ArtefactError, ConfigError, UserError
from dist_lm.stages.continuing import check_branch, first_reading, left_out_by
from dist_lm.stages.registry import load_config
from dist_lm.stages.stage import run_of
from dist_lm.stages.training.stage import training_stage
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files
from dist_lm.verbs import data_without
from dist_lm.verbs.data_step import slices_of_step, training_sequences
from dist_lm.verbs.data_without import documents_in, near_duplicates_in, repeats_of, train_without
from tests.training_run import numbers, prepare, train

STEPS, BATCH = 12, 8
OPTIONS = (
    *(f"stage.steps={STEPS}", f"stage.global_batch={BATCH}", "stage.seq_len=64", "stage.checkpoint_every=3"),
    *("stage.keep_checkpoints=9", "stage.eval_every=0", "stage.sampling.samples_per_prompt=0"),
)
MIXED = ("stage.init_from=none", "stage.mix={language: 0.25}", "stage.fim_rate=0.5")


def documents_read_from(run: RunDirectory, step: int, folder: str, count: int) -> frozenset[int]:
    """Documents of which a token is first learned from in `step`."""
    sequences = training_sequences(load_config(run.config), run)
    chosen: list[int] = []
    for document in dict.fromkeys(part.document for part in slices_of_step(run, step) if part.corpus == folder):
        first = first_reading(sequences, {folder: frozenset({document})}, STEPS * BATCH)
        if first is not None and first // BATCH + 1 == step:
            chosen.append(document)
        if len(chosen) == count:
            return frozenset(chosen)
    raise AssertionError(f"step {step} begins {len(chosen)} documents of {folder}")


def tensors(run: RunDirectory, step: int = STEPS) -> dict[str, bytes]:
    """Model and optimizer after a step, by name and file; the headers of these files have no order."""
    directory = run.checkpoints / checkpoint_files.step_name(step)
    return {
        f"{path.name} {name}": tensor.tobytes()
        for path in sorted(directory.glob(f"*{checkpoint_files.TENSORS}"))
        for name, tensor in load_file(path).items()
    }


def train_again(run: RunDirectory, ids: dict[str, frozenset[int]], ranks: int) -> list[data_without.Repeat]:
    """What the verb does, without the launcher's Ray."""
    repeats = repeats_of(run, ids).runs
    for repeat in repeats:
        data_without.prepare(repeat)
        stage = training_stage(repeat.config.stage.name)
        save_config(stage.look(repeat.config, is_target=True, rebuilt=()).config, repeat.new.config)
        train(repeat.new, ranks)
    return list(repeats)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("stage", "settings", "folders", "ranks"),
    [("code", MIXED, ("code", "language"), 1), ("code", MIXED, ("code",), 2), ("tools", (), ("tools",), 2)],
    ids=["mix and infill, one rank", "mix and infill, two ranks", "conversations, two ranks"],
)
def test_bits_are_those_of_a_run_that_left_them_out_from_the_start(
    work: WorkDirectory, tmp_path: Path, stage: str, settings: Sequence[str], folders: Sequence[str], ranks: int
):
    """Finds a checkpoint that has seen a document, an order that moves, and a count of steps that is off."""
    options = (*(option for option in OPTIONS if stage != "tools" or "sampling" not in option), *settings)
    run = prepare(work, "old", "stage.init_from=none", *options, stage=stage)
    train(run, ranks)
    # The corpus of conversations is small, and read whole in a few steps.
    first, kept = (5, 3) if stage == "tools" else (8, 6)
    ids = {folder: documents_read_from(run, first, folder, 1 + (folder == "code")) for folder in folders}
    before = tensors(run)

    path = tmp_path / "ids.txt"
    path.write_text(text_of(ids))
    from_start = prepare(work, "from_start", "stage.init_from=none", *options, f"stage.without={path}", stage=stage)
    train(from_start, ranks)

    (repeat,) = train_again(run, ids, ranks)
    assert (repeat.first_step, repeat.begins_after, repeat.repeated_steps) == (first, kept, STEPS - kept)
    assert tensors(repeat.new) == tensors(from_start)
    assert tensors(run) == before != tensors(from_start)
    assert not repeats_of(repeat.new, ids).runs
    # Steps that come before are those of the old run.
    assert tensors(from_start, step=kept) == tensors(run, step=kept)
    again, expected = numbers(repeat.new), numbers(from_start)
    assert all(again[step] == expected[step] for step in range(kept + 1, STEPS + 1))


@pytest.mark.heavy
def test_ancestors_are_trained_again_and_their_followers_from_the_first_step(work: WorkDirectory, tmp_path: Path):
    """Finds a run that goes on from a start which has learned the documents."""
    base = prepare(work, "base", "stage.init_from=none", *OPTIONS)
    train(base, 1)
    follower = prepare(work, "follower", f"stage.init_from={base.path}", *OPTIONS, stage="code")
    train(follower, 1)
    early = prepare(work, "early", f"stage.init_from={base.path}@6", *OPTIONS, stage="code")
    ids = {"language": documents_read_from(base, 8, "language", 1)}

    path = tmp_path / "ids.txt"
    path.write_text(text_of(ids))
    clean = prepare(work, "clean", "stage.init_from=none", *OPTIONS, f"stage.without={path}")
    train(clean, 1)
    clean_follower = prepare(work, "clean_follower", f"stage.init_from={clean.path}", *OPTIONS, stage="code")
    train(clean_follower, 1)

    repeats = train_again(follower, ids, 1)
    assert [(repeat.old.path, repeat.begins_after, repeat.repeated_steps) for repeat in repeats] == [
        (base.path, 6, 6),
        (follower.path, 0, STEPS),
    ]
    assert tensors(repeats[1].new) == tensors(clean_follower)
    # A branch may have had another schedule before it began.
    branch = prepare(work, "branch", f"stage.branch_from={follower.path}@6", *OPTIONS, stage="code")
    branch.config.write_text(branch.config.read_text().replace("init_from: auto", f"init_from: {base.path}"))
    with pytest.raises(ConfigError, match=r"branched from .*follower@6, whose own start has learned"):
        repeats_of(branch, ids)
    # A run that does not mask documents, and reads none of these, has only another start.
    unmasked = prepare(
        work, "unmasked", f"stage.init_from={base.path}", *OPTIONS, "stage.document_mask=false", stage="code"
    )
    assert repeats_of(unmasked, ids).runs[-1].config.stage.without == ""
    # A run that began before step 8 of the other one has learned nothing from them.
    assert not repeats_of(early, ids).runs


@pytest.mark.heavy
def test_without_an_older_checkpoint_a_run_begins_again(work: WorkDirectory, capsys: pytest.CaptureFixture[str]):
    """Finds a damaged checkpoint that is continued, one of the step itself, and steps that are not counted."""
    run = prepare(work, "old", "stage.init_from=none", *OPTIONS, stage="code")
    train(run, 1)
    ids = {"code": documents_read_from(run, 7, "code", 1)}
    (repeat,) = repeats_of(run, ids).runs
    assert repeat.start == run.checkpoints / checkpoint_files.step_name(6)

    tensor_file = next(iter(sorted(repeat.start.glob("*.safetensors"))))
    tensor_file.write_bytes(tensor_file.read_bytes()[:-1] + b"x")
    assert repeats_of(run, ids).runs[0].begins_after == 3
    for directory in checkpoint_files.steps_in(run.checkpoints)[:2]:
        (directory / checkpoint_files.MANIFEST).unlink()
    (repeat,) = repeats_of(run, ids).runs
    assert (repeat.start, repeat.config.stage.branch_from, repeat.repeated_steps) == (None, "", STEPS)

    # Nobody can be asked here, and nothing is written before.
    path = work.path / "ids.txt"
    path.write_text(text_of(ids))
    with pytest.raises(UserError, match="--yes starts it"):
        train_without(run, path, with_near_duplicates=False, is_sure=False)
    shown = capsys.readouterr().out
    assert f"steps to take again: {STEPS}" in shown
    assert "not undone: the tokenizer stays" in shown
    assert not repeat.new.path.exists()


@pytest.mark.heavy
def test_what_cannot_be_undone_is_refused_by_name(work: WorkDirectory, tmp_path: Path):
    """Finds documents that others have seen, ids of nothing, and a branch that keeps what its start has learned."""
    seen = prepare(work, "seen", "stage.init_from=none", *OPTIONS, "stage.document_mask=false", stage="code")
    ids = {"code": documents_read_from(seen, 2, "code", 1)}
    with pytest.raises(ConfigError, match=r"stage\.document_mask=false: other documents of a sequence have seen these"):
        repeats_of(seen, ids)
    with pytest.raises(ConfigError, match=r"stage\.without=.*none with stage\.document_mask=false"):
        prepare(work, "never", "stage.init_from=none", "stage.document_mask=false", "stage.without=f", stage="code")

    run = prepare(work, "old", "stage.init_from=none", *OPTIONS, stage="code")
    path = tmp_path / "ids.txt"
    path.write_text("nothing:3")
    with pytest.raises(ArtefactError, match=r"ids\.txt: nothing:3: .* read these corpora: code"):
        documents_in(path, run)
    n_documents = TokenCorpus.open(work.corpus("code"), "train").n_documents
    path.write_text(f"code:{n_documents}")
    with pytest.raises(ArtefactError, match=f"code:{n_documents}: corpus code has {n_documents:,} train documents"):
        documents_in(path, run)

    train(run, 1)
    config = load_config(run.config)
    every_document = {"code": frozenset(range(n_documents))}
    path.write_text(text_of(every_document))
    with pytest.raises(ArtefactError, match="all train documents of code are left out"):
        repeats_of(run, every_document)
    with pytest.raises(ArtefactError, match=r"ids\.txt: all train documents of code are left out"):
        left_out_by(replace(config, stage=replace(config.stage, without=str(path))), run)

    path.write_text(text_of({"code": documents_read_from(run, 5, "code", 1)}))
    stage = replace(config.stage, branch_from=f"{run.path}@6", without=str(path))
    branch = replace(config, run_id="branch", stage=stage)
    with pytest.raises(ConfigError, match="the first one in step 5: `dist-lm data without`"):
        check_branch(training_stage("code"), branch)
    unread = replace(branch, stage=replace(stage, branch_from=f"{run.path}@3"))
    assert check_branch(training_stage("code"), unread).name == "step_00000003"

    # A run keeps the documents that it began with.
    branch_run = run_of(branch)
    branch_run.create()
    branch_run.note_files(branch.noted_files)
    assert left_out_by(branch, branch_run)
    path.write_text("code:0")
    with pytest.raises(ArtefactError, match=r"stage\.without=.*ids\.txt: has changed since"):
        left_out_by(branch, branch_run)


@pytest.mark.heavy
def test_near_duplicates_are_left_out_and_those_in_val_are_told(work: WorkDirectory):
    """Finds a near-duplicate that is missed, one in val that is taken for a train document, and text that is cut at
    other places than its documents."""
    rng = random.Random(0)
    words = [[f"word{rng.randrange(100)}" for _ in range(60)] for _ in range(30)]
    edited = [[*words[n][:30], "other", *words[n][31:]] for n in range(2)]
    documents = {"train": [*words, edited[0], words[7][:20]], "val": [words[8][:20], edited[1]]}
    tokenizer, recipe = Tokenizer.load(work.tokenizer_model), read_manifest(work.corpus("code")).recipe
    with CorpusWriter(work.corpus("code"), replace(recipe, corpus_fingerprint="e" * 64)) as writer:
        for split, texts in documents.items():
            for text in texts:
                document = Document(" ".join(text), "english", "made", "none", "0" * 64)
                writer.write(split, encode_document(tokenizer, document))
        writer.finish({})

    run = prepare(work, "old", "stage.init_from=none", *OPTIONS, stage="code")
    more, lines = near_duplicates_in(run, {"code": frozenset({0, 1})})
    assert more == {"code": {30}}
    assert lines == [
        "code:30 resembles code:0",
        "val document 1 of code resembles code:1: no step learns from val",
    ]
