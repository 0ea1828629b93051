"""Writes tokenized documents to webdataset tars, and the manifest that completes a corpus.

A member of a tar groups many documents (one document a member costs 3.6 times the bytes):

    KEY.tokens.npy     (tokens,) uint16     the documents, concatenated; each begins with end-of-text.
                                            uint32 if the vocabulary has more than 65,536 entries
    KEY.lengths.npy    (documents,) uint32  tokens
    KEY.bytes.npy      (documents,) uint32  UTF-8 bytes of the text
    KEY.languages.npy  (documents,) uint8   codes
    KEY.mask.npy       (tokens,) uint8      only if a document has a loss mask; 1: the token is learned
    KEY.continues.npy  (documents,) uint8   1: of the same repository as the document before; only if a document has a 1
    KEY.branch.npy ... only for rankings: see `data.rankings.shards`
    KEY.meta.json      {"languages": {code: name}}

Sources and licences lie beside the tar, in `.origins.jsonl.zst`, one object per document: {"source", "licence",
"from": number of the source in the configuration, "own": true if its row gave the licence}. So a corrected licence
changes no tar.
What is kept of the rows of conversations and rankings lies in `.rows.jsonl.zst`, a line for each document: JSON of
`{"document", "columns"}` (`chat.documents.row_of`), or an empty line. There is no such file if no document has a row.
Equal documents give equal bytes.
"""

import hashlib
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Protocol, Self

import numpy as np
import zstandard

from dist_lm.config.corpus import SPLITS
from dist_lm.data.index import ShardIndex, build_index, member_checksums, open_index, save_index
from dist_lm.data.journal import Journal, rows_path, rows_state
from dist_lm.data.manifest import (
    Counts,
    Manifest,
    Recipe,
    Shard,
    Split,
    index_path,
    read_manifest,
    token_dtype,
    write_manifest,
)
from dist_lm.data.rankings.shards import member_parts
from dist_lm.document import TokenizedDocument
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable

_OWNER = "dist_lm"
_MODE = 0o644


class Origin(NamedTuple):
    """The source and the licence of a document."""

    source: str  # path or data set id and row
    licence: str
    number: int  # position of the source in the configuration of the corpus
    own: bool = False  # the row gave the licence


