"""Corpora that somebody damaged or edited: training refuses it in a line with the place, or reads the right tokens."""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dist_lm.data import token_corpus
from dist_lm.data.index import load_index, save_index
from dist_lm.data.inspect import print_corpus
from dist_lm.data.manifest import index_path, manifest_path, read_manifest, shard_name, write_manifest
from dist_lm.data.split_index import BLOCK, split_index_path
from dist_lm.data.stream import SequenceStream
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import TokenizedDocument
from dist_lm.errors import ArtefactError, UserError
from tests.data.synthetic_corpus import documents, lengths, write

LENGTHS = lengths(300, 900)
TAR = "train-000000.tar"
BUILD = "stage=shards"
FINE, BAD = True, False


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good") / "code"
    return write(directory, documents(LENGTHS), documents(lengths(20, 900, 1), 1), 32, 40_000)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("other") / "code"
    return write(directory, documents(lengths(300, 900, 2), 2), documents([9]), 32, 40_000)


def trained(directory: Path, after_opening: Callable[[Path], object] = lambda directory: None) -> str:
    """The hash of all tokens of an epoch, read as a rank reads them."""
    corpus = TokenCorpus.open(directory, "train")
    TokenCorpus.open(directory, "val")
    after_opening(directory)
    digest = hashlib.sha256()
    options: dict[str, Any] = {"seq_len": 256, "global_batch": 8, "micro_batch": 8, "dp_rank": 0, "dp_size": 1}
    with SequenceStream(corpus, seed=0, pad_id=0, **options) as stream:
        for _ in range(stream.n_sequences // 8):
            digest.update(next(stream).micro_batches[0].tokens_BT.numpy().tobytes())
    return digest.hexdigest()


def inspected(directory: Path) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=400)
    whole = print_corpus(directory, console)
    return whole, console.file.getvalue()  # pyright: ignore


