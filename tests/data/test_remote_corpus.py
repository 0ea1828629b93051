"""Corpora whose tars stay behind http or s3: the data of a local corpus, whatever happens to cache, server and tars."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_lm.data import attach as attaching
from dist_lm.data import piece_cache, remote_corpus
from dist_lm.data import stream as stream_module
from dist_lm.data.attach import attach, tokenizer_note
from dist_lm.data.inspect import verify
from dist_lm.data.journal import REJECTED
from dist_lm.data.manifest import (
    Split,
    index_path,
    manifest_path,
    read_manifest,
    remote_path,
    shard_name,
    write_manifest,
)
from dist_lm.data.piece_cache import PieceCache
from dist_lm.data.sources import http_file
from dist_lm.data.split_index import split_index_path
from dist_lm.data.stream import SequenceStream
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.data.unit_order import WindowEpoch
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.stages.shards.identity import is_whole
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from tests.data.file_server import Served
from tests.data.synthetic_corpus import documents, lengths, write
from tests.data.test_remote_sources import bucket, upload  # noqa: F401  a fixture
from tests.data.test_stream import SETTINGS, assert_same, joined, take
from tests.patience import patient

LENGTHS = lengths(60, 300)
PIECE = 4096
DEADLINE_S = patient(60)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_corpus, "PIECE", PIECE)
    monkeypatch.setattr(attaching, "LEAST_CACHE", 2 * PIECE)
    monkeypatch.setattr(http_file, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote_corpus, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote_corpus, "LONGEST_WAIT_S", 0.01)
    monkeypatch.setattr(remote_corpus, "START_S", 0.2)


@pytest.fixture
def local(served: Served) -> Path:
    """A corpus of three tars or more behind http."""
    return write(served.folder / "remote", documents(LENGTHS), val=documents([20, 30], 1), shard_tokens=3000)


@pytest.fixture
def attached(served: Served, local: Path) -> Path:
    folder = local.parent / "work" / "corpora" / "far"
    attach(f"{served.url}/remote", folder, local.parent / "cache", 100 * PIECE)
    return folder


def tokens_of(folder: Path) -> list[list[int]]:
    corpus = TokenCorpus.open(folder, "train")
    return [corpus.tokens(i, 0, n).tolist() for i, n in enumerate(corpus.lengths.tolist())]


def cached_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.iterdir() if path.name != piece_cache.TOTAL)


@pytest.mark.parametrize("order", ["documents", "units", "windows"])
def test_batches_are_those_of_the_local_corpus(local: Path, attached: Path, order: str) -> None:
    """Finds a remote read of other bytes, or a moved order, at two ranks over the end of an epoch."""
    for rank in range(2):
        settings: dict[str, Any] = {"order": order, "dp_rank": rank, "dp_size": 2, "seq_len": 64}
        far = take(TokenCorpus.open(attached, "train"), 14, **settings)
        near = take(TokenCorpus.open(local, "train"), 14, **settings)
        assert [data.position for data in far] == [data.position for data in near]
        assert_same(joined(far), joined(near))


def test_conversations_are_those_of_the_local_corpus(served: Served, tmp_path: Path) -> None:
    """Finds a mask that is read from another place of the remote tar."""
    near = write(tmp_path / "masked", documents(LENGTHS, masked=True), shard_tokens=3000)
    attach(f"{served.url}/masked", tmp_path / "far", tmp_path / "cache", 100 * PIECE)
    steps = [take(TokenCorpus.open(folder, "train"), 3, seq_len=400) for folder in (near, tmp_path / "far")]
    assert_same(*map(joined, steps))


@pytest.mark.heavy
def test_a_corpus_in_a_bucket(local: Path, bucket: str) -> None:  # noqa: F811
    """Finds a store that is read otherwise than http, and a tar that was replaced in a bucket."""
    upload(bucket, {f"lab/code/{path.name}": path.read_bytes() for path in local.iterdir()})
    far = local.parent / "far"
    attach(f"s3://{bucket}/lab/code", far, local.parent / "cache", 100 * PIECE)
    assert tokens_of(far) == tokens_of(local)

    tar = read_manifest(local).splits["train"].shards[0].name
    upload(bucket, {f"lab/code/{tar}": (local / tar).read_bytes()[:-1]})
    shutil.rmtree(local.parent / "cache")
    with pytest.raises(ArtefactError, match=rf"s3://.*/{tar}: changed since it was attached .*data attach` again"):
        tokens_of(far)


def test_a_cache_that_holds_the_corpus_fetches_each_piece_once(served: Served, local: Path, attached: Path) -> None:
    """Finds processes or epochs that do not share what was fetched."""
    served.sent.clear()
    for rank in range(2):
        take(TokenCorpus.open(attached, "train"), 20, seq_len=64, dp_rank=rank, dp_size=2)
    assert sum(served.sent) <= sum(shard.size for shard in read_manifest(local).splits["train"].shards)


def test_a_small_cache_never_passes_its_limit(served: Served, local: Path) -> None:
    """Finds a cache that grows past its limit, or that drops what is about to be read and never gets on."""
    far, cache, most = local.parent / "far", local.parent / "cache", 4 * PIECE
    attach(f"{served.url}/remote", far, cache, most)
    sizes: list[int] = []
    served.before_body = lambda _: sizes.append(cached_bytes(cache) if cache.exists() else 0)
    assert tokens_of(far) == tokens_of(local)
    assert sum(shard.size for shard in read_manifest(local).splits["train"].shards) > most
    assert max(sizes) <= most
    assert cached_bytes(cache) <= most


@pytest.mark.heavy
def test_an_epoch_in_windows_fetches_little_more_than_the_corpus(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finds windows that the cache does not hold: it has a quarter of the corpus, of which at most 1.3 x is fetched."""
    monkeypatch.setattr(WindowEpoch, "chunk_tokens", 16 * PIECE // 2)
    monkeypatch.setattr(WindowEpoch, "window_tokens", 48 * PIECE // 2)
    near = write(tmp_path / "near", documents(lengths(8000, 200)), documents_per_member=64, shard_tokens=10**6)
    tar_bytes = sum(shard.size for shard in read_manifest(near).splits["train"].shards)
    attach(f"{served.url}/near", tmp_path / "far", tmp_path / "cache", tar_bytes // 4)
    served.sent.clear()
    corpus = TokenCorpus.open(tmp_path / "far", "train")
    settings: dict[str, Any] = {"order": "windows", "seq_len": 512, "global_batch": 8}
    take(corpus, corpus.n_tokens // 512 // 8, **settings)
    assert sum(served.sent) <= 1.3 * tar_bytes


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_piece_is_fetched_again_once(served: Served, local: Path, attached: Path, damage: str) -> None:
    """Finds damage of the cache that is trained on, that ends a run, or that is asked for without end."""
    expected = tokens_of(local)
    assert tokens_of(attached) == expected
    pieces = [path for path in (local.parent / "cache").iterdir() if path.name != piece_cache.TOTAL]
    for path in pieces:
        content = path.read_bytes()
        wrong = {"flipped": bytes(byte ^ 1 for byte in content), "cut": content[:-1], "empty": b""}
        path.write_bytes(wrong[damage])
    served.sent.clear()
    assert tokens_of(attached) == expected
    assert len(served.sent) <= 2 * len(pieces)  # a member on a border brings both of its pieces again


def test_a_tar_that_is_damaged_behind_its_server_is_an_error(served: Served, local: Path) -> None:
    """Finds wrong bytes of a server that are trained on, or that are asked for more than twice."""
    tar = local / read_manifest(local).splits["train"].shards[0].name
    content = bytearray(tar.read_bytes())
    content[5000] ^= 1
    content[1500:3000] = bytes(byte ^ 1 for byte in content[1500:3000])
    tar.write_bytes(content)
    far = local.parent / "far"
    attach(f"{served.url}/remote", far, local.parent / "cache", 100 * PIECE)
    with pytest.raises(ArtefactError, match=rf"{tar.name}: bytes .* are damaged: .*upload an intact copy"):
        tokens_of(far)
    states = verify(far, read_manifest(far))
    assert states.pop(tar.name) != "ok"
    assert set(states.values()) == {"ok"}


def test_a_tar_that_changed_is_named(served: Served, local: Path, attached: Path) -> None:
    """Finds pieces of two versions of a tar in one run; the same bytes under another ETag are attached again."""
    tar = local / read_manifest(local).splits["train"].shards[0].name
    content = tar.read_bytes()
    tar.write_bytes(content[:-1] + b"\1")
    with pytest.raises(ArtefactError, match=rf"{tar.name}: changed since it was attached \(ETag"):
        tokens_of(attached)
    tar.write_bytes(content)
    served.etags = False
    attach(f"{served.url}/remote", attached, local.parent / "cache", 100 * PIECE)
    assert tokens_of(attached) == tokens_of(local)


def test_lost_connections(served: Served, local: Path, attached: Path) -> None:
    """Finds a broken answer that ends a run, and an error without the tar when the server stays away."""
    served.break_after = 100
    assert tokens_of(attached) == tokens_of(local)
    assert served.break_after == -1

    shutil.rmtree(local.parent / "cache")
    served.fails = 503
    corpus = TokenCorpus.open(attached, "train")
    with pytest.raises(ArtefactError, match=r"train-000000.tar: cannot be read \(.*503.*from its last checkpoint"):
        corpus.tokens(0, 0, 1)
    stream = SequenceStream(corpus, seed=0, seq_len=64, global_batch=4, micro_batch=2, dp_rank=0, dp_size=1)
    with stream, pytest.raises(ArtefactError, match="cannot be read"):
        next(stream)


def empty(cache: Path) -> None:
    """Remove all pieces, though a thread of a stream that was closed may still rename or remove one meanwhile."""
    for piece in cache.glob("*-*"):
        piece.unlink(missing_ok=True)


def test_a_run_waits_while_the_server_is_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, served: Served, local: Path, attached: Path
) -> None:
    """Finds an outage that ends a run, changes its data, counts as a hang or floods the log, and one without an end."""
    monkeypatch.setattr(stream_module, "ALIVE_S", 0.05)
    monkeypatch.setattr(remote_corpus, "OUTAGE_S", DEADLINE_S)
    signs: list[int] = []

    def alive() -> None:
        signs.append(served.fails)
        if len(signs) == 3:
            served.fails = 0  # the server comes back

    expected = take(TokenCorpus.open(local, "train"), 30)
    with SequenceStream(TokenCorpus.open(attached, "train"), **SETTINGS) as stream:
        steps = []
        for number in range(30):
            if number == 3:
                served.fails = 503
                empty(local.parent / "cache")
            stream.wait(alive)
            steps.append(next(stream))
    assert_same(joined(steps), joined(expected))
    assert signs[:3] == [503] * 3
    assert sum("asked again" in record.getMessage() for record in caplog.records) == 1

    # A run that ends meanwhile waits no longer: the test would take `OUTAGE_S`.
    with SequenceStream(TokenCorpus.open(attached, "train"), **SETTINGS) as stream:
        next(stream)
        served.fails = 503
        empty(local.parent / "cache")
        while stream._steps[-1].done():
            next(stream)
    served.fails = 0

    # It does not wait for ever, neither in a run nor at its start.
    for most in ("OUTAGE_S", "START_S"):
        monkeypatch.setattr(remote_corpus, most, 0.01)
    empty(local.parent / "cache")
    served.fails = 503
    with pytest.raises(ArtefactError, match=r"cannot be read \(.*503.*from its last checkpoint"):
        tokens_of(attached)


def test_what_cannot_be_attached(served: Served, local: Path, attached: Path) -> None:
    """Finds credentials on disk, half attached folders, and a local corpus that is replaced."""
    cache = local.parent / "cache"
    for url in ("http://me:pw@host/corpus", "s3://bucket/corpus?X-Amz-Signature=1", "https://host/c?token=1"):
        with pytest.raises(ConfigError, match="credentials come from the environment") as refused:
            attach(url, local.parent / "new", cache, 100 * PIECE)
        assert url.partition("://")[2] not in str(refused.value)
    for url in ("ftp://host/corpus", str(local), "s3://", "https:///"):
        with pytest.raises(ConfigError, match="a folder behind http, https, s3, gs"):
            attach(url, local.parent / "new", cache, 100 * PIECE)
    with pytest.raises(ConfigError, match="--cache-gib"):
        attach(f"{served.url}/remote", local.parent / "new", cache, PIECE)
    with pytest.raises(ArtefactError, match="taken by a corpus that is not attached"):
        attach(f"{served.url}/remote", local, cache, 100 * PIECE)
    write(served.folder / "other", documents([30, 40], 5))
    with pytest.raises(ArtefactError, match="attached to another corpus"):
        attach(f"{served.url}/other", attached, cache, 100 * PIECE)

    with pytest.raises(ArtefactError, match=r"404.*: check the URL.*; expected the URL of a copy of work/corpora/NAME"):
        attach(f"{served.url}/remotee", local.parent / "new", cache, 100 * PIECE)
    (served.folder / "page").mkdir()
    (served.folder / "page" / "manifest.json").write_text("<html>")
    with pytest.raises(ArtefactError, match="no manifest of a corpus") as refused:
        attach(f"{served.url}/page", local.parent / "new", cache, 100 * PIECE)
    assert ".tmp" not in str(refused.value)

    index_path(local / "train-000001.tar").unlink()
    with pytest.raises(ArtefactError, match=r"train-000001.index: cannot be read \(.*404.*a copy of all files"):
        attach(f"{served.url}/remote", local.parent / "new", cache, 100 * PIECE)
    served.ranges = False
    with pytest.raises(ArtefactError, match=r"sends no parts of files.*copy the corpus into work/corpora"):
        attach(f"{served.url}/remote", local.parent / "new", cache, 100 * PIECE)
    assert not (local.parent / "new").exists()
    assert not list(local.parent.glob(".new*"))


def test_the_tokenizer_that_a_work_directory_needs(attached: Path) -> None:
    """Finds a user who learns of another tokenizer only when the training is refused."""
    manifest, work = read_manifest(attached), WorkDirectory(attached.parent.parent)
    assert "tokenizer=PATH" in tokenizer_note(manifest, work)
    work.tokenizer.mkdir()
    (work.tokenizer / "tokenizer.model").write_bytes(b"another")
    assert "another work directory" in tokenizer_note(manifest, work)
    same = replace(manifest, recipe=replace(manifest.recipe, tokenizer_sha256=durable.sha256_of(work.tokenizer_model)))
    assert tokenizer_note(same, work).endswith(f"as {work.tokenizer} holds")


def test_the_list_of_dropped_documents_comes_along(
    served: Served, local: Path, attached: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Finds `data where` without the near-duplicates that the build dropped, and a corpus refused for want of them."""
    assert not (attached / REJECTED).exists()
    (local / REJECTED).write_text('{"place": "b.py", "resembles": "a.py"}\n')
    attach(f"{served.url}/remote", attached, local.parent / "cache", 100 * PIECE)
    assert (attached / REJECTED).read_text() == (local / REJECTED).read_text()
    assert is_whole(attached)

    (local / REJECTED).unlink()
    caplog.clear()
    attach(f"{served.url}/remote", local.parent / "other", local.parent / "cache", 100 * PIECE)
    assert "names no near-duplicates" in caplog.text
    assert not (local.parent / "other" / REJECTED).exists()


def test_a_strangers_manifest_writes_no_file_elsewhere(served: Served, local: Path, tmp_path: Path) -> None:
    """Finds names of files that lead out of the attached folder."""
    manifest = read_manifest(local)
    name = "../train"
    shards = [replace(shard, name=shard_name(name, i)) for i, shard in enumerate(manifest.splits["train"].shards)]
    write_manifest(local, replace(manifest, splits={name: Split(tuple(shards))}))
    for path in local.iterdir():
        shutil.copy(path, served.folder)  # where the server looks for them

    folder = tmp_path / "own" / "corpora" / "far"
    with pytest.raises(ArtefactError, match=r"a split is named '\.\./train'"):
        attach(f"{served.url}/remote", folder, tmp_path / "cache", 100 * PIECE)
    assert not list(folder.parent.iterdir())


def test_a_build_never_replaces_an_attached_corpus(served: Served, local: Path, attached: Path) -> None:
    """Finds stage=shards that takes a damaged attached folder for an unfinished build."""
    assert is_whole(attached)
    split_index_path(attached, "train").unlink()
    (index_path(attached / "train-000000.tar")).write_bytes(b"damaged")
    with pytest.raises(ArtefactError, match="run `dist-lm data attach` again"):
        is_whole(attached)
    attach(f"{served.url}/remote", attached, local.parent / "cache", 100 * PIECE)
    assert is_whole(attached)

    record = json.loads(remote_path(attached).read_text())
    remote_path(attached).write_text(json.dumps(record | {"url": "http://127.0.0.1:9/other"}))
    with pytest.raises(ArtefactError, match=r"remote.json"):
        TokenCorpus.open(attached, "train")
    assert manifest_path(attached).is_file()


class AtOnce(Executor):
    """Does at once what a pool of threads would do later."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except ArtefactError as error:
            future.set_exception(error)
        return future


@pytest.mark.parametrize("masked", [False, True])
def test_pieces_are_fetched_before_their_steps_are_prepared(served: Served, tmp_path: Path, masked: bool) -> None:
    """Finds reading ahead that misses a piece of a later step, or that stops."""
    near = write(tmp_path / "near", documents(LENGTHS, masked=masked), shard_tokens=3000)
    far = tmp_path / "far"
    attach(f"{served.url}/near", far, tmp_path / "cache", 100 * PIECE)
    settings: dict[str, Any] = {"seed": 3, "seq_len": 300, "global_batch": 2, "micro_batch": 1}
    steps = stream_module.PREFETCH + stream_module.FETCHED_AHEAD
    expected = take(TokenCorpus.open(near, "train"), steps, **settings)

    def pool(workers: int, name: str, *arguments: Any) -> Executor:
        return AtOnce() if name == "fetch" else ThreadPoolExecutor(workers, name, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "ThreadPoolExecutor", pool)
        stream = SequenceStream(TokenCorpus.open(far, "train"), dp_rank=0, dp_size=1, **settings)
    with stream:
        first = next(stream)
        wait(stream._steps)  # the next steps are prepared
        asked = len(served.sent)
        served.fails = 503
        delivered = [first, *(next(stream) for _ in range(steps - 2))]
    assert len(served.sent) == asked
    assert_same(joined(delivered), joined(expected[: len(delivered)]))


# --- the cache ---


def test_a_piece_is_fetched_by_one_of_many_readers(tmp_path: Path) -> None:
    """Finds two threads that fetch one piece, which would bring a corpus as often as there are ranks."""
    fetched: list[int] = []
    started = threading.Barrier(8)

    def fetch() -> bytes:
        fetched.append(1)
        return b"x" * 100

    contents: list[bytes] = []

    def read() -> None:
        cache = PieceCache(tmp_path, 1000)
        started.wait(DEADLINE_S)
        contents.append(cache.read("piece", 100, 10, 20, fetch))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert contents == [b"x" * 10] * 8
    assert len(fetched) == 1


def test_the_pieces_read_last_stay(tmp_path: Path) -> None:
    """Finds a cache that removes by age of the file, or that counts a removed piece."""
    cache = PieceCache(tmp_path, 1000)
    for i in range(10):
        cache.add(f"piece{i}", 100, lambda: b"x" * 100)
        os.utime(tmp_path / f"piece{i}", ns=(i, i))
    cache.read("piece0", 100, 0, 1, lambda: b"")
    cache.add("new", 100, lambda: b"x" * 100)
    left = {path.name for path in tmp_path.iterdir()}
    assert {"piece0", "piece9", "new"} <= left
    assert "piece1" not in left
    assert cached_bytes(tmp_path) <= 1000


FETCHER = """
import sys, time
from pathlib import Path
from dist_lm.data.piece_cache import PieceCache
def fetch():
    print("fetching", flush=True)
    time.sleep(600)
PieceCache(Path(sys.argv[1]), 1000).add("piece", 100, fetch)
"""


@pytest.mark.heavy
def test_a_killed_process_leaves_no_half_piece_and_no_lock(tmp_path: Path) -> None:
    """Finds a lock that outlives its holder, and remains of a kill that count for ever."""
    process = subprocess.Popen(
        [sys.executable, "-c", FETCHER, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdout
    assert process.stdout.readline() == b"fetching\n"
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE_S)
    cache = PieceCache(tmp_path, 1000)
    for i in range(12):
        cache.add(f"piece{i}", 100, lambda: b"x" * 100)
    assert not list(tmp_path.glob(f"*{piece_cache.PART}"))
    assert cache.read("piece", 100, 0, 3, lambda: b"y" * 100) == b"yyy"


def test_an_error_of_a_fetch_leaves_nothing(tmp_path: Path) -> None:
    """Finds a failed fetch whose empty file is taken for a piece."""

    def fail() -> bytes:
        raise ArtefactError("server")

    cache = PieceCache(tmp_path, 1000)
    with pytest.raises(ArtefactError, match="server"):
        cache.read("piece", 100, 0, 1, fail)
    assert not list(tmp_path.iterdir())
    assert cache.read("piece", 100, 0, 1, lambda: b"x" * 100) == b"x"


def test_a_cache_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """Finds an error of the cache that reads as one of the corpus."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="file: the cache cannot be used"):
        PieceCache(tmp_path / "file", 1000)
