"""Parallel encoding: the same tokens in order, bounded memory, no process left behind or lost unseen."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from dist_lm.document import Document, TokenizedDocument
from dist_lm.errors import ArtefactError, UserError
from dist_lm.tokenizer import encode
from dist_lm.tokenizer.encode import encode_documents
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.patience import patient


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 1_000)


def documents(count: int) -> Iterator[Document]:
    for n in range(count):
        yield Document(f"x = {n} == \u2581 {n}\n" * (n % 7), "python", f"source:{n}", "none", f"{n:x}")


def plain(document: TokenizedDocument) -> tuple:
    return document.tokens.tolist(), document.n_bytes, document.language, document.source, document.licence


@pytest.mark.heavy
@pytest.mark.usefixtures("small_chunks")
def test_processes_give_what_one_process_gives_in_order(model_path: Path, tokenizer: Tokenizer) -> None:
    expected = [plain(tokenizer.encode_document(document)) for document in documents(500)]
    for workers in (1, 2):
        assert [plain(d) for d in encode_documents(model_path, documents(500), workers)] == expected
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("count", [0, 1, 50])
def test_little_text_starts_no_process(model_path: Path, count: int) -> None:
    for number, document in enumerate(encode_documents(model_path, documents(count), 8)):
        assert document.source == f"source:{number}"
        assert not multiprocessing.active_children()


@pytest.mark.heavy
@pytest.mark.usefixtures("small_chunks")
def test_input_is_read_only_a_little_ahead_and_leaving_early_stops_the_processes(model_path: Path) -> None:
    read = 0

    def counted() -> Iterator[Document]:
        nonlocal read
        for document in documents(100_000):
            read += 1
            yield document

    tokenized = encode_documents(model_path, counted(), 2)
    assert next(tokenized).source == "source:0"
    assert read < 500
    assert isinstance(tokenized, Generator)
    tokenized.close()
    assert not multiprocessing.active_children()


@pytest.mark.heavy
@pytest.mark.usefixtures("small_chunks")
def test_a_bad_document_is_named_and_a_dead_process_raises(model_path: Path) -> None:
    def with_a_bad_one() -> Iterator[Document]:
        yield from documents(200)
        yield Document("\ud800", "python", "bad.py", "", "")

    with pytest.raises(UserError, match=r"^bad\.py: character 0 is the lone surrogate U\+D800"):
        list(encode_documents(model_path, with_a_bad_one(), 2))

    tokenized = encode_documents(model_path, documents(100_000), 2)
    next(tokenized)
    victim = multiprocessing.active_children()[0].pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(UserError, match=r"died .*tokenizer\.workers below 2"):
        list(tokenized)
    assert not multiprocessing.active_children()


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"nothing\.model: no tokenizer there"):
        next(encode_documents(tmp_path / "nothing.model", documents(1), 1))


PROGRAM = """
import multiprocessing, signal, sys
from pathlib import Path
from dist_lm.document import Document
from dist_lm.tokenizer.encode import encode_documents
if __name__ == "__main__":
    document = Document("x = 1\\n" * 20_000, "python", "", "", "")
    tokenized = encode_documents(Path(sys.argv[1]), (document for _ in range(1000)), 2)
    next(tokenized)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    signal.pause()
"""


def test_processes_end_when_their_parent_is_killed(model_path: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, program, model_path], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(children) == 2
    deadline = time.monotonic() + patient(120)
    while any(_alive(pid) for pid in children):
        assert time.monotonic() < deadline, f"still there: {children}"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    """Whether the process runs; a zombie that nobody has reaped yet has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
