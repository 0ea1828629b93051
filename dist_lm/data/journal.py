"""The journal of a corpus that is being built, and which files of a corpus folder are ours.

`journal.jsonl` names every tar before it is written and describes it once it is finished, so a build that was killed
goes on behind the last finished tar. It is removed when the manifest is there. Only files that the manifest or the
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
    manifest_path,
    read_manifest,
    shard_name,
    shard_state,
)
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable

REJECTED = "rejected.jsonl"  # the place of every broken row, the reason and what is wrong
SUFFIXES = (".tar", ".index", ".origins.jsonl.zst")  # the files of a tar
_NAMES_SHOWN = 3
_OF_DURABLE = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")  # temporary files of `storage.durable`


@dataclass
class Journal:
    """The tars of a build."""

    directory: Path
    recipe: Recipe
    finished: dict[str, list[Shard]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    begun: list[str] = field(default_factory=list)  # names of tars, finished ones included

    @classmethod
    def start(cls, directory: Path, recipe: Recipe) -> Self:
        """Begin or go on with the build of `directory`: keep the tars that are finished, remove other files of ours.

        Raises:
            ArtefactError: the folder holds files that are not ours.
        """
        directory.mkdir(parents=True, exist_ok=True)
        ours = require_only_ours(directory)
        journal = cls(directory, recipe)
        for split, shards in _known_shards(directory, recipe).items():
            for shard in shards:
                if not _is_intact(directory, shard):
                    break  # tars after it are built again too: the boundary is a place in the row of documents
                journal.finished[split].append(shard)
                journal.begun.append(shard.name)
        path, manifest = journal_path(directory), manifest_path(directory)
        keep = {path.name, manifest.name, *(file for name in journal.begun for file in _files_of(name))}
        for name in ours - keep:
            (directory / name).unlink()
        done = [{"finished": asdict(shard)} for shards in journal.finished.values() for shard in shards]
        durable.write_text(path, "".join(map(_line, [{"format": FORMAT, **asdict(recipe)}, *done])))
        manifest.unlink(missing_ok=True)
        durable.fsync_directory(directory)
        return journal

    @property
    def documents(self) -> dict[str, int]:
        """Documents of the finished tars, by split."""
        return {split: sum(one.counts.documents for one in shards) for split, shards in self.finished.items()}

    def begin(self, split: str) -> str:
        """Name the next tar of a split, before any file of it is written."""
        name = shard_name(split, len(self.finished[split]))
        self._append({"begun": name})
        return name

    def finish(self, split: str, shard: Shard) -> None:
        """Record a tar whose files are on disk."""
        self._append({"finished": asdict(shard)})
        self.finished[split].append(shard)

    def close(self) -> None:
        """Remove the journal: the manifest describes the tars now."""
        journal_path(self.directory).unlink()
        durable.fsync_directory(self.directory)

    def _append(self, value: Mapping[str, Any]) -> None:
        with journal_path(self.directory).open("a", encoding="utf-8") as file:
            file.write(_line(value))
            file.flush()
            os.fsync(file.fileno())


def journal_path(directory: Path) -> Path:
    return directory / "journal.jsonl"


def require_only_ours(directory: Path) -> set[str]:
    """The names of all entries of a corpus folder, if they are all ours.

    Raises:
        ArtefactError: there are other entries.
        ManifestError, FormatError: the manifest cannot be read, so nobody knows which files are ours.
    """
    ours, foreign = entries(directory)
    if foreign:
        more = f" and {len(foreign) - _NAMES_SHOWN} more" if len(foreign) > _NAMES_SHOWN else ""
        raise ArtefactError(
            f"{directory} holds {', '.join(foreign[:_NAMES_SHOWN])}{more}, which its manifest does not name: move "
            "them away, or give the corpus another name. Only files that the manifest names are ever removed; if you "
            "need nothing there, remove that folder"
        )
    return ours


def entries(directory: Path) -> tuple[set[str], list[str]]:
    """The names of what is in a corpus folder: (files that the manifest or the journal names, everything else)."""
    named = {path.name for path in (manifest_path(directory), journal_path(directory)) if path.is_file()}
    if named:
        named.add(REJECTED)
    for name in _named_tars(directory):
        named |= {*_files_of(name), f".{name}.tmp"}
    ours, foreign = set(), []
    for entry in sorted(directory.iterdir()):
        temporary = _OF_DURABLE.fullmatch(entry.name)
        if (temporary[1] if temporary else entry.name) in named and (entry.is_symlink() or not entry.is_dir()):
            ours.add(entry.name)
        else:
            foreign.append(f"{entry.name}/" if entry.is_dir() else entry.name)
    return ours, foreign


def _named_tars(directory: Path) -> Iterator[str]:
    """The tars that manifest and journal name."""
    if manifest_path(directory).is_file():
        yield from (shard.name for split in read_manifest(directory).splits.values() for shard in split.shards)
    yield from _read(directory)[1]


def _known_shards(directory: Path, recipe: Recipe) -> dict[str, list[Shard]]:
    """The finished tars that a build of `recipe` may keep."""
    found, _, shards = _read(directory)
    if found == recipe:
        return shards
    if manifest_path(directory).is_file() and (manifest := read_manifest(directory)).recipe == recipe:
        return {name: list(split.shards) for name, split in manifest.splits.items()}
    return {}


def is_dropped_for_inputs(directory: Path, recipe: Recipe) -> bool:
    """Whether a build of `recipe` drops the finished tars of a begun one because the inputs alone differ."""
    found, _, shards = _read(directory)
    return (
        found is not None
        and any(shards.values())
        and found != recipe
        and replace(found, inputs_sha256=recipe.inputs_sha256) == recipe
    )


def _read(directory: Path) -> tuple[Recipe | None, list[str], dict[str, list[Shard]]]:
    """(recipe, names of begun tars, finished tars) of the journal. A line that a kill cut short ends it."""
    recipe, begun, finished = None, [], {split: [] for split in SPLITS}
    path = journal_path(directory)
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    known_names = re.compile(rf"({'|'.join(SPLITS)})-\d{{6}}\.tar")
    for number, line in enumerate(lines):
        try:
            value = json.loads(line)
            if number == 0 and value.pop("format") == FORMAT:
                recipe = Recipe(**value)
            elif name := value.get("begun") or value["finished"]["name"]:
                if not known_names.fullmatch(name):
                    raise ValueError(f"{name} is no tar of this folder")
                begun.append(name)
                if "finished" in value:
                    split = name.partition("-")[0]
                    shard = Shard.parse(value["finished"], shard_name(split, len(finished[split])))
                    finished[split].append(shard)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(
                f"{path}: line {number + 1} is damaged ({type(error).__name__}: {error}): remove {directory}"
            ) from error
    return recipe, begun, finished


def _files_of(tar: str) -> set[str]:
    return {tar.removesuffix(".tar") + suffix for suffix in SUFFIXES}


def _is_intact(directory: Path, shard: Shard) -> bool:
    there = all((directory / name).is_file() for name in _files_of(shard.name) if not name.endswith(".index"))
    return there and shard_state(directory / shard.name, shard, hashes=True) == "ok"


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True) + "\n"
