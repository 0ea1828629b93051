"""A split of a corpus, mapped into memory: any document at any token, without reading the rest."""

import mmap
from pathlib import Path

import numpy as np

from dist_lm.data.index import BUILD_COMMAND, ShardIndex, open_index
from dist_lm.data.manifest import read_manifest, shard_state
from dist_lm.errors import ArtefactError


class MappedCorpus:
    """The documents of one split, numbered as they lie in its tars.

    Read-only. Properties of documents are arrays: nothing is allocated a document.
    """

    def __init__(self, directory: Path, split: str, tars: list[Path], indices: list[ShardIndex]) -> None:
        """Use `open`; `indices` belong to `tars`."""
        self.directory = directory
        self.split = split
        self.languages = sorted({name for index in indices for name in index.languages})
        entries = [index.entries for index in indices]
        self.lengths = _column(entries, "length", np.int64)  # (documents,) tokens
        self.n_bytes = _column(entries, "n_bytes", np.int64)  # (documents,) UTF-8 bytes
        self.language_codes = np.concatenate([self._recode(index) for index in indices])  # (documents,) uint8
        self.n_documents = len(self.lengths)
        self.n_tokens = int(self.lengths.sum())

        self._shard = np.repeat(np.arange(len(tars)), [len(shard) for shard in entries])
        self._start = _column(entries, "offset", np.int64) // 2  # uint16 elements from the start of the tar
        self._mask_start = _column(entries, "mask_offset", np.int64)
        self.has_mask = bool((self._mask_start >= 0).any())
        self._bytes = [_map(tar) for tar in tars]
        self._tokens = [content.view("<u2") for content in self._bytes]

    @classmethod
    def open(cls, directory: Path, split: str) -> "MappedCorpus":
        """Map every tar that the manifest lists for `split`.

        Raises `ArtefactError` if the corpus or the split is missing, empty, or not what the manifest says.
        Sizes are compared, and the hash that the index remembers; a tar that was touched since is hashed again.
        """
        manifest = read_manifest(directory)
        shards = manifest.splits[split].shards if split in manifest.splits else ()
        if not shards:
            raise ArtefactError(
                f"corpus {directory} has no {split} documents: give it more text or another "
                f"corpus.val_fraction, then `{BUILD_COMMAND}`"
            )
        tars = [directory / shard.name for shard in shards]
        for tar, shard in zip(tars, shards, strict=True):
            if (state := shard_state(tar, shard, hashes=False)) != "ok":
                raise ArtefactError(f"{tar}: {state}: build the corpus again with `{BUILD_COMMAND}`")
        indices = [open_index(tar) for tar in tars]
        for tar, shard, index in zip(tars, shards, indices, strict=True):
            if index.tar_sha256 != shard.sha256:
                raise ArtefactError(
                    f"{tar}: other contents than the manifest says (sha256): build it again with `{BUILD_COMMAND}`"
                )
        return cls(directory, split, tars, indices)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document: a view (stop - start,) uint16, read-only."""
        begin = self._start.item(document)  # a Python integer: NumPy's own cost as much as the rest
        return self._tokens[self._shard.item(document)][begin + start : begin + stop]

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """The loss mask of tokens [start, stop): (stop - start,) uint8, ones where the corpus has none."""
        begin = self._mask_start.item(document)
        if begin < 0:
            return np.ones(stop - start, np.uint8)
        return self._bytes[self._shard.item(document)][begin + start : begin + stop]

    def _recode(self, index: ShardIndex) -> np.ndarray:
        """Language codes of one shard in terms of `self.languages`."""
        codes = np.array([self.languages.index(name) for name in index.languages], np.uint8)
        return codes[index.entries["language"]]


def _column(entries: list[np.ndarray], name: str, dtype: type) -> np.ndarray:
    return np.concatenate([shard[name].astype(dtype) for shard in entries])


def _map(path: Path) -> np.ndarray:
    """The file as read-only uint8. A plain array: slicing a `np.memmap` costs several times as much."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
