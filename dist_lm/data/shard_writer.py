"""Tokenized documents to webdataset tars, and the manifest that completes a corpus.

A member of a tar groups many documents (one a member costs 3.6 times the bytes):

    KEY.tokens.npy     (tokens,) uint16     the documents, concatenated; each begins with end-of-text.
                                            uint32 if the vocabulary has more than 65,536 entries
    KEY.lengths.npy    (documents,) uint32  tokens
    KEY.bytes.npy      (documents,) uint32  UTF-8 bytes of the text
    KEY.languages.npy  (documents,) uint8   codes
    KEY.mask.npy       (tokens,) uint8      only if a document has a loss mask; 1: the token is learned
    KEY.continues.npy  (documents,) uint8   only if a document is of the repository of the one before it: 1
    KEY.branch.npy ... only for rankings: see `data.rankings.shards`
    KEY.meta.json      {"languages": {code: name}}

Sources and licences lie beside the tar, in `.origins.jsonl.zst`, one object per document: {"source", "licence",
"from": number of the source in the configuration, "own": true if its row gave the licence}. So a corrected licence
changes no tar.
Equal documents give equal bytes.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy as np
import zstandard

from dist_lm.config.corpus import SPLITS
from dist_lm.data.index import ShardIndex, build_index, index_path, member_checksums, open_index, save_index
from dist_lm.data.journal import Journal
from dist_lm.data.manifest import Counts, Manifest, Recipe, Shard, Split, read_manifest, token_dtype, write_manifest
from dist_lm.data.rankings.shards import member_parts
from dist_lm.document import TokenizedDocument
from dist_lm.storage import durable

_OWNER = "dist_lm"
_MODE = 0o644


class Origin(NamedTuple):
    """Where a document comes from."""

    source: str  # path or data set id and row
    licence: str
    number: int  # of the source in the configuration of the corpus
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
        """
        Raises:
            ArtefactError: the folder holds files that are not ours.
        """
        self._journal = Journal.start(self.directory, self.recipe)
        self.kept = self._journal.documents
        self._splits = {split: _SplitWriter(split, self._journal) for split in SPLITS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for split in self._splits.values():
            split.abandon_tar()

    def write(self, split: str, document: TokenizedDocument, source: int = 0) -> None:
        """Append one document of the source with that number to `train` or `val`."""
        self._splits[split].write(document, source)

    def finish_split(self, split: str) -> None:
        """Write what is left of a split: no document of it follows."""
        self._splits[split].finish()

    def finish(
        self,
        ingest: Mapping[str, Any],
        licences: Sequence[str] = (),
        inputs: Sequence[Sequence[Mapping[str, Any]]] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Write the last tars and the manifest, which declares the corpus complete. Arguments: as of `Manifest`."""
        found = {}
        for name in self._splits:
            self.finish_split(name)
            shards = self._journal.finished[name]
            found[name] = Split(tuple(shards), _by_language(open_index(self.directory / s.name, s) for s in shards))
        manifest = Manifest(self.recipe, found, dict(ingest), licences, inputs, settings or {})
        write_manifest(self.directory, manifest)
        self._journal.close()
        return manifest