class CorpusWriter:
    """Writes the tars of a corpus; a context manager.

    Entering it makes the corpus incomplete until `finish`. Tars that an earlier build with the same recipe finished are
    kept: the first `kept[split]` documents of each split must not be written again.
    """

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory = directory
        self.recipe = recipe
        self.kept: dict[str, int] = {}

    def __enter__(self) -> Self:
        """Begins or continues the build; the corpus is incomplete until `finish`.

        Raises:
            ArtefactError: the folder holds files that are not ours, or its manifest or journal is damaged.
        """
        self._journal = Journal.start(self.directory, self.recipe)
        self.kept = self._journal.documents
        self._splits = {split: SplitWriter(split, self._journal) for split in SPLITS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in self._splits.values():
            split.abandon_tar()

    def pass_over(self, split: str, text: bytes) -> None:
        """Compares a document of the sources with the one that a kept tar holds in its place.

        Args:
            text: a hash of its text, as in `write`.

        Raises:
            ArtefactError: the tar was made of other documents, which is known at its last one.
        """
        self._splits[split].pass_over(text)

    def write(self, split: str, document: TokenizedDocument, source: int = 0, text: bytes = b"") -> None:
        """Appends one document to `train` or `val`; full members are written, and full tars closed and recorded.

        Args:
            source: number of its source in the configuration.
            text: a hash of its text, with which a later build compares what it would write.

        Raises:
            OSError: a file cannot be written.
        """
        self._splits[split].write(document, source, text)

    def finish_split(self, split: str) -> None:
        """Writes the pending documents of a split, and closes its tar: no document of it follows.

        Raises:
            OSError: a file cannot be written.
        """
        self._splits[split].finish()

    def finish(
        self,
        ingest: Mapping[str, Any],
        licences: Sequence[str] = (),
        inputs: Sequence[Sequence[Mapping[str, Any]]] = (),
        settings: Mapping[str, Any] | None = None,
        documents: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Writes the last tars and the manifest, which declares the corpus complete, and removes the journal.

        Arguments: as in `Manifest`; None is empty. Returns the manifest, with all kept and new tars.

        Raises:
            ArtefactError: a tar on disk differs from what was written; the corpus stays incomplete.
            OSError: a file cannot be written.
        """
        for name in self._splits:
            self.finish_split(name)
        return complete(self._journal, ingest, licences, inputs, settings, documents)


def complete(
    journal: Journal,
    ingest: Mapping[str, Any],
    licences: Sequence[str] = (),
    inputs: Sequence[Sequence[Mapping[str, Any]]] = (),
    settings: Mapping[str, Any] | None = None,
    documents: Mapping[str, str] | None = None,
    decisions: str = "",
    excluded: Mapping[str, Any] | None = None,
) -> Manifest:
    """Writes the manifest of the finished tars of a journal, which it removes. As `CorpusWriter.finish`.

    Args:
        decisions, excluded: as in `Manifest`.

    Raises:
        ArtefactError: an index is damaged. OSError: a file cannot be read or written.
    """
    splits = {}
    for name, shards in journal.finished.items():
        # Opening an index compares the tar on disk with its entry once more.
        indices = (open_index(journal.directory / shard.name, shard) for shard in shards)
        splits[name] = Split(tuple(shards), _by_language(indices))
    manifest = Manifest(
        journal.recipe,
        splits,
        dict(ingest),
        licences,
        inputs,
        settings or {},
        documents or {},
        decisions,
        excluded or {},
    )
    write_manifest(journal.directory, manifest)
    journal.close()
    return manifest


class Tars(Protocol):
    """The tars that a `SplitWriter` writes, by split: a `Journal`, or those of one task."""

    directory: Path
    recipe: Recipe
    finished: dict[str, list[Shard]]

    @property
    def documents(self) -> dict[str, int]:
        """The number of documents of each split before the first one that is written."""
        ...

    def begin(self, split: str) -> str:
        """Returns the name of the next tar of a split."""
        ...

    def finish(self, split: str, shard: Shard) -> None:
        """Records a tar whose files are on disk."""
        ...


class SplitWriter:
    """Writes the tars of one split."""

    def __init__(self, split: str, journal: Tars) -> None:
        self._split, self._journal, self._recipe = split, journal, journal.recipe
        self._documents = journal.documents[split]
        self._path = journal.directory  # replaced by that of the tar when one is begun
        self._dtype = token_dtype(journal.recipe.vocab_size)
        self._pending: list[TokenizedDocument] = []
        self._origins: list[Origin] = []  # one for each document of `_pending`
        self._texts = (
            hashlib.sha256()
        )  # hashes the texts that `_pending` and the open tar hold, or that are passed over
        self._passed = 0  # documents of a kept tar
        self._to_pass = list(journal.finished[split])  # kept tars whose documents are not all passed over
        self._tar: Any = None
        self._file: IO[bytes] | None = None
        self._clear()

    def pass_over(self, text: bytes) -> None:
        """Adds the hash of a document's text to those that a finished tar is compared by (`CorpusWriter.pass_over`).

        The tar is compared when its last document has been passed over.

        Args:
            text: a hash of the text, as in `CorpusWriter.write`.

        Raises:
            ArtefactError: the tar was made of other documents.
        """
        shard = self._to_pass[0]
        self._texts.update(text)
        self._passed += 1
        if self._passed < shard.counts.documents:
            return

        if self._texts.hexdigest() != shard.texts:
            directory = self._journal.directory
            raise ArtefactError(
                f"{directory / shard.name} was made of other documents than its sources give now: they have changed, "
                f"although their sizes and times are the same; remove {directory} to build it again"
            )
        self._texts, self._passed = hashlib.sha256(), 0
        del self._to_pass[0]

    def write(self, document: TokenizedDocument, source: int, text: bytes) -> None:
        """Keeps one document, and writes the kept ones when they fill a member; that may close the tar.

        Args:
            document: with tokens of the corpus' dtype, at least one, and a mask of as many (asserted).
            source, text: as in `CorpusWriter.write`.

        Raises:
            OSError: a file cannot be written.
        """
        # A wrong document would be found only by its readers, in a tar that is written and hashed.
        tokens, mask = document.tokens, document.loss_mask
        assert tokens.dtype == self._dtype, (tokens.dtype, self._recipe.vocab_size)
        assert len(tokens) > 0, "a document begins with end-of-text"
        assert mask is None or (mask.dtype == np.uint8 and mask.shape == tokens.shape), "one uint8 per token"
        self._pending.append(document)
        self._texts.update(text)
        self._origins.append(Origin(document.source, document.licence, source, document.own_licence))
        if len(self._pending) == self._recipe.documents_per_member:
            self._flush_member()

    def finish(self) -> None:
        """Writes the pending documents and closes the tar."""
        self._flush_member()
        self._finish_tar()

    def abandon_tar(self) -> None:
        """Closes and removes an unfinished tar, if there is one; an error of closing is not raised."""
        if self._tar is None or self._file is None:
            return
        for opened in (self._tar, self._file):
            with suppress(OSError):  # closing may fail too; the first error is the one to report
                opened.close()
        self._temporary.unlink(missing_ok=True)

    def _clear(self) -> None:
        """Resets the state before the first document of a tar, so that its bytes depend on no other tar."""
        self._tar, self._file = None, None
        self._members = self._tokens = 0  # written to the tar
        self._content_hash = 0  # sum of the hashes of its documents
        self._languages: dict[str, int] = {}
        self._repository = ""  # repository of the last document
        self._tar_origins: list[Origin] = []
        self._tar_rows: list[bytes] = []  # compressed lines
        self._has_rows = False
        # Frames of members, one behind the other, so that the rows of a tar are never in memory at once.
        self._compressor = zstandard.ZstdCompressor(write_checksum=True)

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(f".{self._path.name}.tmp")

    def _flush_member(self) -> None:
        """Writes the pending documents as one member of the tar, which it begins if none is open.

        Closes the tar when it has `shard_tokens` tokens (0: never). Does nothing without documents.

        Raises:
            OSError: a file cannot be written.
        """
        documents, self._pending = self._pending, []
        if not documents:
            return
        tar = self._tar or self._start_tar()

        # Language codes and the last repository are those of this tar; document numbers run over the whole split.
        continues = []
        for document in documents:
            self._languages.setdefault(document.language, len(self._languages))
            continues.append(bool(document.repository) and document.repository == self._repository)
            self._repository = document.repository
            self._content_hash += content_hash(self._documents, document, continues[-1])
            self._documents += 1

        tokens = np.concatenate([document.tokens for document in documents])
        codes = [self._languages[document.language] for document in documents]
        sample: dict[str, Any] = {
            "__key__": f"{self._path.stem.rpartition('-')[2]}-{self._members:06d}",
            "tokens.npy": tokens.astype(self._dtype, copy=False),
            "lengths.npy": np.array([len(document.tokens) for document in documents], "<u4"),
            "bytes.npy": np.array([document.n_bytes for document in documents], "<u4"),
            "languages.npy": np.array(codes, np.uint8),
            "meta.json": {"languages": {str(code): name for name, code in self._languages.items()}},
        }

        # Parts that most corpora do not need are left out, because they would cost a header in every member.
        if any(document.loss_mask is not None for document in documents):
            masks = [
                np.ones(len(document.tokens), np.uint8) if document.loss_mask is None else document.loss_mask
                for document in documents
            ]
            sample["mask.npy"] = np.concatenate(masks)
        if any(continues):
            sample["continues.npy"] = np.array(continues, np.uint8)
        if rankings := [document.ranking for document in documents if document.ranking is not None]:
            assert len(rankings) == len(documents), "a corpus of rankings holds only rankings"
            sample |= member_parts(rankings)

        tar.write(sample)
        self._has_rows = self._has_rows or any(document.row for document in documents)
        self._tar_rows.append(
            self._compressor.compress("".join(f"{document.row}\n" for document in documents).encode())
        )
        self._tar_origins += self._origins
        self._origins.clear()
        self._members += 1
        self._tokens += len(tokens)
        # After a whole member only, so a tar may be larger than `shard_tokens`.
        if 0 < self._recipe.shard_tokens <= self._tokens:
            self._finish_tar()

    def _start_tar(self) -> Any:
        """Names the next tar in the journal, opens it under its temporary name, and returns its writer.

        Raises:
            OSError: journal or tar cannot be written.
        """
        from webdataset.writer import TarWriter  # imports torch, which takes a second

        # The journal first: a file that no journal names would be taken for a user's.
        self._path = self._journal.directory / self._journal.begin(self._split)
        self._file = self._temporary.open("wb")
        self._tar = TarWriter(self._file, user=_OWNER, group=_OWNER, mode=_MODE, mtime=0, compress=False, encoder=True)
        return self._tar

    def _finish_tar(self) -> None:
        """Closes and flushes the tar, writes its origins, renames it, builds its index, and records it in the journal.

        Reads the tar again for its index and hashes. Does nothing without an open tar.

        Raises:
            OSError: a file cannot be written.
        """
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.close()

        # A kill at any line leaves either no tar of this name, or a whole one with its origins.
        durable.fsync(self._temporary)
        write_origins(self._path, self._tar_origins)
        rows_sha256 = ""
        if self._has_rows:
            rows = b"".join(self._tar_rows)
            durable.write_bytes(rows_path(self._path), rows)
            rows_sha256 = hashlib.sha256(rows).hexdigest()
        self._temporary.replace(self._path)
        durable.fsync(self._path.parent)

        index = build_index(self._path)
        save_index(index, index_path(self._path))
        shard = shard_of(self._path, index, self._content_hash)
        self._journal.finish(self._split, replace(shard, texts=self._texts.hexdigest(), rows=rows_sha256))
        self._texts = hashlib.sha256()
        self._clear()


def shard_of(tar: Path, index: ShardIndex, content: int) -> Shard:
    """Returns the entry of a tar for the manifest. Reads the tar twice, for its hash and the checksums of its members.

    Args:
        content: sum of the hashes of its documents (`content_hash`); counted modulo 2**256.

    Raises:
        OSError: the tar cannot be read.
    """
    return Shard(
        name=tar.name,
        size=tar.stat().st_size,
        sha256=durable.sha256_of(tar),
        index_sha256=index.sha256,
        content=f"{content % 2**256:064x}",
        members="".join(f"{checksum:08x}" for checksum in member_checksums(tar, index)),
        counts=index.counts(),
    )


def content_hash(number: int, document: TokenizedDocument, continues: bool = False) -> int:
    """Hashes the part of document `number` of its split that training sees: a 256-bit integer.

    These are tokens, mask, ranking, and whether it belongs to the repository of the document before it. Equal documents
    with other numbers have other hashes.
    """
    # The number makes the sum over all documents depend on their order.
    digest = hashlib.sha256(f"{number} {len(document.tokens)} {document.loss_mask is not None}".encode())
    if continues:
        digest.update(b"continues")

    arrays = [document.tokens, document.loss_mask]
    if document.ranking is not None:
        arrays += [getattr(document.ranking, field.name) for field in fields(document.ranking)]
    for array in arrays:
        if array is not None:
            digest.update(array.tobytes())
    return int.from_bytes(digest.digest())


def origins_path(tar: Path) -> Path:
    """Returns the path of the file of sources and licences beside `tar`."""
    return tar.with_suffix(".origins.jsonl.zst")


def write_origins(tar: Path, origins: Iterable[Origin]) -> None:
    """Writes the origin of every document beside `tar`, in the order of the documents, as compressed lines of JSON.

    An existing file is replaced, durably.

    Raises:
        OSError: the file cannot be written.
    """
    lines = []
    for origin in origins:
        fields_of_line = {"source": origin.source, "licence": origin.licence, "from": origin.number}
        if origin.own:
            fields_of_line["own"] = True
        lines.append(json.dumps(fields_of_line) + "\n")
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    durable.write_bytes(origins_path(tar), compressor.compress("".join(lines).encode()))


def read_origins(tar: Path, only: Collection[int] | None = None) -> Iterator[Origin]:
    """Yields the origin of every document of `tar`, in the order of the documents.

    Args:
        only: numbers of documents, counted in the tar; the others are passed over unparsed. None: all.

    Raises:
        OSError, ZstdError, ValueError, KeyError: the file beside the tar is missing or damaged.
    """
    with origins_path(tar).open("rb") as file:
        content = zstandard.ZstdDecompressor().stream_reader(file)
        for number, line in enumerate(io.TextIOWrapper(content, encoding="utf-8", newline="\n")):
            if only is not None and number not in only:
                continue
            origin = json.loads(line)
            yield Origin(origin["source"], origin["licence"], origin["from"], origin.get("own", False))


def read_kept_rows(directory: Path, split: str) -> Iterator[str]:
    """Yields what a corpus keeps of the row of every document of a split, in their order; empty where that is nothing.

    Raises:
        ArtefactError: the corpus is missing, or the rows are missing, damaged or not those of the manifest.
        OSError: a file cannot be read.
    """
    for shard in read_manifest(directory).splits[split].shards:
        tar = directory / shard.name
        if not shard.rows:
            yield from repeat("", shard.counts.documents)
            continue

        if (state := rows_state(tar, shard)) != "ok":
            raise ArtefactError(f"{rows_path(tar)}: {state}: restore it, or remove {directory} to build it again")
        with rows_path(tar).open("rb") as file:
            content = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            for line in io.TextIOWrapper(content, encoding="utf-8", newline="\n"):
                yield line.removesuffix("\n")


def correct_licences(directory: Path, licences: Sequence[str]) -> None:
    """Gives the documents of each source the licence that its configuration has now. Rewrites the files of origins,
    then `licences` of the manifest; no tar changes.

    A document whose licence came from its row keeps it.

    Args:
        licences: of each source, in the order of the configuration.

    Raises:
        ArtefactError: `directory` is no corpus, or its manifest cannot be read.
        OSError, ZstdError, ValueError, KeyError: origins cannot be read or written; the files before them are correct.
    """
    manifest = read_manifest(directory)
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        tar = directory / shard.name
        origins = []
        for origin in read_origins(tar):
            if origin.licence == manifest.licences[origin.number] and not origin.own:
                origin = origin._replace(licence=licences[origin.number])
            origins.append(origin)
        write_origins(tar, origins)

    # The manifest goes last: after a kill, the same call corrects the remaining files.
    write_manifest(directory, replace(manifest, licences=licences))


def _by_language(indices: Iterable[ShardIndex]) -> dict[str, Counts]:
    """Sums the counts of several tars by language, in alphabetical order."""
    totals: dict[str, Counts] = {}
    for index in indices:
        for code, name in enumerate(index.languages):
            totals[name] = totals.get(name, Counts()) + index.counts(code)
    return dict(sorted(totals.items()))
