"""The documents of a split in one mapped file: as the tars have them, whatever happens to that file."""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.data import split_index
from dist_lm.data.index import load_index
from dist_lm.data.manifest import index_path, read_manifest
from dist_lm.data.split_index import BLOCK, CACHED_UNITS, UNIT, SplitIndex, split_index_path, unit_begins
from dist_lm.data.token_corpus import TokenCorpus
from tests.data.synthetic_corpus import documents, lengths, write

LENGTHS = lengths(90, 700)


def written(directory: Path) -> Path:
    return write(directory, documents(LENGTHS, masked=True), documents_per_member=16, shard_tokens=12_000)


def content(directory: Path) -> list[list[list[int]]]:
    """Tokens, masks and languages of all documents."""
    corpus = TokenCorpus.open(directory, "train")
    assert corpus.lengths.tolist() == LENGTHS
    read = [(corpus.tokens(i, 0, n).tolist(), corpus.mask(i, 0, n).tolist()) for i, n in enumerate(LENGTHS)]
    return [*map(list, read), [[code] for code in corpus.language_codes.tolist()]]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=300), min_size=1, max_size=4))
def test_units_hold_whole_repositories(members: list[list[bool]]) -> None:
    """Finds units that mix a part of a repository with others, or that no unit of it follows."""
    continues = np.concatenate([np.array(member) for member in members])
    sizes = [len(member) for member in members]
    member_begins = np.cumsum(sizes) - sizes
    begins = unit_begins(continues, member_begins)
    ends = np.append(begins[1:], len(continues))
    assert begins[0] == 0
    assert (ends > begins).all()
    assert (ends - begins).max() <= UNIT
    assert set(member_begins) <= set(begins)  # no unit is of two members

    borders = {*np.flatnonzero(~continues).tolist(), len(continues)}
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        if begin not in borders:  # a part of a repository stands alone
            assert not borders & set(range(begin + 1, end))
        if end not in borders and end not in member_begins:  # only a long repository is cut
            assert not borders & set(range(begin + 1, end))
            assert end - begin == UNIT


def test_columns_are_those_of_the_tars(tmp_path: Path) -> None:
    """Finds a column in another order, or languages that keep the codes of their tar."""
    written(tmp_path)
    corpus = TokenCorpus.open(tmp_path, "train")
    tars = [tmp_path / shard.name for shard in read_manifest(tmp_path).splits["train"].shards]
    indices = [index for tar in tars if (index := load_index(index_path(tar)))]
    assert len(indices) == len(tars) > 2
    expected = np.concatenate([index.documents for index in indices])
    for column, name in ((corpus.lengths, "length"), (corpus.n_bytes, "n_bytes"), (corpus.continues, "continues")):
        assert column.tolist() == expected[name].tolist(), name
    names = [index.languages[code] for index in indices for code in index.documents["language"].tolist()]
    assert [corpus.languages[code] for code in corpus.language_codes.tolist()] == names


def test_units_in_memory_are_bounded_even_if_threads_have_passed_the_bound(tmp_path: Path) -> None:
    """Finds units that are never dropped again after two threads, each below the bound, have added one at once."""
    index = TokenCorpus.open(written(tmp_path), "train")._index
    index._unit_ends = {-number: [] for number in range(1, CACHED_UNITS + 2)}
    assert index.unit_ends(1) == index.unit_ends(1)
    assert len(index._unit_ends) <= CACHED_UNITS


