"""Reads one split of a corpus on disk: maps document numbers to offsets in its tars, and reads tokens from there.

Tars are read with `pread` through a bounded number of descriptors; those of an attached corpus through a cache
(`data.remote_corpus`). Every KiB that is read is compared with its checksum in the index of the split. Where the index
has no checksum yet, one process reads the member whole, compares it with the CRC-32 in the manifest and its tokens with
the vocabulary, and records the checksums for all processes.
"""

import os
import threading
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dist_lm.data.exclusions import excluded_documents
from dist_lm.data.manifest import BUILD_COMMAND, Shard, Split, is_attached, read_manifest, token_dtype
from dist_lm.data.order import DocumentSlice, SliceTable, following
from dist_lm.data.split_index import BLOCK, UNIT, SplitIndex
from dist_lm.data.unit_order import Units
from dist_lm.errors import ArtefactError

if TYPE_CHECKING:
    from dist_lm.data.remote_corpus import RemoteTars

OPEN_TARS = 64  # descriptors of one split


class TokenCorpus:
    """The documents of one split, numbered in the order of its tars.

    Properties of all documents are mapped arrays, which the processes of a node share (`SplitIndex`).
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        shards: Sequence[Shard],
        vocab_size: int,
        *,
        is_saved: bool = True,
        excluded: frozenset[int] = frozenset(),
    ) -> None:
        """Opens some of the tars of a split; `open` opens all of them.

        Args:
            is_saved: as in `SplitIndex`; False for some of the tars.
            excluded: the documents whose loss never counts (`data.exclusions`).

        Raises:
            ArtefactError, OSError: as `open`.
        """
        self.directory = directory
        self.split = split
        self.excluded = excluded
        self.is_remote = is_attached(directory)
        self._index = SplitIndex(directory, split, shards, vocab_size, is_saved=is_saved)
        self.languages = self._index.languages
        self.n_documents, self.n_tokens = self._index.n_documents, self._index.n_tokens
        self.has_mask = self._index.has_mask

        self._shards, self._vocab_size, self._dtype = shards, vocab_size, token_dtype(vocab_size)
        self._cure = f"build the corpus again with `{BUILD_COMMAND}`"
        self._tars: _Tars | RemoteTars
        if self.is_remote:
            from dist_lm.data import remote_corpus  # imports libraries that local corpora do not need

            self._cure = "upload an intact copy, and run `dist-lm data attach` again"
            self._tars = remote_corpus.RemoteTars(directory, shards)
        else:
            self._tars = _Tars([directory / shard.name for shard in shards])
        self._checked = bytearray(self._index.n_members)  # members that this process has compared with the manifest
        self._unit = _Unit(0, 0, _Area(0, 0, 0, 0, 0), 0, [])  # the one that was read last
        self._run = _Run(-1, 0, b"")  # the blocks that were read last

    @classmethod
    def open(cls, directory: Path, split: str) -> "TokenCorpus":
        """Returns the split of a corpus, after size and index of every tar were compared with the manifest.

        Tokens are checked when they are read. A missing or old index is built and saved (`SplitIndex`, `open_index`).

        Raises:
            ArtefactError: the corpus is missing, unfinished or damaged, differs from its manifest, or has no document
                in this split; or the list of its excluded documents is damaged.
            OSError: a tar cannot be read, or an index cannot be written.
        """
        manifest = read_manifest(directory)
        shards = manifest.splits.get(split, Split()).shards
        if not sum(shard.counts.documents for shard in shards):
            raise ArtefactError(
                f"corpus {directory} has no {split} documents: give it more text or another "
                f"corpus.val_fraction, then `{BUILD_COMMAND}`"
            )
        # Few corpora have excluded documents, and these are all in train.
        excluded: frozenset[int] = frozenset()
        if manifest.excluded and split == "train":
            excluded = excluded_documents(directory, manifest)
        return cls(directory, split, shards, manifest.recipe.vocab_size, excluded=excluded)

    # --- properties of all documents ---

    @property
    def lengths(self) -> np.ndarray:
        """(documents,) int32, mapped: tokens."""
        return self._index.column("lengths")

    @property
    def n_bytes(self) -> np.ndarray:
        """(documents,) uint32, mapped: UTF-8 bytes of the text."""
        return self._index.column("n_bytes")

    @property
    def language_codes(self) -> np.ndarray:
        """(documents,) uint8, mapped: positions in `languages`."""
        return self._index.column("languages")

    @property
    def continues(self) -> np.ndarray:
        """(documents,) bool, a new array: whether a document is of the repository of the one before it."""
        if not self._index.has_repositories:
            return np.zeros(self.n_documents, bool)
        return self._index.continues(np.arange(self.n_documents))

    @cached_property
    def units(self) -> Units:
        """Groups of up to 64 consecutive documents: the index finds a document by its unit, and `stage.order=units`
        shuffles units."""
        index = self._index
        documents = index.columns["unit_document"]
        has_repositories = index.has_repositories

        def border(unit: int, document: int) -> int:
            if not has_repositories:
                return document
            begin, end = index.unit_documents(unit)
            is_border = ~index.continues(np.arange(begin + document, end))
            first = int(is_border.argmax())
            return document + first if is_border[first] else 0

        return Units(
            documents=documents,
            tokens=index.columns["unit_token"],
            n_tokens=self.n_tokens,
            n_documents=self.n_documents,
            continues=index.continues(documents) if has_repositories else np.zeros(len(documents), bool),
            ends=index.unit_ends,
            lengths=index.unit_lengths,
            border=border,
        )

    # --- reading ---

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Reads tokens [start, stop) of a document: (stop - start,) uint16 or uint32, read-only.

        Raises:
            ArtefactError: the tar is damaged; the message names the file, the bytes and the documents.
        """
        return self.tokens_of([DocumentSlice(document, start, stop)])

    def tokens_of(self, slices: Sequence[DocumentSlice]) -> np.ndarray:
        """Reads the tokens of some slices, at least one, end to end: (n,) uint16 or uint32, read-only.

        Slices that are neighbours in a tar are read together.

        Raises:
            ArtefactError: as `tokens`.
            OSError: a tar cannot be read, or an index cannot be written.
        """
        width = self._dtype.itemsize
        spans: list[tuple[_Area, int, int]] = []  # tokens of a member: its area, the first, and the one behind the last
        for document, start, stop in slices:
            unit = self._unit_of(document)
            begin = unit.begin(document) + start
            end = begin + stop - start

            if spans and spans[-1][0].member == unit.tokens.member and spans[-1][2] == begin:
                spans[-1] = (unit.tokens, spans[-1][1], end)
            else:
                spans.append((unit.tokens, begin, end))

        contents = [self._read(area, width * begin, width * end) for area, begin, end in spans]
        return np.frombuffer(b"".join(contents), self._dtype)

    def located(self, table: SliceTable) -> list["LocatedSlices"]:
        """Looks up where the slices of each range lie, all at once; they are read later. No range is empty."""
        columns, documents = self._index.columns, table.documents
        units = np.searchsorted(columns["unit_document"], documents, side="right") - 1
        places = documents - columns["unit_document"][units]
        is_before = np.arange(UNIT) < places[:, None]
        tokens_before = np.where(is_before, self._index.unit_lengths(units), 0).sum(1)
        begins = columns["unit_token"][units] + tokens_before + table.starts  # tokens of the split
        ends = begins + table.stops - table.starts
        members = columns["unit_member"][units].astype(np.int64)

        # Slices of a range that are neighbours in a member are read together.
        range_ends = np.cumsum(table.counts)
        is_first = np.ones(len(documents), bool)
        is_first[1:] = (begins[1:] != ends[:-1]) | (members[1:] != members[:-1])
        is_first[range_ends - table.counts] = True
        firsts = np.flatnonzero(is_first)
        begins, ends = begins[firsts], ends[np.append(firsts[1:], len(documents)) - 1]
        members = members[firsts]

        # Whole blocks are read; the last one of a member may be shorter.
        width = self._dtype.itemsize
        first_tokens = columns["member_token"][members]
        sizes = width * (following(columns["member_token"], members, self.n_tokens) - first_tokens)
        begins, ends = width * (begins - first_tokens), width * (ends - first_tokens)
        first_blocks, end_blocks = begins // BLOCK, -(-ends // BLOCK)
        read_begins, read_ends = first_blocks * BLOCK, np.minimum(end_blocks * BLOCK, sizes)
        blocks = columns["member_block"][members]
        fields = (
            members,
            columns["member_tar"][members],
            columns["member_tokens"][members] + read_begins,
            read_ends - read_begins,
            blocks + first_blocks,
            blocks + end_blocks,
            begins - read_begins,
            (ends - begins) // width,
        )
        spans = list(map(_Span, *(field.tolist() for field in fields)))
        span_ends = np.searchsorted(firsts, range_ends).tolist()
        return [LocatedSlices(self, spans[i:j]) for i, j in pairwise([0, *span_ends])]

    def read_span(self, span: "_Span") -> np.ndarray:
        """Reads the tokens of a span, and compares the blocks that hold them with their checksums.

        Raises:
            ArtefactError: as `tokens`.
        """
        content = self._tars.read(span.tar, span.offset, span.size)
        view = memoryview(content)
        checksums = [zlib.crc32(view[i : i + BLOCK]) for i in range(0, span.size, BLOCK)]
        if checksums != self._index.columns["checksums"][span.block : span.end_block].tolist():
            # They are not known yet, or the member is damaged.
            content = self._read_blocks(self._tokens_of(span.member), span.block, span.end_block)
        return np.frombuffer(content, self._dtype, span.n_tokens, span.skipped)

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Reads the loss mask of tokens [start, stop): (stop - start,) uint8; ones if the document has no mask.

        Raises:
            ArtefactError: the tar is damaged, as `tokens`.
            OSError: a tar cannot be read, or an index cannot be written.
        """
        unit = self._unit_of(document)
        mask = self._mask_of(unit.tokens.member)
        if mask is None:  # no document of the member has a mask
            return np.ones(stop - start, np.uint8)
        begin = unit.begin(document)
        return np.frombuffer(self._read(mask, begin + start, begin + stop), np.uint8)

    @property
    def waits_for_store(self) -> bool:
        """Whether the server of an attached corpus fails now and is asked again."""
        return self._tars.waits_for_store

    def stop_waiting(self) -> None:
        """Makes further errors of the server of an attached corpus final, so that a run can end while it fails."""
        self._tars.stop_waiting()

    def read_ahead(self, slices: Sequence[DocumentSlice], pool: Executor) -> None:
        """Has a pool fetch what `tokens_of` and `mask` will read of some slices; only for a remote corpus.

        A member is fetched whole if its checksums are not known yet, or if it has a mask.

        Raises:
            ArtefactError: a tar is missing or damaged.
            OSError: a tar cannot be read, or an index cannot be written.
        """
        assert not isinstance(self._tars, _Tars), f"{self.directory} is local"
        columns, width = self._index.columns, self._dtype.itemsize
        for document, start, stop in slices:
            unit = self._open_unit(document)
            area, begin = unit.tokens, unit.begin(document)
            first_block = area.block + width * (begin + start) // BLOCK
            if columns["checksums"].item(first_block) == 0 or columns["member_mask"].item(area.member) >= 0:
                member_begin = columns["member_begin"].item(area.member)
                member_size = columns["member_end"].item(area.member) - member_begin
                self._tars.read_ahead(area.tar, member_begin, member_size, pool)
            else:
                self._tars.read_ahead(area.tar, area.offset + width * (begin + start), width * (stop - start), pool)

    def members(self) -> Iterator[tuple[range, np.ndarray]]:
        """Yields the documents of each member, and their tokens end to end (uint16 or uint32), in their order.

        Raises:
            ArtefactError: a tar is damaged.
        """
        for member in range(len(self._checked)):
            area = self._tokens_of(member)
            tokens = np.frombuffer(self._read(area, 0, area.size), dtype=self._dtype)
            yield self._documents_of(member), tokens

    def check(self) -> None:
        """Reads every member that this process has not compared with the manifest yet, and does that; returns nothing.

        Raises:
            ArtefactError: a member is damaged.
        """
        for member in range(len(self._checked)):
            if not self._checked[member]:
                self._check(member)

    def _unit_of(self, document: int) -> "_Unit":
        # Documents are read one behind the other, so most are of the unit of the one before.
        unit = self._unit
        if not unit.first <= document < unit.end:
            unit = self._unit = self._open_unit(document)
        return unit

    def _open_unit(self, document: int) -> "_Unit":
        columns = self._index.columns
        unit = bisect_right(columns["unit_document"], document) - 1
        first, end = self._index.unit_documents(unit)
        member = columns["unit_member"].item(unit)
        return _Unit(
            first, end, self._tokens_of(member), columns["member_token"].item(member), self._index.unit_ends(unit)
        )

    def _documents_of(self, member: int) -> range:
        firsts = self._index.columns["member_document"]
        end = firsts.item(member + 1) if member + 1 < len(firsts) else self.n_documents
        return range(firsts.item(member), end)

    def _tokens_of(self, member: int) -> "_Area":
        columns = self._index.columns
        begins = columns["member_token"]
        end = begins.item(member + 1) if member + 1 < len(begins) else self.n_tokens
        size = (end - begins.item(member)) * self._dtype.itemsize
        return _Area(
            member,
            self._tar_of(member),
            columns["member_tokens"].item(member),
            size,
            columns["member_block"].item(member),
        )

    def _mask_of(self, member: int) -> "_Area | None":
        offset = self._index.columns["member_mask"].item(member)
        if offset < 0:
            return None
        tokens = self._tokens_of(member)
        return tokens._replace(
            offset=offset, size=tokens.size // self._dtype.itemsize, block=tokens.block - (-tokens.size // BLOCK)
        )

    def _read(self, area: "_Area", begin: int, end: int) -> bytes:
        """Reads bytes [begin, end) of the tokens or the mask of a member.

        What is read are the whole blocks that hold them, and these are compared with their checksums. The last blocks
        are kept, because the next documents mostly begin in them.

        Raises:
            ArtefactError: the tar is damaged.
        """
        run, block = self._run, area.block + begin // BLOCK
        stop = area.block - (-end // BLOCK)
        if run.begin <= block < run.end:
            offset = (run.begin - area.block) * BLOCK
            if stop <= run.end:
                return run.content[begin - offset : end - offset]
            content = run.content[(block - run.begin) * BLOCK :]
            content += self._read_blocks(area, run.end, stop)
        else:
            content = self._read_blocks(area, block, stop)

        self._run = _Run(block, stop, content)
        offset = (block - area.block) * BLOCK
        return content[begin - offset : end - offset]

    def _read_blocks(self, area: "_Area", first: int, end: int) -> bytes:
        """Reads blocks [first, end), counted in the split, and compares them with their checksums.

        Raises:
            ArtefactError: the tar is damaged.
        """
        checksums = self._index.columns["checksums"][first:end].tolist()
        if 0 in checksums and not self._checked[area.member]:
            self._check(area.member)
            checksums = self._index.columns["checksums"][first:end].tolist()

        begin = (first - area.block) * BLOCK
        size = min((end - area.block) * BLOCK, area.size) - begin
        content = self._tars.read(area.tar, area.offset + begin, size)
        if not _is_whole(content, checksums):
            # Either the checksums are wrong, and are made again, or the member is damaged, which is an error.
            self._check(area.member)
            content = self._tars.read(area.tar, area.offset + begin, size)
        return content

    def _tar_of(self, member: int) -> int:
        return self._index.columns["member_tar"].item(member)

    def _check(self, member: int) -> None:
        """Reads a member whole, and compares it with the manifest and its tokens with the vocabulary.

        Marks the member as compared, and records the checksums of its blocks for all processes.

        Raises:
            ArtefactError: they do not match, or the tar cannot be read; names the tar, the bytes and the documents.
        """
        columns = self._index.columns
        begin, end = columns["member_begin"].item(member), columns["member_end"].item(member)
        tar, documents = self._tar_of(member), self._documents_of(member)
        content = memoryview(self._tars.read(tar, begin, end - begin))

        # The documents say what a user loses; the bytes, where a disk may be bad.
        span = (
            f"{self._tars.paths[tar]}: bytes {begin:,} to {end:,} "
            f"(documents {documents.start:,} to {documents.stop - 1:,})"
        )

        # The manifest has the checksums of a tar's members in the order of the tar.
        number_in_tar = member - bisect_left(columns["member_tar"], tar)
        expected = self._shards[tar].checksum(number_in_tar)
        if zlib.crc32(content) != expected and self._tars.forget(tar, begin, end - begin):
            # The cache may be damaged where the remote tar is not.
            content = memoryview(self._tars.read(tar, begin, end - begin))
        if (checksum := zlib.crc32(content)) != expected:
            raise ArtefactError(f"{span} are damaged: CRC-32 {checksum:08x}, expected {expected:08x}: {self._cure}")

        # On a GPU an id past the embedding is a device-side assertion, which names no file.
        tokens, mask = self._tokens_of(member), self._mask_of(member)
        ids = np.frombuffer(content, self._dtype, tokens.size // self._dtype.itemsize, tokens.offset - begin)
        if len(ids) and (largest := int(ids.max())) >= self._vocab_size:
            raise ArtefactError(
                f"{span} hold token {largest}, but the vocabulary of their tokenizer ends at "
                f"{self._vocab_size - 1}: build the corpus again with `{BUILD_COMMAND}`"
            )

        # From now on every process compares the blocks that it reads, and none reads the member whole again.
        for area in filter(None, [tokens, mask]):
            at = area.offset - begin
            self._index.record_checksums(area.block, block_checksums(content[at : at + area.size]))
        self._checked[member] = 1


class _Area(NamedTuple):
    """The tokens or the mask of a member."""

    member: int
    tar: int
    offset: int  # bytes from the start of the tar
    size: int  # bytes
    block: int  # number of its first block in the split


class _Unit(NamedTuple):
    """Consecutive documents of a member."""

    first: int  # document
    end: int  # document behind the last
    tokens: _Area  # tokens of the member that holds the unit
    member_token: int  # tokens of the split before the member
    ends: list[int]  # tokens of the split before each document, and before the end of the last

    def begin(self, document: int) -> int:
        """Returns the tokens of the member before a document."""
        return self.ends[document - self.first] - self.member_token


class _Span(NamedTuple):
    """Consecutive tokens of a member, and the blocks that hold them."""

    member: int
    tar: int
    offset: int  # bytes from the start of the tar to the first block
    size: int  # bytes of the blocks
    block: int  # numbers of the blocks in the split
    end_block: int
    skipped: int  # bytes of the first block before the tokens
    n_tokens: int


class LocatedSlices(NamedTuple):
    """The slices of one sequence with the bytes of the tars where their tokens lie, looked up before they are read."""

    corpus: TokenCorpus
    spans: list[_Span]
    has_mask = False

    def tokens_of(self, slices: Sequence[DocumentSlice]) -> np.ndarray:
        """Reads the tokens of the slices that were located, end to end: (n,) uint16 or uint32.

        Args:
            slices: the same slices; they are not looked at, because their places are known.

        Raises:
            ArtefactError: the tar is damaged.
        """
        parts = [self.corpus.read_span(span) for span in self.spans]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def mask(self, document: int, start: int, stop: int) -> np.ndarray:
        """Reads the loss mask of a slice."""
        return self.corpus.mask(document, start, stop)


class _Run(NamedTuple):
    """Consecutive blocks of an area, as they were read."""

    begin: int  # numbers in the split
    end: int
    content: bytes


def block_checksums(content: memoryview) -> list[int]:
    """Returns the CRC-32 of each block; 1 in place of 0, which stands for a block whose checksum is not known."""
    return [zlib.crc32(content[i : i + BLOCK]) or 1 for i in range(0, len(content), BLOCK)]


def _is_whole(content: bytes, checksums: Sequence[int]) -> bool:
    """Returns whether blocks have these checksums; one of 0 is not compared."""
    crcs = block_checksums(memoryview(content))
    return crcs == checksums or all(expected in (0, crc) for crc, expected in zip(crcs, checksums, strict=True))


class _Tars:
    """Reads tars by number. At most `OPEN_TARS` are open, those that were read last."""

    waits_for_store = False  # as in `RemoteTars`

    def stop_waiting(self) -> None:
        """Does nothing, as nothing waits."""

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
            size_now = self.paths[tar].stat().st_size
            raise ArtefactError(
                f"{self.paths[tar]}: ends at byte {size_now:,} of the {offset + size:,} that were "
                f"expected: build the corpus again with `{BUILD_COMMAND}`"
            )
        return content

    def forget(self, tar: int, offset: int, size: int) -> bool:
        """Returns False: bytes of a local file do not come again from elsewhere."""
        return False

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
