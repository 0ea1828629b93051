"""Makes a corpus folder whose tars stay behind http, s3 or gs: `dist-lm data attach`.

The folder has the manifest, the indices, origins and rows of the remote one, and `remote.json` in place of the tars
(`data.remote_corpus`). A URL that could hold credentials is refused, because `remote.json` is written to disk.
"""

import logging
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_lm.data.exclusions import read_exclusions
from dist_lm.data.index import load_index
from dist_lm.data.journal import REJECTED, rows_path, rows_state
from dist_lm.data.manifest import (
    FORMAT,
    FormatError,
    Manifest,
    ManifestError,
    Shard,
    excluded_path,
    index_path,
    is_attached,
    manifest_path,
    read_manifest,
    remote_path,
)
from dist_lm.data.remote_corpus import RemoteCorpus, RemoteFolder
from dist_lm.data.shard_writer import origins_path
from dist_lm.data.sources.failures import brief
from dist_lm.data.sources.opening import REMOTE
from dist_lm.errors import ArtefactError, ConfigError, require
from dist_lm.storage import durable
from dist_lm.storage.lock import is_locked, locked
from dist_lm.storage.run_directory import WorkDirectory

log = logging.getLogger(__name__)

LEAST_CACHE = 256 << 20  # bytes: the pieces that the ranks of a node read at once
REQUESTS = 16  # at once
LOCK = "attach.lock"  # held while a folder is filled
LOCK_WAIT_S = 10.0


def attach(url: str, directory: Path, cache: Path, cache_bytes: int) -> Manifest:
    """Makes a corpus folder of a remote corpus, and returns its manifest. The tars stay where they are.

    An attached folder of the same corpus is renewed: after an upload, or for another cache.

    Args:
        url: of the folder with `manifest.json`.
        cache: a folder on a local disk of each node; made when it is first used.

    Raises:
        ConfigError: the URL, or the size of the cache, is not accepted.
        ArtefactError: there is no such corpus or a file of it is missing or differs from its manifest; or `directory`
            is taken.
        OSError: a file cannot be written.
    """
    _check_url(url)
    url = url.rstrip("/")
    cache_gib = round(cache_bytes / 2**30, 3)
    require(cache_bytes >= LEAST_CACHE, "--cache-gib", cache_gib, f"at least {LEAST_CACHE / 2**30:g}")
    if directory.exists() and not is_attached(directory):
        raise ArtefactError(f"{directory} is taken by a corpus that is not attached: give another name")

    with _new_folder(directory) as temporary:
        folder = RemoteFolder(url)
        manifest = _copy_manifest(folder, temporary)
        shards = [shard for split in manifest.splits.values() for shard in split.shards]
        if directory.exists() and read_manifest(directory).content != manifest.content:
            raise ArtefactError(f"{directory} is attached to another corpus: give another name")

        with ThreadPoolExecutor(REQUESTS) as pool:
            identities = list(pool.map(lambda shard: _copy_beside_tar(folder, shard, temporary), shards))
        tars = {shard.name: identity for shard, identity in zip(shards, identities, strict=True)}
        record = RemoteCorpus(url, str(cache.absolute()), cache_bytes, tars)
        durable.write_sealed(remote_path(temporary), asdict(record))
        _copy_rejected(folder, temporary)
        _copy_exclusions(folder, temporary, manifest)

        if not directory.exists():
            temporary.rename(directory)
            durable.fsync(directory.parent)
            (directory / LOCK).unlink()
        else:
            # The same corpus: each file may be renewed alone, while runs read the others.
            for path in sorted(temporary.iterdir()):
                if path.name != LOCK:
                    path.replace(directory / path.name)
    return manifest


@contextmanager
def _new_folder(directory: Path) -> Iterator[Path]:
    """Makes a folder beside `directory` for the block, removes it afterwards, and those that killed commands left.

    Raises:
        ArtefactError: the file system has no locks.
        OSError: the folder cannot be made.
    """
    for path in directory.parent.glob(f".{directory.name}.*.tmp"):
        name = durable.TEMPORARY_NAME.match(path.name)
        is_ours = name is not None and name[1] == directory.name and path.is_dir()
        # A command that has just begun has an empty folder, and locks it next.
        if is_ours and any(path.iterdir()) and not is_locked(path / LOCK):
            shutil.rmtree(path, ignore_errors=True)

    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir(parents=True)
    try:
        # Another command that looks whether the lock is free holds it for a moment.
        with locked(temporary / LOCK, wait_s=LOCK_WAIT_S):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tokenizer_note(manifest: Manifest, work: WorkDirectory) -> str:
    """Returns which tokenizer a corpus was written with, and what a work directory without it must do.

    Raises:
        OSError: the tokenizer of the work directory cannot be read.
    """
    needed = manifest.recipe.tokenizer_sha256
    note = f"written with tokenizer {needed[:12]}"
    if not work.tokenizer_model.is_file():
        return f"{note}: give that file as tokenizer=PATH, because {work.tokenizer} holds none"
    if (sha256 := durable.sha256_of(work.tokenizer_model)) != needed:
        return f"{note}, but {work.tokenizer} holds {sha256[:12]}: attach it in another work directory (--work)"
    return f"{note}, as {work.tokenizer} holds"


