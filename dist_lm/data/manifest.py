"""Writes, reads and compares the manifest of a corpus: tars with hashes, counts by split and language, the recipe.

The manifest is written last: a folder without a manifest is not a corpus. It holds a hash of its own content, so an
edited manifest is refused.

Inputs and content are recorded and compared later. Inputs are the files and URLs that the sources of a corpus read.
Content is the part of a corpus that training sees: tokens, lengths, masks and rankings, in their order. Sources,
licences and how documents are cut into tars do not count, so a corpus that was built again from the same text has the
same content.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import numpy as np

from dist_lm.config.corpus import SPLITS, CorpusConfig, SourceConfig
from dist_lm.data.inputs import HUB, Inputs, changes, inputs_of
from dist_lm.data.sources.reader import corpus_sources
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory

BUILD_COMMAND = "python -m dist_lm.launch stage=shards"
FORMAT = 3  # version of manifest.json and its tars; format 2 had no checksum of a member
# A corpus with excluded documents, whose loss earlier versions would count, so that they must refuse it.
EXCLUDING_FORMAT = 4
_HASH = r"[0-9a-f]{64}"
ListInputs = Callable[[SourceConfig], Inputs]


class FormatError(ArtefactError):
    """A corpus of another format."""


class ManifestError(ArtefactError):
    """A manifest that is damaged or was edited, so that nobody knows which files are ours."""


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
    index_sha256: str  # hash of the index: offsets of members and documents
    content: str  # sum of the hashes of its documents (`data.shard_writer.content_hash`), hexadecimal
    members: str  # CRC-32 of each member, eight hexadecimal digits each
    counts: Counts
    texts: str = ""  # hash of the texts of its documents, in their order; empty: not known
    rows: str = ""  # SHA-256 of the file of rows beside it; empty: there is none

    @property
    def n_members(self) -> int:
        """The number of its members."""
        return len(self.members) // 8

    def checksum(self, member: int) -> int:
        """Returns the CRC-32 of a member."""
        return int(self.members[8 * member : 8 * member + 8], 16)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, `rows` only if there are some."""
        return {name: value for name, value in asdict(self).items() if name != "rows" or value}

    @classmethod
    def parse(cls, shard_fields: Mapping[str, Any], name: str) -> Self:
        """Returns the tar that `to_json` wrote as `shard_fields`; it must be named `name`.

        Raises:
            KeyError, TypeError: a field is missing, or there is an unknown one.
            ValueError: a field has another form.
        """
        counts = parse_counts(shard_fields["counts"])
        shard = cls(**{**shard_fields, "counts": counts})

        # Files of these names may be removed, so a name must be one that we give.
        hashes = (shard.sha256, shard.index_sha256, shard.content, *filter(None, [shard.rows]))
        if shard.name != name:
            raise ValueError(f"a tar is named {shard.name!r}, expected {name}")
        if type(shard.size) is not int or not all(re.fullmatch(_HASH, text) for text in hashes):
            raise ValueError(f"{name}: size or hashes have another form")
        if not re.fullmatch("([0-9a-f]{8})*", shard.members):
            raise ValueError(f"{name}: the checksums of its members have another form")
        return shard


@dataclass(frozen=True)
class Split:
    """`train` or `val`."""

    shards: tuple[Shard, ...] = ()
    languages: Mapping[str, Counts] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        """The amounts of text in all tars of the split."""
        return sum((shard.counts for shard in self.shards), Counts())

    @property
    def content(self) -> str:
        """The hash of tokens, lengths, masks and rankings, in the order of the documents."""
        return content_sum(shard.content for shard in self.shards)


