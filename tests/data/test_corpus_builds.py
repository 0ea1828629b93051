"""Builds of a corpus that are killed go on behind their last finished tar; files of others in its folder are safe."""

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_lm.data.journal import Journal, journal_path
from dist_lm.data.manifest import Recipe, manifest_path, read_manifest
from dist_lm.data.shard_writer import CorpusWriter, origins_path
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import TokenizedDocument
from dist_lm.errors import ArtefactError
from tests.data.synthetic_corpus import documents, lengths, write
from tests.patience import patient

LENGTHS = lengths(160, 60)
VAL = lengths(40, 60, seed=1)
RECIPE = Recipe("t" * 64, 2**16, "c" * 64, documents_per_member=4, shard_tokens=400)


def row() -> list[tuple[str, TokenizedDocument]]:
    """The documents of both splits, as a reader would give them: mixed, in a fixed order."""
    made = [("train", one) for one in documents(LENGTHS, masked=True)] + [("val", one) for one in documents(VAL, 1)]
    return [made[place] for place in np.random.default_rng(0).permutation(len(made))]


def build(directory: Path, recipe: Recipe = RECIPE, after: Callable[[], object] = lambda: None) -> list[int]:
    """Build the corpus of `row` as stage shards does. Returns the places of the documents that were written."""
    written = []
    with CorpusWriter(directory, recipe) as writer:
        kept = dict(writer.kept)
        for place, (split, document) in enumerate(row()):
            if kept[split]:
                kept[split] -= 1
                continue
            writer.write(split, document)
            written.append(place)
            after()
        writer.finish({"dropped": 3})
    return written


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def without_times(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without the indices, which hold the time of their tar."""
    return {name: content for name, content in found.items() if not name.endswith(".index")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "code"
    build(directory)
    assert len(list(directory.glob("train-*.tar"))) > 5
    return directory


def test_ten_kills_change_no_byte_and_cost_a_tar_each(tmp_path: Path, undisturbed: Path) -> None:
    directory, draw = tmp_path / "code", random.Random(0)
    fork = multiprocessing.get_context("fork")
    written = fork.Value("i", 0, lock=False)  # a process that is killed would keep the lock

    def slowly() -> None:
        written.value += 1
        time.sleep(0.001)

    finished: dict[str, int] = {}  # tar -> inode
    for _ in range(10):
        limit = written.value + draw.randrange(1, 30)
        process = fork.Process(target=build, args=(directory, RECIPE, slowly))
        process.start()
        deadline = time.monotonic() + patient(60)
        while written.value < limit and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert not manifest_path(directory).exists()
        assert all((directory / name).stat().st_ino == inode for name, inode in finished.items())
        named = journal_path(directory).read_text() if journal_path(directory).exists() else ""
        tars = [path for path in directory.glob("*-??????.tar") if f'"name": "{path.name}"' in named]
        finished = {path.name: path.stat().st_ino for path in tars}
    rest = len(build(directory))
    assert without_times(files(directory)) == without_times(files(undisturbed))
    splits = read_manifest(undisturbed).splits.values()
    a_tar = sum(max(shard.counts.documents for shard in split.shards) for split in splits)  # one of each split is open
    assert len(row()) <= written.value + rest <= len(row()) + 10 * a_tar


class StoppedError(Exception):
    pass


def stop_late(directory: Path) -> None:
    """A build that ends in the middle, with finished tars and a journal."""
    count = 0

    def stop() -> None:
        nonlocal count
        count += 1
        if count == 150:
            raise StoppedError

    with pytest.raises(StoppedError):
        build(directory, after=stop)


def documents_in(directory: Path, names: set[str]) -> int:
    splits = read_manifest(directory).splits.values()
    return sum(shard.counts.documents for split in splits for shard in split.shards if shard.name in names)


def test_a_restart_writes_only_what_no_finished_tar_holds(tmp_path: Path, undisturbed: Path) -> None:
    directory = tmp_path / "code"
    stop_late(directory)
    held = documents_in(undisturbed, {path.name for path in directory.glob("*-??????.tar")})
    assert held > 100
    assert len(build(directory)) == len(row()) - held
    assert without_times(files(directory)) == without_times(files(undisturbed))


def cut_the_last_line(directory: Path) -> None:
    whole = journal_path(directory).read_bytes()
    journal_path(directory).write_bytes(whole[: whole.rindex(b'{"finished"') + 40])


def flip_a_finished_tar(directory: Path) -> None:
    with (directory / "train-000003.tar").open("r+b") as tar:
        tar.seek(3000)
        tar.write(b"\xff\xff")


def lose_origins(directory: Path) -> None:
    origins_path(directory / "train-000003.tar").unlink()


@pytest.mark.parametrize("harm", [cut_the_last_line, flip_a_finished_tar, lose_origins])
def test_a_half_written_journal_or_a_damaged_tar_is_not_trusted(
    tmp_path: Path, undisturbed: Path, harm: Callable[[Path], None]
) -> None:
    directory = tmp_path / "code"
    stop_late(directory)
    harm(directory)
    build(directory)
    assert without_times(files(directory)) == without_times(files(undisturbed))


def test_a_damaged_tar_of_a_whole_corpus_is_repaired_from_there(tmp_path: Path, undisturbed: Path) -> None:
    directory = tmp_path / "code"
    shutil.copytree(undisturbed, directory)
    (directory / "train-000004.tar").write_bytes(b"")
    names = {path.name for path in directory.glob("*-??????.tar")}
    kept = {name for name in names if name.startswith("val") or name < "train-000004.tar"}
    assert len(build(directory)) == len(row()) - documents_in(undisturbed, kept)
    assert without_times(files(directory)) == without_times(files(undisturbed))


@pytest.mark.parametrize(
    "change", [{"tokenizer_sha256": "u" * 64}, {"corpus_fingerprint": "d" * 64}, {"shard_tokens": 300}]
)
def test_another_recipe_keeps_no_tar(tmp_path: Path, undisturbed: Path, change: dict) -> None:
    directory = tmp_path / "code"
    shutil.copytree(undisturbed, directory)
    recipe = Recipe(**{**vars(RECIPE), **change})
    assert len(build(directory, recipe)) == len(row())
    assert read_manifest(directory).recipe == recipe


def test_content_is_what_training_sees(tmp_path: Path) -> None:
    made = documents(LENGTHS[:30], masked=True)

    def content(name: str, changed: list[TokenizedDocument], **options) -> str:
        directory = write(tmp_path / name, changed, **options)
        assert TokenCorpus.open(directory, "train").n_documents == len(changed)
        return read_manifest(directory).content["train"]

    def with_first(**change) -> list[TokenizedDocument]:
        return [made[0], replace(made[1], **change), *made[2:]]

    mask = made[1].loss_mask
    assert mask is not None
    tokens = made[1].tokens.copy()
    tokens[-1] ^= 1
    same = content("same", made)
    assert content("cut", made, documents_per_member=7, shard_tokens=900) == same
    assert content("relabelled", with_first(source="/elsewhere", licence="Apache-2.0")) == same
    assert content("tokens", with_first(tokens=tokens)) != same
    assert content("mask", with_first(loss_mask=1 - mask)) != same
    assert content("order", [made[1], made[0], *made[2:]]) != same
    assert content("lengths", made[:-1]) != same


def complete(directory: Path) -> None:
    pass


def damaged(directory: Path) -> None:
    (directory / "train-000001.tar").unlink()


def unfinished(directory: Path) -> None:
    Journal.start(directory, RECIPE)


def without_manifest(directory: Path) -> None:
    manifest_path(directory).unlink()


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside.txt").write_text("mine")


@pytest.mark.parametrize("state", [complete, damaged, unfinished, without_manifest])
@pytest.mark.parametrize(
    ("name", "put"),
    [
        ("notes.txt", a_file),
        ("drafts", a_folder),
        (".hidden", a_file),
        ("train-000099.tar", a_file),
        ("train-000099.tar", a_folder),
        (".train-000000.tar.tmp", a_folder),
    ],
)
def test_what_others_put_there_is_refused_by_name_and_never_removed(
    tmp_path: Path, undisturbed: Path, state: Callable[[Path], None], name: str, put: Callable[[Path], None]
) -> None:
    directory = tmp_path / "code"
    shutil.copytree(undisturbed, directory)
    state(directory)
    put(directory / name)
    before = sorted(path for path in directory.rglob("*"))
    with pytest.raises(ArtefactError, match="which its manifest does not name: move them away") as refused:
        build(directory)
    assert name in str(refused.value) or state is without_manifest
    assert str(directory) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert sorted(path for path in directory.rglob("*")) == before


def test_an_edited_manifest_names_nothing(tmp_path: Path, undisturbed: Path) -> None:
    directory = tmp_path / "code"
    shutil.copytree(undisturbed, directory)
    path = manifest_path(directory)
    path.write_text(path.read_text().replace("train-000001.tar", "train-000099.tar"))
    (directory / "train-000099.tar").write_text("mine")
    with pytest.raises(ArtefactError, match=r"manifest.json is damaged .*checksum"):
        build(directory)
    assert (directory / "train-000099.tar").read_text() == "mine"