def _check_url(url: str) -> None:
    """Checks that a URL names a folder behind http, https, s3 or gs and cannot hold credentials; returns nothing.

    Raises:
        ConfigError: the URL has a user, a query or a fragment; the message leaves the URL out, because these may be
            credentials. Or it has another scheme or nothing behind the scheme; the message then repeats the URL.
    """
    accepted = f"a folder behind {', '.join(REMOTE)}"
    scheme, separator, rest = url.partition("://")
    if "@" in rest.partition("/")[0] or "?" in url or "#" in url:
        # The message leaves the address out, because messages are logged.
        raise ConfigError(
            "URL=(an address with a user, a query or a fragment): expected one without: credentials come from the "
            "environment, and the address is written to disk"
        )
    require(bool(separator) and scheme in REMOTE and bool(rest.strip("/")), "URL", url, accepted)


def _copy_manifest(folder: RemoteFolder, directory: Path) -> Manifest:
    """Copies the manifest, and returns it.

    Raises:
        ArtefactError: it is missing, damaged, or of another format.
        OSError: it cannot be written.
    """
    path = manifest_path(directory)
    try:
        durable.write_bytes(path, folder.content(path.name))
    except ArtefactError as error:
        raise ArtefactError(f"{error}; expected the URL of a copy of work/corpora/NAME") from error

    # The errors of a local corpus name the temporary folder, and say how to build it again.
    remote = folder.path(path.name)
    try:
        return read_manifest(directory)
    except FormatError as error:
        message = f"{remote}: its corpus has another format than {FORMAT}, which this version reads: build it again"
        raise ArtefactError(message) from error
    except ManifestError as error:
        reason = brief(error.__cause__ or error)
        raise ArtefactError(f"{remote}: damaged, or no manifest of a corpus ({reason}): upload it again") from error


def _copy_rejected(folder: RemoteFolder, directory: Path) -> None:
    """Copies the list of the rows and documents that the build dropped; warns if it cannot be read, because training
    does without it.

    Raises:
        OSError: it cannot be written.
    """
    path = directory / REJECTED
    try:
        # It may be larger than memory: a crawl has millions of near-duplicates.
        with path.open("wb") as file:
            file.writelines(folder.chunks(path.name))
    except ArtefactError as error:
        path.unlink()
        log.warning("%s; until then `data where` names no near-duplicates of this corpus", error)


def _copy_exclusions(folder: RemoteFolder, directory: Path, manifest: Manifest) -> None:
    """Copies the list of excluded documents, whose loss training leaves out.

    Raises:
        ArtefactError: it is missing, or differs from the manifest.
        OSError: it cannot be written.
    """
    if not manifest.excluded:
        return
    path = excluded_path(directory)
    durable.write_bytes(path, folder.content(path.name))
    try:
        read_exclusions(directory, manifest)
    except ArtefactError as error:
        raise ArtefactError(f"{folder.path(path.name)} is not of this corpus: upload it again") from error


def _copy_beside_tar(folder: RemoteFolder, shard: Shard, directory: Path) -> dict[str, Any]:
    """Copies the index, origins and rows of a tar; returns what the server tells about the tar.

    Raises:
        ArtefactError: a file is missing, or differs from the manifest.
        OSError: a file cannot be written.
    """
    tar = directory / shard.name
    try:
        identity = folder.identity(shard.name)
        paths = [index_path(tar), origins_path(tar)]
        if shard.rows:
            paths.append(rows_path(tar))
        for path in paths:
            durable.write_bytes(path, folder.content(path.name))
    except ArtefactError as error:
        raise ArtefactError(f"{error}; a remote corpus is a copy of all files of its folder") from error

    if identity.get("size") != shard.size:
        raise ArtefactError(
            f"{folder.path(shard.name)}: {identity.get('size')} bytes, expected {shard.size}: upload it again"
        )
    index = load_index(index_path(tar))
    if index is None or index.sha256 != shard.index_sha256:
        raise ArtefactError(f"{folder.path(index_path(tar).name)} is not of this corpus: upload it again")
    if (state := rows_state(tar, shard)) != "ok":
        raise ArtefactError(f"{folder.path(rows_path(tar).name)}: {state}: upload it again")
    return identity
