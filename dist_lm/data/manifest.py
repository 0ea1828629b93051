"""The manifest of a corpus: tars with their hashes, counts by split and language, and the inputs of the shards.

The manifest is written last: a folder without a manifest is not a corpus.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from dist_lm.errors import ArtefactError
from dist_lm.storage import durable

BUILD_COMMAND = "python -m dist_lm.launch stage=shards"
FORMAT = 2  # of manifest.json and its tars; format 1 had other special tokens than ChatML's


class FormatError(ArtefactError):
    """A corpus of another format."""


@dataclass(frozen=True)
class Counts:
    """Amounts of text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0  # UTF-8, of the text

    def __add__(self, other: Self) -> "Counts":
        return Counts(self.documents + other.documents, self.tokens + other.tokens, self.bytes + other.bytes)


@dataclass(frozen=True)
class Shard:
    """One tar."""

    name: str
    size: int  # bytes
    sha256: str
    counts: Counts


@dataclass(frozen=True)
class Split:
    """`train` or `val`."""

    shards: tuple[Shard, ...] = ()
    languages: Mapping[str, Counts] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        return sum((shard.counts for shard in self.shards), Counts())


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    tokenizer_sha256: str
    corpus_fingerprint: str  # hash of the configuration that selected the documents
    splits: Mapping[str, Split]
    ingest: Mapping[str, Any]  # dropped documents by reason

    def require_tokenizer(self, sha256: str, directory: Path) -> None:
        """Refuse another tokenizer than the one that wrote the shards in `directory`."""
        if sha256 != self.tokenizer_sha256:
            raise ArtefactError(
                f"{directory} was written with tokenizer {self.tokenizer_sha256[:12]}, not {sha256[:12]}: "
                f"restore that tokenizer, or build the corpus again with `{BUILD_COMMAND}`"
            )


def manifest_path(directory: Path) -> Path:
    return directory / "manifest.json"


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest.

    Raises:
        ArtefactError: the corpus is missing, unfinished or damaged.
        FormatError: it has another format.
    """
    path = manifest_path(directory)
    if not directory.is_dir():
        raise ArtefactError(f"corpus {directory} does not exist: build it with `{BUILD_COMMAND}`")
    if not path.is_file():
        raise ArtefactError(f"corpus {directory} is unfinished (no {path.name}): build it with `{BUILD_COMMAND}`")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise FormatError(
                f"{directory} is a corpus of format {value['format']}, this version reads format {FORMAT}: use another "
                f"work_dir, or remove that folder and build it again with `{BUILD_COMMAND}`"
            )
        return Manifest(
            tokenizer_sha256=value["tokenizer_sha256"],
            corpus_fingerprint=value["corpus_fingerprint"],
            splits={name: _parse_split(split) for name, split in value["splits"].items()},
            ingest=value["ingest"],
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"{path} is damaged ({type(error).__name__}: {error}): build it again with `{BUILD_COMMAND}`"
        ) from error


def verify(directory: Path) -> dict[str, str]:
    """Compare every tar with the manifest, hashes included: tar name -> `ok` or the difference."""
    found = {}
    for split in read_manifest(directory).splits.values():
        for shard in split.shards:
            found[shard.name] = shard_state(directory / shard.name, shard, hashes=True)
    return found


def shard_state(path: Path, shard: Shard, *, hashes: bool) -> str:
    """`ok`, or how the tar at `path` differs from its entry in the manifest."""
    if not path.is_file():
        return "missing"
    if (size := path.stat().st_size) != shard.size:
        return f"{size} bytes, expected {shard.size}"
    if hashes and durable.sha256_of(path) != shard.sha256:
        return "other contents than the manifest says (sha256)"
    return "ok"


def _parse_split(value: Mapping[str, Any]) -> Split:
    shards = [
        Shard(shard["name"], shard["size"], shard["sha256"], Counts(**shard["counts"])) for shard in value["shards"]
    ]
    return Split(tuple(shards), {name: Counts(**counts) for name, counts in value["languages"].items()})
