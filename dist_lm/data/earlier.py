"""Keeps a new corpus apart from the finished corpora of its work directory: no text that they hold out is trained on.

A new corpus drops train documents that contain val of an earlier one (`contains_val`), and val documents that train of
an earlier one contains (`overlapping`). Earlier corpora never change, and their sources are not read again: their texts
are decoded from their tars. That is exact up to the tokenizer's own normaliser.

What is compared depends on the form of a new document:

- A text, by windows of eight words (`data.containment`), with everything that earlier corpora hold: texts, and the
  words of conversations and rankings.
- A conversation or ranking, by the tokens before its first learned one, with the conversations and rankings of earlier
  corpora. These are the turns before the first answer, or the prompt. One that contains a held-out text is dropped too.

Val of all earlier corpora is read once for a build: 25 bytes for each of its words are in memory. Train of all earlier
corpora is read once, in several processes, and only if the new corpus holds out something.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from dist_lm.chat.documents import encode_document, encode_ranking, sample_documents
from dist_lm.data.containment import Comparison, HeldOutIndex
from dist_lm.data.manifest import manifest_path, read_manifest
from dist_lm.data.redaction import EMAIL, KEY, redacted, redacted_json
from dist_lm.data.screening import Screened
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.document import Document, TokenizedDocument
from dist_lm.errors import ArtefactError
from dist_lm.storage.process import cores
from dist_lm.tokenizer.encode import encode_documents, in_processes
from dist_lm.tokenizer.tokenizer import Tokenizer

SPAN = 1_000  # documents that a process decodes at a time
Given = TypeVar("Given")
SPANS_FOR_PROCESSES = 8  # fewer spans are decoded sooner than processes start


class Span(NamedTuple):
    """Consecutive documents of one split."""

    folder: Path
    split: str
    first: int
    end: int


class EarlierText(NamedTuple):
    """One document of an earlier corpus, as far as it is compared."""

    text: str
    opening: bytes  # hash of the tokens before the first learned one; empty: all are learned, it is a text


class EarlierCorpora:
    """The finished corpora that a new one is compared with. The object is false if there are none."""

    def __init__(self, folders: Sequence[Path] = (), tokenizer_model: Path = Path(), workers: int = 1) -> None:
        """Reads their manifests.

        Args:
            folders: all written with the tokenizer `tokenizer_model`.
            workers: processes that decode train; 0: one for each core.

        Raises:
            ArtefactError: a manifest is missing or damaged.
        """
        self._folders = tuple(folders)
        self._tokenizer_model = tokenizer_model
        self._workers = workers or cores()
        # folder -> hash of its val, for the manifest of the new corpus
        self.compared = {folder.name: read_manifest(folder).splits["val"].content for folder in folders}

    def __bool__(self) -> bool:
        return bool(self._folders)

    def documents(self, split: str) -> Iterator[EarlierText]:
        """Yields all documents of a split, corpus by corpus.

        Raises:
            ArtefactError: a corpus is damaged; names the folder and the ways out.
            UserError: a process died.
        """
        yield from self._read(split, decode)

    def openings(self, split: str) -> set[bytes]:
        """Returns the openings of the conversations and rankings of a split; texts have none.

        Raises:
            ArtefactError, UserError: as `documents`.
        """
        return set(self._read(split, read_openings))

    def _read(self, split: str, read: Callable[[Tokenizer, Span], list[Given]]) -> Iterator[Given]:
        """Yields what `read` returns for each span of documents, in order.

        Raises:
            ArtefactError, UserError: as `documents`.
        """
        try:
            spans = [span for folder in self._folders for span in _spans(folder, split)]
            if not spans:
                return
            # The documents of val are few.
            if self._workers == 1 or len(spans) < SPANS_FOR_PROCESSES:
                tokenizer = Tokenizer.load(self._tokenizer_model)
                for span in spans:
                    yield from read(tokenizer, span)
                return
            for items in in_processes(self._tokenizer_model, ([span] for span in spans), self._workers, read):
                yield from items
        except ArtefactError as error:
            raise ArtefactError(
                f"{error}. A new corpus is compared with it: restore it, or remove its folder if no run needs it"
            ) from error

    def contained(self, texts: Sequence[str]) -> set[int]:
        """Returns the indices in `texts` of new val texts that train of earlier corpora contains; these corpora are
        read only if there is a text.

        Raises:
            ArtefactError, UserError: as `documents`.
        """
        if not texts or not self:
            return set()
        # Both forms of a text are compared, because tars hold placeholders where sources have secrets and addresses.
        forms = [(number, form) for number, text in enumerate(texts) for form in forms_of(text)]
        index = HeldOutIndex([form for _, form in forms])

        comparison = Comparison(index)
        for document in self.documents("train"):
            comparison.add(b"", document.text)
        comparison.finish()
        return {forms[form_index][0] for form_index in index.contained()}

    def marked(
        self, records: Iterable[Screened], split_of: Callable[[Screened], str]
    ) -> Iterator[tuple[Screened, str]]:
        """Yields every conversation or ranking with a reason why earlier corpora forbid it; the reason is empty if they
        do not.

        Openings are compared: the tokens before the first learned one. A record of train is `contains_val` if it has
        the opening of a val record of an earlier corpus, or contains a val text of one. A record of val is
        `overlapping` if it has the opening of an earlier train record.

        Val of the earlier corpora is read before the first record is yielded, and their train before the first record
        of val. Every record is tokenized here to be compared, and once more when it is written.

        Args:
            split_of: returns the split of a record, train or val.

        Raises:
            ArtefactError, UserError: as `documents`; ChatError, one of these, as `encode_document`.
        """
        if not self:
            yield from ((record, "") for record in records)
            return

        val = list(self.documents("val"))
        openings = {document.opening for document in val if document.opening}
        texts = [document.text for document in val if not document.opening]
        index = HeldOutIndex(texts, [True] * len(texts), refuses_parts=False)
        # Tars hold placeholders where sources have secrets and addresses.
        is_redacted = any(has_placeholder(document.text) for document in val)
        del val
        trained_openings: set[bytes] | None = None

        tokenizer = Tokenizer.load(self._tokenizer_model)
        for record, samples in self._tokenized(records, tokenizer, is_redacted):
            keys = {opening_of(sample) for sample in samples}
            if split_of(record) == "train":
                contents = [tokenizer.decode(sample.tokens.tolist()).encode() for sample in samples]
                is_forbidden = keys & openings or index.compare(contents).any()
                yield record, "contains_val" if is_forbidden else ""
                continue

            if trained_openings is None:
                trained_openings = self.openings("train")
            yield record, "overlapping" if keys & trained_openings else ""

    def _tokenized(
        self, records: Iterable[Screened], tokenizer: Tokenizer, is_redacted: bool
    ) -> Iterator[tuple[Screened, list[TokenizedDocument]]]:
        """Yields each record, in order, with the documents that tars would hold for it, perhaps none; with
        `is_redacted` also those that they would hold if secrets and addresses are replaced.

        Raises:
            ChatError: a conversation does not fit the layout of the tokenizer.
            ArtefactError, UserError: as `encode_documents`.
        """
        waiting: deque[tuple[Screened, int]] = deque()  # (record, number of its documents)

        def documents() -> Iterator[Document]:
            for record in records:
                documents = [record.document]
                if is_redacted:
                    clean = redacted_json(record.document.text, secrets=True, emails=True).text
                    documents.append(replace(record.document, text=clean))
                samples = [sample for document in documents for sample in sample_documents(document, tokenizer)]
                waiting.append((record, len(samples)))
                yield from samples

        tokenized: list[TokenizedDocument] = []
        for document in encode_documents(self._tokenizer_model, documents(), self._workers, encode_any):
            # A conversation without a learned answer may have no document.
            while not waiting[0][1]:
                yield waiting.popleft()[0], []
            tokenized.append(document)
            if len(tokenized) == waiting[0][1]:
                yield waiting.popleft()[0], tokenized
                tokenized = []
        yield from ((record, []) for record, _ in waiting)


def encode_any(tokenizer: Tokenizer, document: Document) -> TokenizedDocument:
    """Returns a conversation or a ranking as shards hold it: see `encode_document` and `encode_ranking`."""
    encode = encode_ranking if document.form == "ranking" else encode_document
    return encode(tokenizer, document)


def opening_of(document: TokenizedDocument) -> bytes:
    """Returns a hash of the tokens before the first learned one: of the turns before an answer, or of a prompt."""
    assert document.loss_mask is not None, "conversations and rankings have a mask"
    return _opening(document.tokens, document.loss_mask)


def forms_of(text: str) -> list[str]:
    """Returns a text as its source has it, and with placeholders for secrets and addresses if that differs."""
    clean = redacted(text, secrets=True, emails=True).text
    return [text] if clean == text else [text, clean]


def has_placeholder(text: str) -> bool:
    """Returns whether a secret or an address of a text may have been replaced."""
    return KEY in text or EMAIL in text


def decode(tokenizer: Tokenizer, span: Span) -> list[EarlierText]:
    """Returns the documents of a span, but for excluded ones, from which nothing is learned. Special tokens have no
    text.

    Raises:
        ArtefactError: the tar is damaged.
        OSError: a file cannot be read.
    """
    corpus = _opened(span.folder, span.split)
    documents = []
    for number in range(span.first, span.end):
        if number in corpus.excluded:
            continue
        length = int(corpus.lengths[number])
        tokens, opening = corpus.tokens(number, 0, length), b""
        if corpus.has_mask:
            opening = _opening(tokens, corpus.mask(number, 0, length))
        documents.append(EarlierText(tokenizer.decode(tokens.tolist()), opening))
    return documents


def read_openings(_tokenizer: Tokenizer, span: Span) -> list[bytes]:
    """Returns the openings of the documents of a span; none of texts.

    Raises:
        ArtefactError: the tar is damaged.
        OSError: a file cannot be read.
    """
    corpus = _opened(span.folder, span.split)
    if not corpus.has_mask:
        return []
    spans = ((number, 0, int(corpus.lengths[number])) for number in range(span.first, span.end))
    return [_opening(corpus.tokens(*document_span), corpus.mask(*document_span)) for document_span in spans]


def _opening(tokens: np.ndarray, mask: np.ndarray) -> bytes:
    n_before = int(mask.argmax()) if mask.any() else len(tokens)
    # Ids are hashed in one width, whatever the vocabulary.
    return hashlib.blake2b(tokens[:n_before].astype("<u4").tobytes(), digest_size=16).digest()


def _spans(folder: Path, split: str) -> Iterator[Span]:
    """Yields the documents of a split in spans; the manifest counts them."""
    n_documents = read_manifest(folder).splits[split].counts.documents
    for first in range(0, n_documents, SPAN):
        yield Span(folder, split, first, min(first + SPAN, n_documents))


def _opened(folder: Path, split: str) -> TokenCorpus:
    # A folder that was built again has another manifest.
    return _opened_once(folder, split, manifest_path(folder).stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _opened_once(folder: Path, split: str, _mtime_ns: int) -> TokenCorpus:
    """Opens a corpus once in each process, for all of its spans."""
    return TokenCorpus.open(folder, split)