@pytest.mark.heavy
def test_no_damage_to_the_file_changes_what_is_read(tmp_path: Path) -> None:
    """Finds a byte of the file that no checksum covers."""
    path = split_index_path(written(tmp_path), "train")
    expected = content(tmp_path)
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 31), *range(len(whole) - 16, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        assert content(tmp_path) == expected, place
    for size in (0, 5, 16, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert content(tmp_path) == expected, size


@pytest.mark.parametrize("name", ["lengths", "languages", "unit_token", "checksums"])
def test_a_damaged_column_is_made_again(tmp_path: Path, name: str) -> None:
    """Finds a column that is believed because the file opened."""
    path = split_index_path(written(tmp_path), "train")
    expected = content(tmp_path)
    whole = path.read_bytes()
    place = TokenCorpus.open(tmp_path, "train")._index._header["columns"][name]["offset"]
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert content(tmp_path) == expected
    assert content(tmp_path) == expected  # whatever was made again, the checksums of all blocks are known now
    assert path.read_bytes() == whole


def test_a_folder_that_is_not_writable_gets_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds an index of a split that read-only corpora cannot be opened without."""
    written(tmp_path)
    monkeypatch.setattr(split_index.os, "access", lambda path, mode: False)
    first = content(tmp_path)
    assert not split_index_path(tmp_path, "train").exists()
    monkeypatch.undo()
    assert content(tmp_path) == first


def test_the_file_of_another_user_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds users of one folder who make the file of each other again whenever they begin."""
    path = split_index_path(written(tmp_path), "train")
    expected = content(tmp_path)
    inode, really_open, really_access = path.stat().st_ino, os.open, os.access

    def open_for_reading(name: Any, flags: int, *mode: int) -> int:
        if Path(name) == path and flags & os.O_RDWR:
            raise PermissionError
        return really_open(name, flags, *mode)

    monkeypatch.setattr(split_index.os, "open", open_for_reading)
    monkeypatch.setattr(split_index.os, "access", lambda name, mode: Path(name) != path and really_access(name, mode))
    assert content(tmp_path) == expected
    assert path.stat().st_ino == inode


def test_a_tar_that_is_touched_while_the_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds a process that ends because a neighbour saved the index of a tar at the same time."""
    path = split_index_path(written(tmp_path), "train")
    expected = content(tmp_path)
    path.unlink()
    write_file, tar = SplitIndex._write, next(tmp_path.glob("train-*.tar"))

    def write_and_touch(index: SplitIndex, descriptor: int) -> None:
        write_file(index, descriptor)
        os.utime(tar, ns=(1, 1))

    monkeypatch.setattr(SplitIndex, "_write", write_and_touch)
    assert content(tmp_path) == expected
    assert not list(tmp_path.glob(".*.tmp"))


def test_of_several_nodes_the_first_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds a node that replaces a file which others have mapped; on a network file system that ends them."""
    path = split_index_path(written(tmp_path), "train")
    monkeypatch.setattr(split_index, "_locked", lambda directory: contextlib.nullcontext())  # a lock of one node
    write_file, first = SplitIndex._write, []

    def write_more_slowly(index: SplitIndex, descriptor: int) -> None:
        write_file(index, descriptor)
        monkeypatch.setattr(SplitIndex, "_write", write_file)
        if not first:
            first.append(TokenCorpus.open(tmp_path, "train"))
            first.append(path.stat().st_ino)

    monkeypatch.setattr(SplitIndex, "_write", write_more_slowly)
    assert TokenCorpus.open(tmp_path, "train").lengths.tolist() == LENGTHS
    assert path.stat().st_ino == first[1]
    assert not list(tmp_path.glob(".*.tmp"))


def test_damage_that_several_ranks_find_is_mended_once(tmp_path: Path) -> None:
    """Finds ranks that each remove the file which another has just made."""
    path = split_index_path(written(tmp_path), "train")
    ranks = [TokenCorpus.open(tmp_path, "train") for _ in range(3)]
    offset = ranks[0]._index._header["columns"]["lengths"]["offset"]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff\x01")
    inodes = []
    for corpus in ranks:
        assert corpus.lengths.tolist() == LENGTHS
        inodes.append(path.stat().st_ino)
    assert len(set(inodes)) == 1


def test_what_is_read_is_little_more_than_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds documents that are read one behind the other, but a block of their border twice."""
    directory = write(tmp_path, documents(LENGTHS), documents_per_member=16, shard_tokens=12_000)
    corpus = TokenCorpus.open(directory, "train")
    corpus.check()
    sizes = []
    read = corpus._tars.read
    monkeypatch.setattr(corpus._tars, "read", lambda tar, at, size: sizes.append(size) or read(tar, at, size))
    for document, length in enumerate(LENGTHS):
        corpus.tokens(document, 0, length)
    assert sum(sizes) == 2 * sum(LENGTHS)  # no byte twice
    sizes.clear()
    corpus.tokens(0, LENGTHS[0] - 2, LENGTHS[0])
    assert sum(sizes) <= BLOCK
