"""Shards are plain webdataset, their index is a cache, and nothing unfinished or damaged passes for whole."""

import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.compat import WebDataset

from dist_lm.data import index as index_module
from dist_lm.data.index import build_index, load_index, save_index
from dist_lm.data.inspect import verify
from dist_lm.data.manifest import (
    Manifest,
    Recipe,
    Split,
    index_path,
    manifest_path,
    read_manifest,
    write_manifest,
)
from dist_lm.data.order import DocumentSlice
from dist_lm.data.shard_writer import CorpusWriter, Origin, read_origins, shard_of
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import TokenizedDocument
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from tests.data.synthetic_corpus import LANGUAGES, corpus, documents, lengths, write

LENGTHS = lengths(50, 60)
RECIPE = Recipe("t" * 64, 2**16, "c" * 64, documents_per_member=4, shard_tokens=700)


@pytest.mark.parametrize("masked", [False, True])
def test_what_was_written_is_read(tmp_path: Path, masked: bool) -> None:
    made = documents(LENGTHS, masked=masked)
    opened = corpus(tmp_path, LENGTHS, masked)
    assert len(list(tmp_path.glob("train-*.tar"))) > 3  # documents must be found across tars
    assert opened.n_documents == len(made)
    assert opened.n_tokens == sum(LENGTHS)
    assert opened.lengths.tolist() == LENGTHS
    assert opened.n_bytes.tolist() == [document.n_bytes for document in made]
    assert [opened.languages[code] for code in opened.language_codes] == [d.language for d in made]
    assert opened.has_mask == masked
    for i, document in enumerate(made):
        n = len(document.tokens)
        assert np.array_equal(opened.tokens(i, 0, n), document.tokens)
        assert np.array_equal(opened.tokens(i, n // 3, n // 2), document.tokens[n // 3 : n // 2])
        mask = np.ones(n, np.uint8) if document.loss_mask is None else document.loss_mask
        assert np.array_equal(opened.mask(i, n // 3, n), mask[n // 3 :])
    assert not opened.tokens(0, 0, 1).flags.writeable


def test_slices_are_read_end_to_end_and_neighbours_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds slices joined across a gap, a member or a tar, and a read for each slice of neighbours."""
    made = documents(LENGTHS)
    opened = corpus(tmp_path, LENGTHS)
    n_documents = len(made)
    whole = [DocumentSlice(i, 0, LENGTHS[i]) for i in range(n_documents)]
    parts = [DocumentSlice(i, LENGTHS[i] // 3, LENGTHS[i]) for i in range(0, n_documents, 2) if LENGTHS[i] > 3]
    for slices in (whole, whole[::-1], parts, [*parts, *whole[5:9]]):
        expected = np.concatenate([made[i].tokens[start:stop] for i, start, stop in slices])
        assert np.array_equal(opened.tokens_of(slices), expected)

    # Members hold four documents.
    reads: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: reads.append(offset) or pread(fd, n, offset))
    TokenCorpus.open(tmp_path, "train").check()
    again = TokenCorpus.open(tmp_path, "train")
    reads.clear()
    again.tokens_of(whole[:4])
    assert len(reads) == 1


def test_any_webdataset_reader_reads_them(tmp_path: Path) -> None:
    made = documents(LENGTHS, masked=True)
    write(tmp_path, made)
    tars = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    reader: Any = WebDataset(tars, shardshuffle=False)
    samples = list(reader.decode())
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    place = 0
    for sample in samples:
        tokens = np.split(sample["tokens.npy"], np.cumsum(sample["lengths.npy"])[:-1])
        for i, document in enumerate(made[place : place + len(tokens)]):
            assert tokens[i].dtype == np.uint16
            assert np.array_equal(tokens[i], document.tokens)
            assert sample["bytes.npy"][i] == document.n_bytes
            assert sample["meta.json"]["languages"][str(sample["languages.npy"][i])] == document.language
        assert ("mask.npy" in sample) == any(d.loss_mask is not None for d in made[place : place + len(tokens)])
        place += len(tokens)
    assert place == len(made)
    beside = [origin for path in sorted(tmp_path.glob("*.tar")) for origin in read_origins(path)]
    assert beside == [Origin(document.source, document.licence, 0) for document in made]


def test_ids_past_65535_are_stored_as_uint32(tmp_path: Path) -> None:
    made = [replace(document, tokens=document.tokens.astype(np.uint32) + 70_000) for document in documents(LENGTHS)]
    write(tmp_path, made, vocab_size=130_000)
    opened = TokenCorpus.open(tmp_path, "train")
    for i, document in enumerate(made):
        n = len(document.tokens)
        assert opened.tokens(i, n // 3, n).dtype == np.uint32
        assert np.array_equal(opened.tokens(i, n // 3, n), document.tokens[n // 3 :])
    reader: Any = WebDataset([str(path) for path in sorted(tmp_path.glob("*.tar"))], shardshuffle=False)
    tokens = np.concatenate([sample["tokens.npy"] for sample in reader.decode()])
    assert np.array_equal(tokens, np.concatenate([document.tokens for document in made]))


def test_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    manifests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, documents(LENGTHS))
        manifests.append(manifest_path(tmp_path / name).read_bytes())
    assert manifests[0] == manifests[1]


def test_manifest_counts_by_split_and_language(tmp_path: Path) -> None:
    made, held_out = documents(LENGTHS), documents([5, 6], seed=1)
    write(tmp_path, made, held_out)
    manifest = read_manifest(tmp_path)
    assert manifest.ingest == {"dropped": 3}
    assert manifest.recipe.corpus_fingerprint == "c" * 64
    train = manifest.splits["train"]
    assert (train.counts.documents, train.counts.tokens) == (len(made), sum(LENGTHS))
    assert manifest.splits["val"].counts.tokens == 11
    for language in LANGUAGES:
        mine = [document for document in made if document.language == language]
        counts = train.languages[language]
        assert counts.documents == len(mine)
        assert counts.bytes == sum(document.n_bytes for document in mine)
        assert counts.tokens == sum(len(document.tokens) for document in mine)
    assert train.shards[0].sha256 == durable.sha256_of(tmp_path / train.shards[0].name)
    assert set(verify(tmp_path, manifest).values()) == {"ok"}


def test_manifest_refuses_another_tokenizer(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, documents([3])))
    manifest.require_tokenizer("t" * 64, tmp_path)
    with pytest.raises(ArtefactError, match="was written with tokenizer tttttttttttt, not uuuuuuuuuuuu"):
        manifest.require_tokenizer("u" * 64, tmp_path)


def test_unfinished_corpus_is_refused(tmp_path: Path) -> None:
    write(tmp_path, documents(LENGTHS))

    def interrupted() -> None:
        with CorpusWriter(tmp_path, RECIPE) as writer:
            for document in documents([100] * 13):
                writer.write("train", document)
            assert list(tmp_path.glob(".train-*.tar.tmp"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ArtefactError, match=r"unfinished \(no manifest.json\).*stage=shards"):
        TokenCorpus.open(tmp_path, "train")
    assert list(tmp_path.glob("*.tar"))  # finished tars may stay,
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("tmp")]  # half of one may not


def test_full_disk_is_the_error_and_leaves_no_tar(tmp_path: Path) -> None:
    def fill() -> None:
        with CorpusWriter(tmp_path, RECIPE) as writer:
            (tmp_path / ".train-000000.tar.tmp").symlink_to("/dev/full")
            for document in documents([5000] * 8):
                writer.write("train", document)

    with pytest.raises(OSError, match="No space left"):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["journal.jsonl"]


def test_a_smaller_build_leaves_nothing_of_the_larger_one(tmp_path: Path) -> None:
    write(tmp_path, documents(LENGTHS), documents([5, 5], seed=1))
    (tmp_path / ".train-000001.tar.tmp").write_bytes(b"what a kill left")
    (tmp_path / ".train-000001.index.0123456789abcdef.tmp").write_bytes(b"what a kill left")
    write(tmp_path, documents([7]), documents([5]))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "manifest.json",
        "train-000000.index",
        "train-000000.origins.jsonl.zst",
        "train-000000.tar",
        "val-000000.index",
        "val-000000.origins.jsonl.zst",
        "val-000000.tar",
    ]
    assert TokenCorpus.open(tmp_path, "train").n_tokens == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.rmdir(), "does not exist"),
        (lambda path: None, "unfinished"),
        (lambda path: write(path, []), "has no train documents"),
        (lambda path: (path / "manifest.json").write_text("{"), "damaged"),
        (lambda path: (path / "manifest.json").write_text('{"format": 99}'), "format 99"),
        (lambda path: (path / "manifest.json").write_text('{"format": 3, "splits": []}'), "damaged"),
    ],
)
def test_missing_or_empty_corpus_says_what_to_run(tmp_path: Path, make, message: str) -> None:
    directory = tmp_path / "code"
    directory.mkdir()
    make(directory)
    with pytest.raises(ArtefactError, match=message) as error:
        TokenCorpus.open(directory, "train")
    assert str(directory) in str(error.value)
    assert "python -m dist_lm.launch stage=shards" in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_tars_are_found(tmp_path: Path) -> None:
    write(tmp_path, documents(LENGTHS))
    tars = sorted(tmp_path.glob("*.tar"))
    tars[0].write_bytes(tars[0].read_bytes()[:-512])
    content = bytearray(tars[1].read_bytes())
    content[700] ^= 1
    tars[1].write_bytes(content)
    tars[2].unlink()
    state = verify(tmp_path, read_manifest(tmp_path))
    assert "bytes, expected" in state[tars[0].name]
    assert "sha256" in state[tars[1].name]
    assert state[tars[2].name] == "missing"
    assert state[tars[3].name] == "ok"
    with pytest.raises(ArtefactError, match=f"{tars[0].name}: .* bytes, expected"):
        TokenCorpus.open(tmp_path, "train")


def opened(directory: Path) -> list[int]:
    """The lengths of the train documents, as an opened corpus has them."""
    return TokenCorpus.open(directory, "train").lengths.tolist()


def test_index_is_rebuilt_when_missing(tmp_path: Path) -> None:
    write(tmp_path, documents(LENGTHS))
    path = index_path(next(tmp_path.glob("*.tar")))
    before = path.read_bytes()
    path.unlink()
    assert opened(tmp_path) == LENGTHS
    assert path.read_bytes() == before


def test_index_of_another_tar_is_not_trusted(tmp_path: Path) -> None:
    """Neither a copy, nor one that claims to be that of this tar."""
    write(tmp_path, documents(LENGTHS))
    first, second = (index_path(tar) for tar in sorted(tmp_path.glob("*.tar"))[:2])
    ours, other = load_index(first), load_index(second)
    assert ours is not None
    assert other is not None
    for forged in (other, replace(other, tar_mtime_ns=ours.tar_mtime_ns)):
        save_index(forged, first)
        assert opened(tmp_path) == LENGTHS
        healed = load_index(first)
        assert healed is not None
        assert healed.sha256 == ours.sha256


def test_index_survives_a_copy_but_not_a_change_of_the_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, documents([30, 40]))
    tar = tmp_path / "train-000000.tar"
    os.utime(tar, ns=(1, 1))

    def refuse(tar: Path) -> None:
        raise AssertionError("the same bytes need no new index")

    with monkeypatch.context() as patched:
        patched.setattr(index_module, "build_index", refuse)
        assert opened(tmp_path) == [30, 40]
        kept = load_index(index_path(tar))
        assert kept is not None
        assert kept.tar_mtime_ns == 1
    other = tmp_path / "other"
    write(other, documents([40, 30]))
    tar.write_bytes((other / tar.name).read_bytes())
    with pytest.raises(ArtefactError, match=r"train-000000.tar: other contents than the manifest says \(sha256\)"):
        opened(tmp_path)


def test_no_damage_to_an_index_passes(tmp_path: Path) -> None:
    write(tmp_path, documents([30, 40]))
    path = tmp_path / "train-000000.index"
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        assert load_index(path) is None, place
    for size in (0, 5, 16, 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert load_index(path) is None, size
    assert opened(tmp_path) == [30, 40]
    assert path.read_bytes() == whole


def test_read_only_folder_costs_a_rebuild_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    write(tmp_path, documents([30, 40]))
    tar = tmp_path / "train-000000.tar"
    index_path(tar).unlink()
    monkeypatch.setattr(index_module.os, "access", lambda path, mode: False)
    assert opened(tmp_path) == [30, 40]
    assert not index_path(tar).exists()
    assert "not writable" in caplog.text


def _tar_of(path: Path, parts: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in parts.items():
            source = path.with_name("part")
            source.write_bytes(content)
            archive.add(source, arcname=f"000.{name}")
    return path


def _parts(tar: Path) -> dict[str, bytes]:
    """The first member of a tar."""
    with tarfile.open(tar) as archive:
        infos = [info for info in archive if info.name.startswith("000000-000000.")]
        return {info.name.partition(".")[2]: archive.extractfile(info).read() for info in infos}  # pyright: ignore


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


class _Bomb:
    def __reduce__(self):
        return pytest.fail, ("something was unpickled",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens.npy": None}, "has no tokens.npy"),
        ({"meta.json": b"["}, "damaged"),
        ({"meta.json": b"[]"}, "damaged"),
        ({"meta.json": b'{"languages": {}}'}, "damaged"),
        ({"tokens.npy": b"no array"}, "damaged"),
        ({"tokens.npy": _npy(np.zeros(9, np.int64))}, "expected a row of uint16 or uint32"),
        ({"tokens.npy": _npy(np.zeros((3, 3), np.uint16))}, "expected a row of uint16 or uint32"),
        ({"tokens.npy": _npy(np.zeros(9, np.uint16))[:-1]}, "cut short"),
        ({"lengths.npy": _npy(np.array([1, 2, 3], np.uint32))}, "different lengths"),
        ({"mask.npy": _npy(np.zeros(3, np.uint8))}, "loss mask of another length"),
        ({"tokens.npy": _npy(np.array([_Bomb()], object))}, "expected a row of uint16 or uint32"),
        ({"lengths.npy": pickle.dumps(_Bomb())}, "damaged"),
    ],
)
def test_tars_that_are_no_shards_are_refused(tmp_path: Path, change: dict[str, bytes | None], message: str) -> None:
    write(tmp_path / "good", documents([9, 8, 7]), documents_per_member=8)
    parts = _parts(tmp_path / "good" / "train-000000.tar") | change
    tar = _tar_of(tmp_path / "train-000000.tar", {k: v for k, v in parts.items() if v is not None})
    with pytest.raises(ArtefactError, match=message) as error:
        build_index(tar)
    assert str(tar) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tar_cut_anywhere_is_refused_or_refuted(tmp_path: Path) -> None:
    """Cut inside a member: the index cannot be built. Cut between members: the manifest knows the size."""
    write(tmp_path, documents([9, 8, 7]), documents_per_member=1)
    tar = tmp_path / "train-000000.tar"
    whole = tar.read_bytes()
    for size in range(100, len(whole), 997):
        tar.write_bytes(whole[:size])
        with pytest.raises(ArtefactError):
            TokenCorpus.open(tmp_path, "train")


def test_parts_may_come_in_any_order(tmp_path: Path) -> None:
    """A tar repacked by another tool is as good."""
    write(tmp_path / "good", documents([9, 8, 7]), documents_per_member=8)
    parts = _parts(tmp_path / "good" / "train-000000.tar")
    tar = _tar_of(tmp_path / "train-000000.tar", dict(sorted(parts.items(), reverse=True)))
    write_manifest(tmp_path, Manifest(RECIPE, {"train": Split((shard_of(tar, build_index(tar), 0),))}, {}))
    opened = TokenCorpus.open(tmp_path, "train")
    assert np.array_equal(opened.tokens(1, 0, 8), documents([9, 8, 7])[1].tokens)


def test_languages_keep_their_names_whatever_their_codes(tmp_path: Path) -> None:
    """Codes are by first appearance in a tar; a corpus sorts the names of all its tars."""
    made = [replace(document, language=name) for document, name in zip(documents([9] * 4), "dacb", strict=True)]
    write(tmp_path, made, documents_per_member=1, shard_tokens=9)
    opened = TokenCorpus.open(tmp_path, "train")
    assert opened.languages == ["a", "b", "c", "d"]
    assert [opened.languages[code] for code in opened.language_codes] == list("dacb")


def test_index_round_trip(tmp_path: Path) -> None:
    write(tmp_path, [TokenizedDocument(np.array([1, 2], np.uint16), 1, "naïve\n", "s", "l")])
    index = build_index(tmp_path / "train-000000.tar")
    save_index(index, tmp_path / "copy.index")
    copy = load_index(tmp_path / "copy.index")
    assert copy is not None
    assert copy.languages == index.languages == ("naïve\n",)
    assert np.array_equal(copy.documents, index.documents)
    assert np.array_equal(copy.members, index.members)
