"""Keeps the journal of a corpus that is being built, and tells which files of a corpus folder are ours.

`journal.jsonl` names every tar before it is written and describes it once it is finished, so a build that was killed
continues behind the last finished tar. It is removed when the manifest exists. Only files that the manifest or the
journal names are ever removed from a corpus folder.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from dist_lm.config.corpus import SPLITS
from dist_lm.data.manifest import (
    FORMAT,
    ManifestError,
    Recipe,
    Shard,
    decisions_path,
    excluded_path,
    manifest_path,
    read_manifest,
    remote_path,
    shard_name,
    shard_state,
)
from dist_lm.data.split_index import split_index_path
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.tracking.readable import listed

REJECTED = "rejected.jsonl"  # a line for every broken row: its file and line, the reason and the error
ROWS = ".rows.jsonl.zst"  # ends the name of the file of rows of a tar
SUFFIXES = (".tar", ".index", ".origins.jsonl.zst", ROWS)  # the files of a tar
_NAMES_SHOWN = 3


@dataclass
class Journal:
    """The tars of a build."""

    directory: Path
    recipe: Recipe
    finished: dict[str, list[Shard]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    begun: list[str] = field(default_factory=list)  # names of tars, finished ones included

    @classmethod
    def start(cls, directory: Path, recipe: Recipe) -> Self:
        """Begins or continues the build of `directory`: keeps the tars that are finished, removes other files of ours.

        Makes the folder, hashes the finished tars, writes a new journal, and then removes the manifest, so the corpus
        is incomplete from here on. Tars of another recipe are removed, and in each split the first tar that is not
        intact with all behind it.

        Raises:
            ArtefactError: the folder holds files that are not ours, or its manifest or journal is damaged. Nothing is
                changed then.
            OSError: a file cannot be read, written or removed.
        """
        directory.mkdir(parents=True, exist_ok=True)
        ours = require_only_ours(directory)
        journal = cls(directory, recipe)
        for split, shards in _reusable_shards(directory, recipe).items():
            for shard in shards:
                # Without the hash of its texts, nobody can tell whether the sources still give them.
                if not shard.texts or not _is_intact(directory, shard):
                    break  # tars after it are built again too: a build continues at one position in the documents
                journal.finished[split].append(shard)
                journal.begun.append(shard.name)

        path, manifest = journal_path(directory), manifest_path(directory)
        needed = {path.name, manifest.name, *(file for name in journal.begun for file in _files_of(name))}
        for name in ours - needed:
            (directory / name).unlink()

        # The new journal names the tars before the manifest that named them goes.
        finished = [{"finished": shard.to_json()} for shards in journal.finished.values() for shard in shards]
        durable.write_text(path, "".join(map(_line, [{"format": FORMAT, **asdict(recipe)}, *finished])))
        manifest.unlink(missing_ok=True)
        durable.fsync(directory)
        return journal

    @property
    def documents(self) -> dict[str, int]:
        """The number of documents in the finished tars, by split."""
        return {split: sum(shard.counts.documents for shard in shards) for split, shards in self.finished.items()}

    def begin(self, split: str) -> str:
        """Records and returns the name of the next tar of a split, before any file of it is written."""
        name = shard_name(split, len(self.finished[split]))
        self._append({"begun": name})
        return name

    def finish(self, split: str, shard: Shard) -> None:
        """Records a tar whose files are on disk."""
        self._append({"finished": shard.to_json()})
        self.finished[split].append(shard)

    def close(self) -> None:
        """Removes the journal: the manifest describes the tars now."""
        journal_path(self.directory).unlink()
        durable.fsync(self.directory)

    def _append(self, event: Mapping[str, Any]) -> None:
        # On disk before the caller continues: a tar that no line names would be taken for a user's file.
        with journal_path(self.directory).open("a", encoding="utf-8") as file:
            file.write(_line(event))
            file.flush()
            os.fsync(file.fileno())


def journal_path(directory: Path) -> Path:
    return directory / "journal.jsonl"


def require_only_ours(directory: Path) -> set[str]:
    """Returns the names of all files in a corpus folder, if they are all ours. Changes nothing.

    Raises:
        ArtefactError: there are foreign files or folders.
        ManifestError, FormatError (both ArtefactError): the manifest or the journal cannot be read, so nobody knows
            which files are ours.
        OSError: there is no such folder.
    """
    ours, foreign = entries(directory)
    if foreign:
        raise ArtefactError(
            f"{directory} holds {listed(foreign, _NAMES_SHOWN)}, which its manifest does not name: move "
            "them away, or give the corpus another name. Only files that the manifest names are ever removed; if you "
            "need nothing there, remove that folder"
        )
    return ours


def entries(directory: Path) -> tuple[set[str], list[str]]:
    """Returns the names of files in a corpus folder that manifest or journal name, and those of all other entries.

    Manifest, journal and `rejected.jsonl` are among the first; temporary files of ours count as ours. The names of the
    others are sorted, and a folder ends in a slash.

    Raises:
        ArtefactError: the manifest or the journal cannot be read.
        OSError: there is no such folder.
    """
    paths = (manifest_path(directory), journal_path(directory), remote_path(directory))
    named = {path.name for path in paths if path.is_file()}
    if named:
        named |= {REJECTED, decisions_path(directory).name, excluded_path(directory).name}
        named |= {*(split_index_path(directory, split).name for split in SPLITS)}
    for name in _named_tars(directory):
        named |= {*_files_of(name), f".{name}.tmp"}

    ours, foreign = set(), []
    for path in sorted(directory.iterdir()):
        # A kill may leave the temporary file of a durable write.
        final_name = durable.TEMPORARY_NAME.sub(r"\1", path.name)
        if final_name in named and (path.is_symlink() or not path.is_dir()):
            ours.add(path.name)
        else:
            foreign.append(f"{path.name}/" if path.is_dir() else path.name)
    return ours, foreign


def _named_tars(directory: Path) -> Iterator[str]:
    """Yields the names of the tars that manifest and journal name, finished or begun; a name may come twice.

    Raises:
        ArtefactError: the manifest or the journal cannot be read.
    """
    if manifest_path(directory).is_file():
        yield from (shard.name for split in read_manifest(directory).splits.values() for shard in split.shards)
    _, begun_tars, _ = _read(directory)
    yield from begun_tars


def _reusable_shards(directory: Path, recipe: Recipe) -> dict[str, list[Shard]]:
    """Returns the finished tars that a build of `recipe` may keep, by split; empty if all are of another recipe.

    They are those of the journal, or else of the manifest. Tars are not read.

    Raises:
        ArtefactError: the manifest or the journal cannot be read.
    """
    journal_recipe, _, finished = _read(directory)
    if journal_recipe == recipe:
        return finished
    if manifest_path(directory).is_file() and (manifest := read_manifest(directory)).recipe == recipe:
        return {name: list(split.shards) for name, split in manifest.splits.items()}
    return {}


def journal_recipe(directory: Path) -> Recipe | None:
    """Returns the recipe of the unfinished build of a folder; None if there is none.

    Raises:
        ManifestError (an ArtefactError): the journal is damaged, or of another format.
    """
    return _read(directory)[0]


def is_dropped_for_inputs(directory: Path, recipe: Recipe) -> bool:
    """Tells whether a build of `recipe` drops the finished tars of a begun one because the inputs alone differ.

    Raises:
        ArtefactError: the journal cannot be read.
    """
    journal_recipe, _, finished = _read(directory)
    return (
        journal_recipe is not None
        and any(finished.values())
        and journal_recipe != recipe
        and replace(journal_recipe, inputs_sha256=recipe.inputs_sha256) == recipe
    )


def _read(directory: Path) -> tuple[Recipe | None, list[str], dict[str, list[Shard]]]:
    """Returns (recipe, names of begun tars, finished tars by split) of the journal; without a journal None and empty
    ones.

    A last line without a line end does not count.

    Raises:
        ManifestError (an ArtefactError): a line is damaged, or the journal is of another format.
    """
    recipe, begun_tars, finished = None, [], {split: [] for split in SPLITS}
    path = journal_path(directory)
    if not path.is_file():
        return recipe, begun_tars, finished

    # A kill may cut the last line short: without a line end it does not count.
    lines = path.read_bytes().split(b"\n")[:-1]
    tar_name = re.compile(rf"({'|'.join(SPLITS)})-\d{{6}}\.tar")
    for number, line in enumerate(lines):
        try:
            event = json.loads(line)
            if number == 0 and event.pop("format") == FORMAT:
                recipe = Recipe(**event)
            elif name := event.get("begun") or event["finished"]["name"]:
                # Files of these names may be removed, so a name must not lead out of the folder.
                if not tar_name.fullmatch(name):
                    raise ValueError(f"{name} is no tar of this folder")
                begun_tars.append(name)
                if "finished" in event:
                    split = name.partition("-")[0]
                    shard = Shard.parse(event["finished"], shard_name(split, len(finished[split])))
                    finished[split].append(shard)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(
                f"{path}: line {number + 1} is damaged ({type(error).__name__}: {error}): remove {directory}"
            ) from error
    return recipe, begun_tars, finished


def _files_of(tar: str) -> set[str]:
    return {tar.removesuffix(".tar") + suffix for suffix in SUFFIXES}


def _is_intact(directory: Path, shard: Shard) -> bool:
    """Tells whether the files of a tar exist, and tar and rows have their hashes. The index is a cache and may be
    missing."""
    needed = [name for name in _files_of(shard.name) if not name.endswith((".index", ROWS))]
    exist = all((directory / name).is_file() for name in needed)
    if not exist or rows_state(directory / shard.name, shard) != "ok":
        return False
    return shard_state(directory / shard.name, shard, hashes=True) == "ok"


def rows_path(tar: Path) -> Path:
    """Returns the path of the file of rows beside `tar`, which only some corpora have."""
    return tar.with_suffix(ROWS)


def rows_state(tar: Path, shard: Shard) -> str:
    """Returns how the rows beside a tar differ from its entry in the manifest, in words; `ok` if they do not.

    Raises:
        OSError: they cannot be read.
    """
    path = rows_path(tar)
    if not shard.rows:
        return "not in the manifest" if path.exists() else "ok"
    if not path.is_file():
        return "missing"
    return "ok" if durable.sha256_of(path) == shard.rows else "other contents than the manifest says (sha256)"


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(event, sort_keys=True) + "\n"