@dataclass(frozen=True)
class Recipe:
    """Identifies everything that the tars are built from. Equal recipes give equal bytes."""

    tokenizer_sha256: str
    vocab_size: int  # all token ids are smaller
    corpus_fingerprint: str  # hash of the configuration that selected the documents, all corpora included
    documents_per_member: int
    shard_tokens: int
    inputs_sha256: str = ""  # hash of the inputs that were read (`inputs_hash`)
    own_fingerprint: str = ""  # hash of that configuration without other corpora
    # folder -> content hash of val, of the finished corpora that were compared: none of these val texts is in train
    compared: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    recipe: Recipe
    splits: Mapping[str, Split]
    ingest: Mapping[str, Any]  # counts of documents read, kept and dropped: `asdict` of `screening.IngestReport`
    licences: Sequence[str] = ()  # `licence` of each source, which the files beside the tars hold
    inputs: Sequence[Sequence[Mapping[str, Any]]] = ()  # files that each source read or left out (`data.inputs`)
    settings: Mapping[str, Any] = field(default_factory=dict)  # `recipe.corpus_fingerprint` is their hash
    # corpus -> hash of its documents when val was chosen; empty: not known. Val was compared with these.
    documents: Mapping[str, str] = field(default_factory=dict)
    decisions: str = ""  # SHA-256 of what later builds need of the decisions (`data.kept_decisions`); empty: not there
    # train documents whose loss never counts (`data.exclusions`): {"sha256" of the file, "reasons": numbers by reason}
    excluded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, str]:
        """The content hash of each split: see `Split.content`; that of train depends on excluded documents, too."""
        content = {name: split.content for name, split in self.splits.items()}
        if self.excluded:
            content["train"] = content_sum([content["train"], self.excluded["sha256"]])
        return content

    @property
    def n_excluded(self) -> int:
        """The number of excluded train documents."""
        return sum(self.excluded.get("reasons", {}).values())

    def require_tokenizer(self, sha256: str, directory: Path) -> None:
        """Refuses another tokenizer than the one that wrote the shards in `directory`; returns nothing.

        Raises:
            ArtefactError: names both tokenizers.
        """
        if sha256 != self.recipe.tokenizer_sha256:
            cure = f"build the corpus again with `{BUILD_COMMAND}`"
            if is_attached(directory):
                cure = "use another work directory"
            raise ArtefactError(
                f"{directory} was written with tokenizer {self.recipe.tokenizer_sha256[:12]}, not {sha256[:12]}: "
                f"restore that tokenizer, or {cure}"
            )


def manifest_path(directory: Path) -> Path:
    return directory / "manifest.json"


def remote_path(directory: Path) -> Path:
    """Returns the path of the file that stands in place of the tars of an attached corpus (`data.remote_corpus`)."""
    return directory / "remote.json"


def is_attached(directory: Path) -> bool:
    """Returns whether the tars of a corpus stay behind a URL."""
    return remote_path(directory).is_file()


def excluded_path(directory: Path) -> Path:
    """Returns the path of the list of excluded documents (`data.exclusions`), which few corpora have."""
    return directory / "excluded.jsonl"


def decisions_path(directory: Path) -> Path:
    """Returns the path of what later builds need of the decisions of a build (`data.kept_decisions`)."""
    return directory / "decisions.zip"


def require_decisions(directory: Path) -> None:
    """Refuses to extend a corpus that keeps nothing of the decisions of its build; returns nothing.

    Raises:
        ArtefactError: names the folder and the way out.
    """
    if not read_manifest(directory).decisions:
        raise ArtefactError(
            f"{directory} was not built with corpus.build=tasks by a release that keeps decisions, so no corpus can "
            "extend it: build its sources and the added ones once without corpus.extends"
        )


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the type that holds every token id of a vocabulary: uint16 or uint32, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def shard_name(split: str, number: int) -> str:
    """Returns the file name of tar `number` of a split."""
    return f"{split}-{number:06d}.tar"


def index_path(tar: Path) -> Path:
    """Returns the path of the index beside `tar` (`data.index`)."""
    return tar.with_suffix(".index")