def same_time(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Changes the tar; its size and its time stay."""

    def changed(directory: Path) -> None:
        status = (directory / TAR).stat()
        change(directory)
        os.utime(directory / TAR, ns=(status.st_atime_ns, status.st_mtime_ns))

    return changed


def put(place: int, count: int, mask: int = 0xFF) -> Callable[[Path], None]:
    """Flips bits of `count` bytes of the tar."""

    def flip(directory: Path) -> None:
        with (directory / TAR).open("r+b") as file:
            file.seek(place)
            content = file.read(count)
            file.seek(place)
            file.write(bytes(byte ^ mask for byte in content))

    return flip


def edited(change: Callable[[dict[str, Any]], object], sign: bool = False) -> Callable[[Path], None]:
    """Edits the manifest, perhaps with the right checksum."""

    def edit(directory: Path) -> None:
        value = json.loads(manifest_path(directory).read_text())
        change(value)
        if sign:
            value.pop("checksum")
            text = json.dumps(value, sort_keys=True, ensure_ascii=False)
            value["checksum"] = hashlib.sha256(text.encode()).hexdigest()
        manifest_path(directory).write_text(json.dumps(value))

    return edit


def shards(value: dict[str, Any]) -> list[dict[str, Any]]:
    return value["splits"]["train"]["shards"]


def accepting(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Changes the tar, with a manifest that agrees in size and hash."""

    def changed(directory: Path) -> None:
        change(directory)
        content = (directory / TAR).read_bytes()
        new = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        edited(lambda value: shards(value)[0].update(new), sign=True)(directory)
        index_path(directory / TAR).unlink()

    return changed


def forge_index(directory: Path) -> None:
    """The documents of another tar under the time of this one."""
    own, another = (load_index(index_path(directory / name)) for name in (TAR, "train-000001.tar"))
    assert own is not None
    assert another is not None
    save_index(replace(another, tar_mtime_ns=own.tar_mtime_ns), index_path(directory / TAR))


def flip_index(directory: Path) -> None:
    content = bytearray(index_path(directory / TAR).read_bytes())
    content[-30] ^= 0xFF
    index_path(directory / TAR).write_bytes(content)


def a_folder(directory: Path) -> None:
    (directory / TAR).unlink()
    (directory / TAR).mkdir()


def foreign(directory: Path) -> None:
    """A webdataset tar of somebody else."""
    with tarfile.open(directory / TAR, "w") as archive:
        info = tarfile.TarInfo("sample.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))


def swap(directory: Path) -> None:
    first, second = directory / TAR, directory / "train-000001.tar"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def other_lengths(directory: Path) -> None:
    """Documents cut elsewhere: the sum of the lengths stays."""
    with tarfile.open(directory / TAR) as archive:
        place = next(info for info in archive if info.name.endswith("lengths.npy")).offset_data + 128
    with (directory / TAR).open("r+b") as file:
        file.seek(place)
        first, second = np.frombuffer(file.read(8), "<u4")
        file.seek(place)
        file.write(np.array([first + 1, second - 1], "<u4").tobytes())


def without_index_of_split(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Changes the tar, before anybody has read it."""

    def changed(directory: Path) -> None:
        change(directory)
        split_index_path(directory, "train").unlink()

    return changed


def rewrite(made: list[TokenizedDocument]) -> Callable[[Path], None]:
    def written(directory: Path) -> None:
        shutil.rmtree(directory)
        write(directory, made, made, 32, 10**9, vocab_size=4096)

    return written


def document(tokens: np.ndarray) -> TokenizedDocument:
    return TokenizedDocument(tokens.astype(np.uint16), 3 * len(tokens), "python", "s:1", "MIT")


EDITED = r"manifest\.json is damaged .*edited"
# name, what somebody does, whether training goes on or what its error says, whether `data inspect` finds all well
CASES: list[tuple[str, Callable[[Path], object], str, bool]] = [
    ("s00_good", lambda d: None, "", FINE),
    ("s01_truncated", lambda d: os.truncate(d / TAR, (d / TAR).stat().st_size // 2), f"{TAR}: .*bytes, expected", BAD),
    ("s02_flipped", put(3000, 400), f"{TAR}: other contents", BAD),
    ("s03_flipped_same_time", same_time(put(20_000, 400)), f"{TAR}: bytes .*documents 0 to 31.* CRC-32", BAD),
    ("s03a_not_in_tokens", same_time(put(3000, 400)), "", BAD),
    ("s03b_one_bit", same_time(put(24_000, 1, 1)), f"{TAR}: bytes .* CRC-32", BAD),
    ("s04_index_of_another", lambda d: shutil.copy2(index_path(d / "train-000001.tar"), index_path(d / TAR)), "", FINE),
    ("s05_index_forged", forge_index, "", FINE),
    ("s06_index_flipped", flip_index, "", FINE),
    ("s07_index_empty", lambda d: index_path(d / TAR).write_bytes(b""), "", FINE),
    ("s08_tokenizer", edited(lambda v: v.update(tokenizer_sha256="y" * 64)), EDITED, BAD),
    ("s09_shard_removed", edited(lambda v: shards(v).pop(0)), EDITED, BAD),
    ("s09b_signed", edited(lambda v: shards(v).pop(0), True), f"000001.tar', expected {TAR}", BAD),
    ("s10_counts", edited(lambda v: shards(v)[0]["counts"].update(tokens=10**12)), EDITED, BAD),
    ("s10b_signed", edited(lambda v: shards(v)[0]["counts"].update(tokens=9), True), f"{TAR}: other documents", BAD),
    ("s11_shard_twice", edited(lambda v: shards(v).append(shards(v)[0])), EDITED, BAD),
    ("s11b_signed", edited(lambda v: shards(v).append(shards(v)[0]), True), f"named '{TAR}', expected", BAD),
    ("s12_traversal", edited(lambda v: shards(v)[0].update(name=f"../../good/{TAR}")), EDITED, BAD),
    ("s12b_signed", edited(lambda v: shards(v)[0].update(name=f"../../good/{TAR}"), True), "good/.* expected", BAD),
    ("s13_size_as_text", edited(lambda v: shards(v)[0].update(size=str(shards(v)[0]["size"])), True), "form", BAD),
    ("s14_split_list", edited(lambda v: v["splits"].update(train=[]), True), "is damaged", BAD),
    ("s15_no_json", lambda d: manifest_path(d).write_text("{"), "is damaged", BAD),
    ("s16_list", lambda d: manifest_path(d).write_text("[]"), "is damaged", BAD),
    ("s17_empty_tar", lambda d: (d / TAR).write_bytes(b""), f"{TAR}: 0 bytes, expected", BAD),
    ("s18_empty_tar_accepted", accepting(lambda d: (d / TAR).write_bytes(b"")), f"{TAR} is damaged", BAD),
    ("s19_no_documents", rewrite([]), "has no train documents", BAD),
    ("s20_one_document", rewrite([document(np.r_[0, 20 + np.arange(50_000) % 4000])]), "", FINE),
    ("s21_shorter_than_a_sequence", rewrite([document(np.array([0, 30, 31]))]), "one sequence of", FINE),
    ("s22_past_the_vocabulary", rewrite([document(np.arange(9000))]), f"{TAR}: .*hold token 8999, .*4095", BAD),
    ("s23_missing", lambda d: (d / TAR).unlink(), f"{TAR}: missing", BAD),
    ("s24_a_folder", a_folder, f"{TAR}: missing", BAD),
    ("s25_gzip", lambda d: (d / TAR).write_bytes(gzip.compress((d / TAR).read_bytes())), f"{TAR}: .*expected", BAD),
    ("s26_foreign", accepting(foreign), f"{TAR}: member sample has no tokens.npy", BAD),
    ("s29_touched", lambda d: os.utime(d / TAR), "", FINE),
    ("s30_extra_tar", lambda d: shutil.copy2(d / TAR, d / "train-000099.tar"), "", BAD),
    ("s31_swapped", swap, f"{TAR}: ", BAD),
    ("s32_lengths", same_time(other_lengths), "", BAD),
    ("s33_lengths_are_read_again", without_index_of_split(same_time(other_lengths)), f"{TAR}: bytes .* CRC-32", BAD),
    ("s34_index_of_split_empty", lambda d: split_index_path(d, "train").write_bytes(b""), "", FINE),
    ("s35_index_of_split_of_val", lambda d: shutil.copy2(d / "val.index", d / "train.index"), "", FINE),
]


@pytest.mark.parametrize(("change", "said", "whole"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_training_and_inspect(
    tmp_path: Path, good: Path, change: Callable[[Path], object], said: str, whole: bool
) -> None:
    directory = tmp_path / "code"
    expected = trained(good)
    shutil.copytree(good, directory)
    change(directory)
    if said:
        with pytest.raises(ArtefactError, match=said) as refused:
            trained(directory)
        assert str(directory) in str(refused.value)
        assert "\n" not in str(refused.value)
    else:
        found = trained(directory)
        assert found == expected or read_manifest(directory).content != read_manifest(good).content
    try:
        seen, text = inspected(directory)
    except UserError as error:
        seen, text = False, str(error)
        assert "\n" not in text
    assert seen == whole, text
    if not whole:
        assert re.search(r"train-0000\d\d\.tar|manifest\.json|train documents", text)


def truncate(directory: Path) -> None:
    for tar in directory.glob("train-*.tar"):
        os.truncate(tar, 512)


def remove(directory: Path) -> None:
    for tar in directory.glob("train-*.tar"):
        tar.unlink()


@pytest.mark.parametrize(
    ("harm", "said"), [(truncate, r"\.tar: ends at byte 512 of"), (remove, r"\.tar: cannot be read at byte .*No such")]
)
def test_a_tar_that_shrinks_or_goes_while_training_is_named(
    tmp_path: Path, good: Path, harm: Callable[[Path], None], said: str
) -> None:
    """s27 (was a SIGBUS) and s28."""
    directory = tmp_path / "code"
    shutil.copytree(good, directory)
    with pytest.raises(ArtefactError, match=said):
        trained(directory, harm)


def test_a_tar_that_is_replaced_while_training_is_named(
    tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "code"
    shutil.copytree(good, directory)
    monkeypatch.setattr(token_corpus, "OPEN_TARS", 1)
    corpus = TokenCorpus.open(directory, "train")
    last = corpus.n_documents - 1
    corpus.tokens(0, 0, 1)
    corpus.tokens(last, 0, 1)
    (tmp_path / "new").write_bytes((directory / TAR).read_bytes())
    (tmp_path / "new").replace(directory / TAR)
    with pytest.raises(ArtefactError, match=f"{TAR}: was replaced"):
        corpus.tokens(0, 0, 1)


READS_ALL = """
import resource, sys
from pathlib import Path
from dist_lm.data.token_corpus import TokenCorpus

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
corpus = TokenCorpus.open(Path(sys.argv[1]), "train")
tokens = [corpus.tokens(number, 0, 9).tolist() for _ in range(2) for number in range(corpus.n_documents)]
assert all(one == tokens[0] for one in tokens)
print(corpus.n_documents)
"""


@pytest.mark.heavy
def test_more_tars_than_descriptors(tmp_path: Path) -> None:
    """1,371 tars (links to one), read twice by a process that may open 256 files."""
    directory = write(tmp_path / "code", documents([9]), documents([9]))
    manifest = read_manifest(directory)
    (shard,) = manifest.splits["train"].shards
    shards = [replace(shard, name=shard_name("train", number)) for number in range(1371)]
    for one in shards[1:]:
        for path in (Path(shard.name), index_path(Path(shard.name))):
            os.link(directory / path, directory / path.with_stem(Path(one.name).stem))
    train = replace(manifest.splits["train"], shards=tuple(shards))
    write_manifest(directory, replace(manifest, splits={**manifest.splits, "train": train}))
    command = [sys.executable, "-c", READS_ALL, str(directory)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "1371", found.stderr


def test_descriptors_are_closed_with_the_corpus(good: Path) -> None:
    used = len(list(Path("/proc/self/fd").iterdir()))
    corpus = TokenCorpus.open(good, "train")
    corpus.check()
    assert len(list(Path("/proc/self/fd").iterdir())) > used
    del corpus
    assert len(list(Path("/proc/self/fd").iterdir())) <= used


def test_a_member_is_read_whole_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds a corpus whose members every process reads whole, as 63 of 64 ranks would for nothing."""
    directory = write(tmp_path / "code", documents(LENGTHS), documents([9]), 32, 40_000)
    sizes = []
    read = token_corpus._Tars.read
    monkeypatch.setattr(
        token_corpus._Tars, "read", lambda tars, tar, offset, size: sizes.append(size) or read(tars, tar, offset, size)
    )
    longest_read = []
    for _ in range(2):  # two corpora, as two processes have them
        corpus = TokenCorpus.open(directory, "train")
        sizes.clear()
        for number in range(corpus.n_documents):
            corpus.tokens(number, 0, 1)
            corpus.mask(number, 0, 1)
        longest_read.append(sorted(sizes)[-corpus._index.n_members :])
    whole, parts = longest_read
    assert min(whole) > 10 * BLOCK > 10 * max(parts) - 1
    assert len(whole) > 5
