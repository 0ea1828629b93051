"""Encodes documents, and decodes those of a corpus, in several processes, and gives them back in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

from dist_lm.document import Document, TokenizedDocument
from dist_lm.errors import UserError
from dist_lm.storage.process import cores
from dist_lm.tokenizer.tokenizer import Tokenizer

Encode = Callable[[Tokenizer, Document], TokenizedDocument]
Taken = TypeVar("Taken")
Given = TypeVar("Given")
CHUNK_CHARACTERS = 500_000  # sent to a process at a time: a tenth of a second of work
CHUNK_DOCUMENTS = 2_000
CHUNKS_IN_FLIGHT = 3  # for each process: one being encoded, one waiting, one being read
CHUNKS_FOR_PROCESSES = 4  # fewer chunks are encoded sooner than a process starts


def encode_documents(
    path: Path, documents: Iterable[Document], workers: int, encode: Encode = Tokenizer.encode_document
) -> Iterator[TokenizedDocument]:
    """Yields every document, tokenized by the model at `path`, in the order of `documents`.

    Processes are started once `documents` gives more than a few chunks; they end when the iterator ends or is closed.

    Args:
        workers: number of processes; 0 means one for each core, 1 encodes in this process. A few chunks of text are
            always encoded in this process. At most `CHUNKS_IN_FLIGHT` chunks for each process are in memory.
        encode: a function at the top of a module, so that the processes can import it. The default takes texts alone;
            stage shards gives `chat.documents.encode_document`, which takes conversations, too.

    Raises:
        ArtefactError: there is no usable tokenizer at `path`.
        UserError: a process died, or a package that the tokenizer needs is not installed.
        Exception: an error of `encode` (UserError for a text that is not Unicode) or `documents` is raised unchanged.
    """
    tokenizer = Tokenizer.load(path)
    workers = workers or cores()

    chunks = _chunked(documents)
    first_chunks = list(islice(chunks, CHUNKS_FOR_PROCESSES)) if workers > 1 else []
    if len(first_chunks) == CHUNKS_FOR_PROCESSES:
        yield from in_processes(path, chain(first_chunks, chunks), workers, encode)
        return

    # A whole chunk is encoded before the first document is yielded, so code and data stay in the CPU's caches.
    for chunk in chain(first_chunks, chunks):
        yield from [encode(tokenizer, document) for document in chunk]


def in_processes(
    path: Path, chunks: Iterable[list[Taken]], workers: int, function: Callable[[Tokenizer, Taken], Given]
) -> Iterator[Given]:
    """Yields what `function` returns for every item of `chunks`, in order, from a pool of `workers` new processes.

    When it ends or is closed, the pool ends: chunks in work are waited for and waiting ones are dropped.

    Args:
        path: the tokenizer, which `function` gets with each item.
        function: one at the top of a module, so that the processes can import it.

    Raises:
        UserError: a process died.
        Exception: an error of `function` is raised unchanged.
    """
    # Spawned, not forked: a fork would copy the locks that threads of the caller hold.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=follow_parent)
    in_flight: deque[Future[list[Given]]] = deque()

    try:
        # The oldest chunk is awaited first, which keeps the order and bounds the memory.
        for chunk in chunks:
            in_flight.append(pool.submit(_work_on, path, chunk, function))
            if len(in_flight) >= workers * CHUNKS_IN_FLIGHT:
                yield from in_flight.popleft().result()

        while in_flight:
            yield from in_flight.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a tokenizing process died (out of memory, or killed): set tokenizer.workers below {workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunked(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yields lists of consecutive documents, which together reach `CHUNK_CHARACTERS` characters or `CHUNK_DOCUMENTS` in
    number.

    Only the last list may have fewer. A long document is not cut.
    """
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)

        if characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk = []
            characters = 0
    if chunk:
        yield chunk


def _work_on(path: Path, chunk: list[Taken], function: Callable[[Tokenizer, Taken], Given]) -> list[Given]:
    """Runs in a process of the pool."""
    return [function(_tokenizer(path), item) for item in chunk]


@cache
def _tokenizer(path: Path) -> Tokenizer:
    """Loads the tokenizer once in each process of the pool, which ends with its `encode_documents`."""
    return Tokenizer.load(path)


def follow_parent() -> None:
    """Prepares a process of the pool: it ignores Ctrl-C, which the parent handles, and ends with the parent (code 1).

    Without this it would wait forever for a parent that was killed. A thread waits for the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