def content_sum(hashes: Iterable[str]) -> str:
    """Adds hashes of 256 bits, modulo 2**256: hexadecimal, and independent of how documents are cut into tars."""
    return f"{sum(int(text, 16) for text in hashes) % 2**256:064x}"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` durably, in place of an existing one, which declares the corpus complete.

    Raises:
        OSError: the file cannot be written.
    """
    splits = {}
    for name, split in manifest.splits.items():
        splits[name] = {
            "shards": [shard.to_json() for shard in split.shards],
            "languages": {language: asdict(amounts) for language, amounts in split.languages.items()},
        }

    content = {
        "format": EXCLUDING_FORMAT if manifest.excluded else FORMAT,
        **asdict(manifest.recipe),
        "content": manifest.content,  # follows from the shards; for those who read the file
        "splits": splits,
        "ingest": dict(manifest.ingest),
        "licences": list(manifest.licences),
        "inputs": [list(listing) for listing in manifest.inputs],
        "settings": dict(manifest.settings),
        "documents": dict(manifest.documents),
    }
    # Only builds by tasks keep decisions, and few corpora have excluded documents.
    if manifest.decisions:
        content["decisions"] = manifest.decisions
    if manifest.excluded:
        content["excluded"] = dict(manifest.excluded)
    durable.write_json(manifest_path(directory), {**content, "checksum": _checksum(content)})


def read_manifest(directory: Path) -> Manifest:
    """Returns the manifest of the corpus in `directory`. Tars are not looked at.

    Raises:
        ArtefactError: the corpus is missing or unfinished.
        ManifestError (an ArtefactError): the manifest is damaged, or was edited.
        FormatError (an ArtefactError): the corpus has another format.
        OSError: the file cannot be read.
    """
    path = manifest_path(directory)
    if not directory.is_dir():
        raise ArtefactError(f"corpus {directory} does not exist: build it with `{BUILD_COMMAND}`")
    # The manifest is written last, so a folder without one is an unfinished build.
    if not path.is_file():
        raise ArtefactError(f"corpus {directory} is unfinished (no {path.name}): build it with `{BUILD_COMMAND}`")

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] not in (FORMAT, EXCLUDING_FORMAT):
            raise FormatError(
                f"{directory} is a corpus of format {content['format']}, this version reads formats {FORMAT} and "
                f"{EXCLUDING_FORMAT}: use another work_dir, or remove that folder and build it again with "
                f"`{BUILD_COMMAND}`"
            )
        if content.pop("checksum") != _checksum(content):
            raise ValueError("its content does not match its checksum, so it was edited")

        # Fields with a default were added later: manifests of the same format may lack them.
        return Manifest(
            recipe=Recipe(**{name: content[name] for name in Recipe.__dataclass_fields__ if name in content}),
            splits={name: _parse_split(name, split) for name, split in content["splits"].items()},
            ingest=content["ingest"],
            licences=content["licences"],
            inputs=content["inputs"],
            settings=content.get("settings", {}),
            documents=content.get("documents", {}),
            decisions=content.get("decisions", ""),
            excluded=content.get("excluded", {}),
        )
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(
            f"{path} is damaged ({type(error).__name__}: {error}): restore it from a copy, or remove {directory} and "
            f"build it again with `{BUILD_COMMAND}`"
        ) from error


def shard_state(path: Path, shard: Shard, *, hashes: bool) -> str:
    """Returns how the tar at `path` differs from its entry in the manifest, in words for people; `ok` if it does not.

    Args:
        hashes: also hash the tar, which reads it whole.

    Raises:
        OSError: the tar cannot be read.
    """
    # The cheap comparisons come first.
    if not path.is_file():
        return "missing"
    if (size := path.stat().st_size) != shard.size:
        return f"{size} bytes, expected {shard.size}"
    if hashes and durable.sha256_of(path) != shard.sha256:
        return "other contents than the manifest says (sha256)"
    return "ok"


def parse_counts(fields_of_counts: Mapping[str, Any]) -> Counts:
    """Inverts `asdict` for counts.

    Raises:
        TypeError: there is an unknown field.
        ValueError: an amount is no natural number.
    """
    counts = Counts(**fields_of_counts)
    if not all(type(amount) is int and amount >= 0 for amount in asdict(counts).values()):
        raise ValueError(f"counts are no natural numbers: {dict(fields_of_counts)}")
    return counts


def _parse_split(name: str, split: Mapping[str, Any]) -> Split:
    # Names of files begin with it, so that another one could lead out of the folder.
    if name not in SPLITS:
        raise ValueError(f"a split is named {name!r}")
    shards = [Shard.parse(shard, shard_name(name, number)) for number, shard in enumerate(split["shards"])]
    return Split(tuple(shards), {language: parse_counts(counts) for language, counts in split["languages"].items()})


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def listed_inputs(config: CorpusConfig, name: str, list_inputs: ListInputs = inputs_of) -> list[Inputs]:
    """Lists the inputs of each source of a corpus, as they are now.

    Args:
        list_inputs: of a source; that of a build gives what the build reads.

    Raises:
        ConfigError, ArtefactError: they cannot be listed.
    """
    return [list_inputs(source) for source in corpus_sources(config, name)]


def inputs_hash(listings: Iterable[Inputs]) -> str:
    """Hashes the inputs that sources read: hexadecimal SHA-256. Files that they leave out do not count."""
    listings_read = [replace(listing, files=listing.taken).to_json() for listing in listings]
    return hashlib.sha256(json.dumps(listings_read, sort_keys=True).encode()).hexdigest()


def changed_inputs(config: CorpusConfig, name: str, directory: Path, list_inputs: ListInputs = inputs_of) -> list[str]:
    """Returns how the inputs of a corpus differ now from those that it was built from, as texts for people (see
    `changes`); the list is empty if they are the same.

    Recorded and configured sources are compared pair by pair, in their order, so a source that was added or removed at
    the end counts as no difference. Sources of the hub are not compared: a newer commit there is nobody's change here.
    All other sources are listed anew, which sends requests for URLs. If the manifest records no inputs, nothing is
    listed and the list is empty.

    Args:
        directory: the folder of the corpus, with its manifest.
        list_inputs: as in `listed_inputs`.

    Raises:
        ConfigError: the corpus or a reader does not exist, or a source has nothing to read.
        ArtefactError: the inputs cannot be listed, or the corpus is missing or its manifest cannot be read.
        OSError: a file cannot be read.
    """
    recorded = [Inputs.from_json(listing) for listing in read_manifest(directory).inputs]
    if not recorded:
        return []
    # Settings decide elsewhere whether a source was added or removed.
    words = []
    for old, source in zip(recorded, corpus_sources(config, name), strict=False):
        if old.files and not old.files[0].name.startswith(HUB):
            words += changes(old, list_inputs(source))
    return words


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Returns how settings that JSON can hold differ, in words for people: one line for each key; empty if they are
    equal. A missing key counts as None.

    Args:
        key: the path of both values in the settings; empty at the top.
    """
    if before == now:
        return []
    # Mappings and lists are entered, so that a line names the one key that differs.
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = {f"{key}.{name}".lstrip("."): (before.get(name), now.get(name)) for name in before | now}
    elif isinstance(before, list) and isinstance(now, list):
        pairs = {f"{key}[{index}]": pair for index, pair in enumerate(zip_longest(before, now))}
    elif isinstance(now, dict | list) and before is None:
        return [f"{key} is new"]
    elif isinstance(before, dict | list) and now is None:
        return [f"{key} is gone"]
    else:
        return [f"{key}={json.dumps(now)}, was {json.dumps(before)}"]
    return [line for name, pair in pairs.items() for line in differences(*pair, name)]


def record_content(run: RunDirectory, corpora: Iterable[str], folders: Mapping[str, str] | None = None) -> None:
    """Writes folders and content hashes of the corpora that `run` trains on to its directory, in place of an earlier
    record.

    Args:
        folders: corpus -> folder in `work/corpora`; a corpus that is not there has the folder of its name.

    Raises:
        ArtefactError: a manifest is missing or damaged.
        OSError: the record cannot be written.
    """
    record = {}
    for name in corpora:
        folder = (folders or {}).get(name, name)
        record[name] = {**read_manifest(run.work.corpus(folder)).content, "folder": folder}
    durable.write_sealed(run.corpora, record)


def recorded_content(run: RunDirectory) -> dict[str, dict[str, str]]:
    """Returns corpus -> split -> hash of the content that the run has recorded; empty without a record.

    Raises:
        ArtefactError: the record is damaged.
    """
    folders, record = run.corpus_folders(), durable.read_json(run.corpora)
    return {name: {split: value for split, value in record[name].items() if split != "folder"} for name in folders}


def require_content(run: RunDirectory, corpora: Sequence[str], folders: Mapping[str, str] | None = None) -> None:
    """Refuses to continue `run` on other content than it began with; returns nothing.

    Corpora that are missing, or that the run did not record, are not compared, and a run without a record passes.
    Hashes of the manifests are compared, tars are not read.

    Args:
        folders: corpus -> the folder that the run would read now; without it, those that it has recorded.

    Raises:
        ArtefactError: names the corpus, the splits that differ, and the run; or a manifest or the run's record cannot
            be read.
        OSError: a file cannot be read.
    """
    recorded, folder_of = recorded_content(run), {**run.corpus_folders(), **(folders or {})}
    for name in corpora:
        directory = run.work.corpus(folder_of.get(name, name))
        if name not in recorded or not manifest_path(directory).is_file():
            continue

        now, before = read_manifest(directory).content, recorded[name]
        if differing := [split for split in before if now.get(split) != before[split]]:
            split = differing[0]
            raise ArtefactError(
                f"{run.path} began on other content of corpus {name}: the tokens, lengths or masks of "
                f"{' and '.join(differing)} in {directory} have changed (hash {now.get(split, '')[:12]}, was "
                f"{before[split][:12]}): restore that corpus, or choose another run_id"
            )
