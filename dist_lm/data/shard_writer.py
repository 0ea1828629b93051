"""Tokenized documents to webdataset tars, and the manifest that completes a corpus.

A member of a tar groups many documents (one a member costs 3.6 times the bytes):

    KEY.tokens.npy     (tokens,) uint16     the documents, concatenated; each begins with end-of-text.
                                            uint32 if the vocabulary has more than 65,536 entries
    KEY.lengths.npy    (documents,) uint32  tokens
    KEY.bytes.npy      (documents,) uint32  UTF-8 bytes of the text
    KEY.languages.npy  (documents,) uint8   codes
    KEY.mask.npy       (tokens,) uint8      only if a document has a loss mask; 1: the token is learned
    KEY.branch.npy ... only for rankings: see `data.rankings.shards`
    KEY.meta.json      {"languages": {code: name}, "sources": [one per document], "licences": [one per document]}

Equal documents give equal bytes.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from dist_lm.config.corpus import SPLITS
from dist_lm.data.manifest import FORMAT, Counts, Manifest, Shard, Split, manifest_path
from dist_lm.data.mapped import ShardIndex, build_index, index_path, open_index, save_index
from dist_lm.data.rankings.shards import member_parts
from dist_lm.document import TokenizedDocument
from dist_lm.storage import durable

_OWNER = "dist_lm"
_MODE = 0o644


class ShardWriter:
    """Writes the tars of one split; a context manager.

    Entering it removes the manifest and the files of earlier builds of this split, so the corpus is incomplete until
    `write_manifest`. A tar gets its final name and its index after it has been written and flushed.
    """

    def __init__(self, directory: Path, split: str, documents_per_member: int, shard_tokens: int) -> None:
        """`shard_tokens`: the tar is finished after the member that reaches this number of tokens."""
        self.directory = directory
        self.split = split
        self.documents_per_member = documents_per_member
        self.shard_tokens = shard_tokens
        self.paths: list[Path] = []  # finished tars
        self._dtype: np.dtype | None = None
        self._languages: dict[str, int] = {}
        self._pending: list[TokenizedDocument] = []
        self._members = 0
        self._tokens = 0
        self._file: IO[bytes] | None = None
        self._tar: Any = None

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        manifest_path(self.directory).unlink(missing_ok=True)
        ours = re.compile(rf"\.?{re.escape(self.split)}-\d{{6}}\.(tar|index|tar\.tmp)")
        for path in self.directory.iterdir():
            if ours.fullmatch(path.name):
                path.unlink()
        durable.fsync_directory(self.directory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._flush_member()
                self._finish_tar()
        finally:
            self._abandon_tar()

    def write(self, document: TokenizedDocument) -> None:
        """Append one document."""
        tokens, mask = document.tokens, document.loss_mask
        assert tokens.dtype in (np.uint16, np.uint32), tokens.dtype
        self._dtype = self._dtype or tokens.dtype
        assert tokens.dtype == self._dtype, "all documents of a corpus come from one tokenizer"
        assert len(tokens) > 0, "a document begins with end-of-text"
        assert mask is None or (mask.dtype == np.uint8 and mask.shape == tokens.shape), "one uint8 per token"
        self._pending.append(document)
        if len(self._pending) == self.documents_per_member:
            self._flush_member()

    @property
    def _path(self) -> Path:
        return self.directory / f"{self.split}-{len(self.paths):06d}.tar"

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(f".{self._path.name}.tmp")

    def _flush_member(self) -> None:
        documents, self._pending = self._pending, []
        if not documents:
            return
        tar = self._tar or self._start_tar()
        for document in documents:
            self._languages.setdefault(document.language, len(self._languages))
        tokens = np.concatenate([d.tokens for d in documents])
        codes = [self._languages[d.language] for d in documents]
        sample: dict[str, Any] = {
            "__key__": f"{len(self.paths):06d}-{self._members:06d}",
            "tokens.npy": tokens.astype(tokens.dtype.newbyteorder("<"), copy=False),
            "lengths.npy": np.array([len(d.tokens) for d in documents], "<u4"),
            "bytes.npy": np.array([d.n_bytes for d in documents], "<u4"),
            "languages.npy": np.array(codes, np.uint8),
            "meta.json": {
                "languages": {str(code): name for name, code in self._languages.items()},
                "sources": [d.source for d in documents],
                "licences": [d.licence for d in documents],
            },
        }
        if any(d.loss_mask is not None for d in documents):
            sample["mask.npy"] = np.concatenate(
                [np.ones(len(d.tokens), np.uint8) if d.loss_mask is None else d.loss_mask for d in documents]
            )
        if verdicts := [d.verdict for d in documents if d.verdict is not None]:
            assert len(verdicts) == len(documents), "a corpus of rankings holds only rankings"
            sample |= member_parts(verdicts)
        tar.write(sample)
        self._members += 1
        self._tokens += len(tokens)
        if self._tokens >= self.shard_tokens:
            self._finish_tar()

    def _start_tar(self) -> Any:
        from webdataset.writer import TarWriter  # imports torch, which takes a second

        self._file = self._temporary.open("wb")
        self._tar = TarWriter(self._file, user=_OWNER, group=_OWNER, mode=_MODE, mtime=0, compress=False, encoder=True)
        return self._tar

    def _abandon_tar(self) -> None:
        """Remove an unfinished tar."""
        if self._tar is None or self._file is None:
            return
        for part in (self._tar, self._file):
            with suppress(OSError):  # closing may fail too; the first error is the one to report
                part.close()
        self._temporary.unlink(missing_ok=True)

    def _finish_tar(self) -> None:
        """Close and flush the tar, rename it, and write its index."""
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.close()
        durable.fsync_file(self._temporary)
        path = self._path
        self._temporary.replace(path)
        durable.fsync_directory(self.directory)
        self._tar, self._file = None, None
        self._members, self._tokens = 0, 0
        save_index(build_index(path), index_path(path))
        self.paths.append(path)


def write_manifest(
    directory: Path, *, tokenizer_sha256: str, corpus_fingerprint: str, ingest: Mapping[str, Any]
) -> Manifest:
    """Count and hash the tars in `directory`, and declare the corpus complete. `ingest` must be JSON."""
    splits = {}
    for split in SPLITS:
        tars = sorted(directory.glob(f"{split}-??????.tar"))
        indices = [open_index(tar) for tar in tars]
        shards = [_shard(tar.name, index) for tar, index in zip(tars, indices, strict=True)]
        splits[split] = Split(tuple(shards), _by_language(indices))
    manifest = Manifest(tokenizer_sha256, corpus_fingerprint, splits, dict(ingest))
    durable.write_json(manifest_path(directory), {"format": FORMAT, **asdict(manifest)})
    return manifest


def _shard(name: str, index: ShardIndex) -> Shard:
    return Shard(name, index.tar_size, index.tar_sha256, _counts(index.entries))


def _counts(entries: np.ndarray) -> Counts:
    return Counts(
        documents=len(entries),
        tokens=int(entries["length"].sum(dtype=np.int64)),
        bytes=int(entries["n_bytes"].sum(dtype=np.int64)),
    )


def _by_language(indices: list[ShardIndex]) -> dict[str, Counts]:
    totals: dict[str, Counts] = {}
    for index in indices:
        for code, name in enumerate(index.languages):
            counts = _counts(index.entries[index.entries["language"] == code])
            totals[name] = totals.get(name, Counts()) + counts
    return dict(sorted(totals.items()))
