"""Documents to tokens over several processes, in order."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from itertools import chain, islice
from pathlib import Path

from dist_lm.document import Document, TokenizedDocument
from dist_lm.errors import UserError
from dist_lm.tokenizer.tokenizer import Tokenizer

Encode = Callable[[Tokenizer, Document], TokenizedDocument]
CHUNK_CHARACTERS = 500_000  # text sent to a process at a time: a tenth of a second of work
CHUNK_DOCUMENTS = 2_000
CHUNKS_IN_FLIGHT = 3  # for each process: one in work, one waiting, one being read
CHUNKS_FOR_PROCESSES = 4  # less text than this is done before a process has started


def encode_documents(
    path: Path, documents: Iterable[Document], workers: int, encode: Encode = Tokenizer.encode_document
) -> Iterator[TokenizedDocument]:
    """Every document tokenized by the model at `path`, in the order of `documents`.

    `workers`: processes; 0 is one a core, 1 encodes in this process, and so does any number when there is
    little text. At most `CHUNKS_IN_FLIGHT` chunks a process are in memory, however slowly the result is read.
    `encode`: a function of a module, so that processes find it.

    Raises:
        ArtefactError: there is no usable tokenizer at `path`.
        UserError: a document is not Unicode text, or a process died.
    """
    tokenizer = Tokenizer.load(path)
    workers = workers or (len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
    chunks = _chunked(documents)
    first = list(islice(chunks, CHUNKS_FOR_PROCESSES)) if workers > 1 else []
    if len(first) < CHUNKS_FOR_PROCESSES:
        for chunk in chain(first, chunks):
            yield from (encode(tokenizer, document) for document in chunk)
    else:
        yield from _encode_in_processes(path, chain(first, chunks), workers, encode)


def _encode_in_processes(
    path: Path, chunks: Iterator[list[Document]], workers: int, encode: Encode
) -> Iterator[TokenizedDocument]:
    # Spawned, not forked: the caller may have threads, and a fork copies the locks they hold.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    waiting: deque[Future[list[TokenizedDocument]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_chunk, path, chunk, encode))
            if len(waiting) >= workers * CHUNKS_IN_FLIGHT:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that tokenizes died (out of memory, or killed): set tokenizer.workers below {workers}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunked(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of documents of about `CHUNK_CHARACTERS`."""
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode_chunk(path: Path, chunk: list[Document], encode: Encode) -> list[TokenizedDocument]:
    """Runs in a process of the pool."""
    return [encode(_tokenizer(path), document) for document in chunk]


@cache
def _tokenizer(path: Path) -> Tokenizer:
    """Loaded once a process of the pool, which lives no longer than one `encode_documents`."""
    return Tokenizer.load(path)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it is gone: a pool's process would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