class _SplitWriter:
    """Writes the tars of one split."""

    def __init__(self, split: str, journal: Journal) -> None:
        self._split, self._journal, self._recipe = split, journal, journal.recipe
        self._documents = journal.documents[split]
        self._path = journal.directory  # of the tar that is being written
        self._dtype = token_dtype(journal.recipe.vocab_size)
        self._pending: list[TokenizedDocument] = []
        self._origins: list[Origin] = []  # of `_pending`
        self._tar: Any = None
        self._file: IO[bytes] | None = None
        self._clear()

    def write(self, document: TokenizedDocument, source: int) -> None:
        tokens, mask = document.tokens, document.loss_mask
        assert tokens.dtype == self._dtype, (tokens.dtype, self._recipe.vocab_size)
        assert len(tokens) > 0, "a document begins with end-of-text"
        assert mask is None or (mask.dtype == np.uint8 and mask.shape == tokens.shape), "one uint8 per token"
        self._pending.append(document)
        self._origins.append(Origin(document.source, document.licence, source, document.own_licence))
        if len(self._pending) == self._recipe.documents_per_member:
            self._flush_member()

    def finish(self) -> None:
        """Write what is left."""
        self._flush_member()
        self._finish_tar()

    def abandon_tar(self) -> None:
        """Remove an unfinished tar."""
        if self._tar is None or self._file is None:
            return
        for part in (self._tar, self._file):
            with suppress(OSError):  # closing may fail too; the first error is the one to report
                part.close()
        self._temporary.unlink(missing_ok=True)

    def _clear(self) -> None:
        """The state before the first document of a tar: its bytes depend on no other tar."""
        self._tar, self._file = None, None
        self._members, self._tokens, self._content = 0, 0, 0
        self._languages: dict[str, int] = {}
        self._repository = ""  # of the last document
        self._tar_origins: list[Origin] = []

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(f".{self._path.name}.tmp")

    def _flush_member(self) -> None:
        documents, self._pending = self._pending, []
        if not documents:
            return
        tar = self._tar or self._start_tar()
        continues = []
        for document in documents:
            self._languages.setdefault(document.language, len(self._languages))
            continues.append(bool(document.repository) and document.repository == self._repository)
            self._repository = document.repository
            self._content += content_of(self._documents, document, continues[-1])
            self._documents += 1
        tokens = np.concatenate([d.tokens for d in documents])
        codes = [self._languages[d.language] for d in documents]
        sample: dict[str, Any] = {
            "__key__": f"{self._path.stem.rpartition('-')[2]}-{self._members:06d}",
            "tokens.npy": tokens.astype(self._dtype, copy=False),
            "lengths.npy": np.array([len(d.tokens) for d in documents], "<u4"),
            "bytes.npy": np.array([d.n_bytes for d in documents], "<u4"),
            "languages.npy": np.array(codes, np.uint8),
            "meta.json": {"languages": {str(code): name for name, code in self._languages.items()}},
        }
        if any(d.loss_mask is not None for d in documents):
            sample["mask.npy"] = np.concatenate(
                [np.ones(len(d.tokens), np.uint8) if d.loss_mask is None else d.loss_mask for d in documents]
            )
        if any(continues):
            sample["continues.npy"] = np.array(continues, np.uint8)
        if verdicts := [d.verdict for d in documents if d.verdict is not None]:
            assert len(verdicts) == len(documents), "a corpus of rankings holds only rankings"
            sample |= member_parts(verdicts)
        tar.write(sample)
        self._tar_origins += self._origins
        self._origins.clear()
        self._members += 1
        self._tokens += len(tokens)
        if self._tokens >= self._recipe.shard_tokens:
            self._finish_tar()

    def _start_tar(self) -> Any:
        from webdataset.writer import TarWriter  # imports torch, which takes a second

        self._path = self._journal.directory / self._journal.begin(self._split)
        self._file = self._temporary.open("wb")
        self._tar = TarWriter(self._file, user=_OWNER, group=_OWNER, mode=_MODE, mtime=0, compress=False, encoder=True)
        return self._tar

    def _finish_tar(self) -> None:
        """Close and flush the tar, write the files beside it, rename it, and record it."""
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.close()
        durable.fsync_file(self._temporary)
        write_origins(self._path, self._tar_origins)
        self._temporary.replace(self._path)
        durable.fsync_directory(self._path.parent)
        index = build_index(self._path)
        save_index(index, index_path(self._path))
        self._journal.finish(self._split, shard_of(self._path, index, self._content))
        self._clear()


def shard_of(tar: Path, index: ShardIndex, content: int) -> Shard:
    """The entry of a tar in the manifest."""
    return Shard(
        name=tar.name,
        size=tar.stat().st_size,
        sha256=durable.sha256_of(tar),
        index_sha256=index.sha256,
        content=f"{content % 2**256:064x}",
        members="".join(f"{checksum:08x}" for checksum in member_checksums(tar, index)),
        counts=index.counts(),
    )


def content_of(number: int, document: TokenizedDocument, continues: bool = False) -> int:
    """Hash of what training sees of document `number` of its split: tokens, mask, verdict, and whether it stays behind
    the document before it."""
    digest = hashlib.sha256(f"{number} {len(document.tokens)} {document.loss_mask is not None}".encode())
    if continues:
        digest.update(b"continues")
    verdict = document.verdict
    judged = () if verdict is None else [getattr(verdict, one.name) for one in fields(verdict)]
    for array in (document.tokens, document.loss_mask, *judged):
        if array is not None:
            digest.update(array.tobytes())
    return int.from_bytes(digest.digest())


def origins_path(tar: Path) -> Path:
    """The file of sources and licences beside `tar`."""
    return tar.with_suffix(".origins.jsonl.zst")


def write_origins(tar: Path, origins: Iterable[Origin]) -> None:
    """Write where every document of `tar` comes from."""
    values = (
        {"source": one.source, "licence": one.licence, "from": one.number} | ({"own": True} if one.own else {})
        for one in origins
    )
    lines = "".join(json.dumps(value) + "\n" for value in values)
    durable.write_bytes(origins_path(tar), zstandard.ZstdCompressor(write_checksum=True).compress(lines.encode()))


def read_origins(tar: Path) -> Iterator[Origin]:
    """Where every document of `tar` comes from."""
    with origins_path(tar).open("rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8", newline="\n"):
            value = json.loads(line)
            yield Origin(value["source"], value["licence"], value["from"], value.get("own", False))


def correct_licences(directory: Path, licences: Sequence[str]) -> None:
    """Give the documents of each source the licence that its configuration has now. No tar changes.

    A document whose licence came from its row keeps it.
    """
    manifest = read_manifest(directory)
    old = manifest.licences
    for shard in (shard for split in manifest.splits.values() for shard in split.shards):
        tar = directory / shard.name
        origins = [
            one._replace(licence=licences[one.number]) if one.licence == old[one.number] and not one.own else one
            for one in read_origins(tar)
        ]
        write_origins(tar, origins)
    write_manifest(directory, replace(manifest, licences=licences))


def _by_language(indices: Iterable[ShardIndex]) -> dict[str, Counts]:
    totals: dict[str, Counts] = {}
    for index in indices:
        for code, name in enumerate(index.languages):
            totals[name] = totals.get(name, Counts()) + index.counts(code)
    return dict(sorted(totals.items()))
