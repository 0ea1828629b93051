"""Reads one split of a corpus on disk: maps document numbers to offsets in its tars, and reads tokens from there.

Tars are read with `pread` through a bounded number of descriptors. Before its first use, a member is compared with its
CRC-32 in the manifest, and its tokens with the vocabulary.
"""

import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dist_lm.data.index import ShardIndex, open_index
from dist_lm.data.manifest import BUILD_COMMAND, Shard, Split, read_manifest, token_dtype
from dist_lm.errors import ArtefactError

OPEN_TARS = 64  # descriptors of one split


class TokenCorpus:
    """The documents of one split, numbered in the order of its tars.

    Read-only. Properties of all documents are arrays; there is no object for each document.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        shards: Sequence[Shard],
        indices: Sequence[ShardIndex],
        vocab_size: int,
    ) -> None:
        """Use `open` instead. `indices`: one for each of `shards`."""
        self.directory = directory
        self.split = split
        self.languages = sorted({name for index in indices for name in index.languages})
        self.lengths = _column(indices, "length")  # (documents,) tokens
        self.n_bytes = _column(indices, "n_bytes")  # (documents,) UTF-8 bytes
        self.language_codes = np.concatenate([self._recode(index) for index in indices])  # (documents,) uint8
        # (documents,) bool: whether it is of the same repository as the document before it
        self.continues = _column(indices, "continues").astype(bool)
        self.n_documents = len(self.lengths)
        self.n_tokens = int(self.lengths.sum())
        self.has_mask = any(bool((index.members["mask"] >= 0).any()) for index in indices)

        self._vocab_size, self._dtype = vocab_size, token_dtype(vocab_size)
        self._tars = _Tars([directory / shard.name for shard in shards])

        # Arrays from document to member, and from member to tar, so that a read searches nothing.
        self._members = np.concatenate([index.members for index in indices])
        n_documents = self._members["documents"].astype(np.int64)  # (members,)
        self._tar_of = np.repeat(np.arange(len(shards), dtype=np.int32), [len(index.members) for index in indices])
        self._member_of = np.repeat(np.arange(len(n_documents), dtype=np.int32), n_documents)

        self._firsts = np.cumsum(n_documents) - n_documents  # (members,) number of the first document
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        # (documents,) tokens of the same member before the document
        self._start = (starts[:-1] - np.repeat(starts[self._firsts], n_documents)).astype(np.uint32)

        self._token_offset = self._members["tokens"].copy()
        self._mask_offset = self._members["mask"].copy()
        self._checksums = [checksum for shard in shards for checksum in shard.checksums()]
        self._checked = bytearray(len(n_documents))

    @classmethod
    def open(cls, directory: Path, split: str) -> "TokenCorpus":
        """Returns the split of a corpus, after size and index of every tar were compared with the manifest.

        Members are checked later, before their first use. A missing or old index is built and saved (`open_index`).

        Raises:
            ArtefactError: the corpus is missing, unfinished or damaged, differs from its manifest, or has no document
                in this split.
            OSError: a tar cannot be read, or an index cannot be written.
        """
        manifest = read_manifest(directory)
        shards = manifest.splits.get(split, Split()).shards
        if not sum(shard.counts.documents for shard in shards):
            raise ArtefactError(
                f"corpus {directory} has no {split} documents: give it more text or another "
                f"corpus.val_fraction, then `{BUILD_COMMAND}`"
            )

        indices = [open_index(directory / shard.name, shard) for shard in shards]

        # Read with another width, tokens would be halves or pairs.
        width = token_dtype(manifest.recipe.vocab_size).itemsize
        for shard, index in zip(shards, indices, strict=True):
            if index.token_bytes != width and len(index.documents):
                raise ArtefactError(
                    f"{directory / shard.name}: tokens of {index.token_bytes} bytes, but a vocabulary of "
                    f"{manifest.recipe.vocab_size:,} takes {width}: build it again with `{BUILD_COMMAND}`"
                )
        return cls(directory, split, shards, indices, manifest.recipe.vocab_size)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Reads tokens [start, stop) of a document: (stop - start,) uint16 or uint32, read-only.

        Raises:
            ArtefactError: the tar is damaged; the message names the file, the bytes and the documents.
        """
        member = self._member(document)
        begin = self._start.item(document) + start  # a Python integer is much faster than a NumPy one
        width = self._dtype.itemsize
        offset = self._token_offset.item(member) + width * begin
        content = self._tars.read(self._tar_of.item(member), offset, width * (stop - start))
        return np.frombuffer(content, dtype=self._dtype)

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Reads the loss mask of tokens [start, stop): (stop - start,) uint8; ones if the document has no mask.

        Raises:
            ArtefactError: the tar is damaged, as `tokens`.
        """
        member = self._member(document)
        begin = self._mask_offset.item(member)
        if begin < 0:  # no document of the member has a mask
            return np.ones(stop - start, np.uint8)
        begin += self._start.item(document) + start
        return np.frombuffer(self._tars.read(self._tar_of.item(member), begin, stop - start), np.uint8)

    def members(self) -> Iterator[tuple[range, np.ndarray]]:
        """Yields the documents of each member, and their tokens end to end (uint16 or uint32), in their order.

        Raises:
            ArtefactError: a tar is damaged.
        """
        for first, n_documents in zip(self._firsts.tolist(), self._members["documents"].tolist(), strict=True):
            documents = range(first, first + n_documents)
            n_tokens = int(self.lengths[first : first + n_documents].sum())
            yield documents, self.tokens(first, 0, n_tokens)

    def check(self) -> None:
        """Reads and checks every member that was not read yet; returns nothing.

        Raises:
            ArtefactError: a member is damaged.
        """
        for member in range(len(self._checked)):
            if not self._checked[member]:
                self._check(member)

    def _member(self, document: int) -> int:
        """Returns the member that holds `document`, and checks it before its first use.

        Raises:
            ArtefactError: the tar is damaged.
        """
        member = self._member_of.item(document)
        if not self._checked[member]:
            self._check(member)
        return member

    def _check(self, member: int) -> None:
        """Reads a member whole, compares it with its checksum and its tokens with the vocabulary, and notes that.

        Raises:
            ArtefactError: they do not match, or the tar cannot be read; names the tar, the bytes and the documents.
        """
        begin, end, first_token, _, documents = self._members[member].tolist()
        tar, first = self._tar_of.item(member), self._firsts.item(member)
        content = self._tars.read(tar, begin, end - begin)
        span = f"{self._tars.paths[tar]}: bytes {begin:,} to {end:,} (documents {first:,} to {first + documents - 1:,})"
        if (checksum := zlib.crc32(content)) != self._checksums[member]:
            raise ArtefactError(
                f"{span} are damaged: CRC-32 {checksum:08x}, expected {self._checksums[member]:08x}: "
                f"build the corpus again with `{BUILD_COMMAND}`"
            )

        # On a GPU an id past the embedding is a device-side assertion, which names no file.
        n_tokens = int(self.lengths[first : first + documents].sum())
        ids = np.frombuffer(content, self._dtype, n_tokens, first_token - begin)
        if n_tokens and (largest := int(ids.max())) >= self._vocab_size:
            raise ArtefactError(
                f"{span} hold token {largest}, but the vocabulary of their tokenizer ends at "
                f"{self._vocab_size - 1}: build the corpus again with `{BUILD_COMMAND}`"
            )
        self._checked[member] = 1

    def _recode(self, index: ShardIndex) -> np.ndarray:
        """Maps the language codes of one shard to indices in `self.languages`."""
        codes = np.array([self.languages.index(name) for name in index.languages], np.uint8)
        return codes[index.documents["language"]]


class _Tars:
    """Reads tars by number. At most `OPEN_TARS` are open, those that were read last."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._open: dict[int, int] = {}  # tar -> descriptor, the one read last at the end
        self._files: dict[int, tuple[int, int]] = {}  # tar -> (inode, size) when it was first opened
        self._lock = threading.Lock()  # a descriptor must not be closed while another thread reads from it

    def read(self, tar: int, offset: int, size: int) -> bytes:
        """Returns `size` bytes of a tar from `offset`. Several threads may call it.

        Raises:
            ArtefactError: the file is gone, was replaced, or ends earlier.
        """
        try:
            with self._lock:
                descriptor = self._open.pop(tar, None)
                if descriptor is None:
                    descriptor = self._opened(tar)
                self._open[tar] = descriptor  # behind all others: it was read last
                content = os.pread(descriptor, size, offset)
        except OSError as error:
            raise ArtefactError(
                f"{self.paths[tar]}: cannot be read at byte {offset:,} ({error.strerror}): restore it, or build the "
                f"corpus again with `{BUILD_COMMAND}`"
            ) from error

        if len(content) != size:
            raise ArtefactError(
                f"{self.paths[tar]}: ends at byte {offset + len(content):,} of the {offset + size:,} that were "
                f"expected: build the corpus again with `{BUILD_COMMAND}`"
            )
        return content

    def _opened(self, tar: int) -> int:
        """Returns the descriptor of a tar, opened; closes those that were not read for the longest time.

        The caller holds the lock and remembers the descriptor.

        Raises:
            ArtefactError: the file is another one than when it was opened before.
            OSError: it cannot be opened.
        """
        while len(self._open) >= OPEN_TARS:
            least_recent = next(iter(self._open))
            os.close(self._open.pop(least_recent))

        # A tar that is opened again must be the file whose members were checked.
        descriptor = os.open(self.paths[tar], os.O_RDONLY)
        status = os.fstat(descriptor)
        if self._files.setdefault(tar, (status.st_ino, status.st_size)) != (status.st_ino, status.st_size):
            os.close(descriptor)
            raise ArtefactError(f"{self.paths[tar]}: was replaced while it was read: start the command again")
        return descriptor

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _column(indices: Sequence[ShardIndex], name: str) -> np.ndarray:
    """Concatenates a property of all documents: (documents,) int64."""
    return np.concatenate([index.documents[name].astype(np.int64) for index in indices])
