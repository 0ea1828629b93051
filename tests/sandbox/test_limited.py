"""A function on content from outside: whatever it does, this process gets a result or one line."""

import json
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.sandbox import limited
from dist_lm.sandbox.limited import LimitError, call, process_id
from dist_lm.tokenizer.tokenizer import read_vocabulary
from tests.patience import patient


def test_values_and_bytes_go_there_and_come_back() -> None:
    assert call(math.gcd, 12, 18) == 6
    assert call(json.dumps, {"a": [1, None, "\ud800"]}) == '{"a": [1, null, "\\ud800"]}'
    assert call(os.path.join, b"a", b"b") == b"a/b"
    assert call(os.path.split, b"a/b") == [b"a", b"b"]


def test_one_process_answers_many_calls() -> None:
    """A start for each call would take a hundred times as long."""
    call(math.gcd, 12, 18)
    first = process_id()
    for _ in range(100):
        call(math.gcd, 12, 18)
    assert process_id() == first is not None


def test_errors_of_users_keep_their_class_and_all_others_are_one_line() -> None:
    with pytest.raises(ArtefactError, match="tokenizer is damaged"):
        call(read_vocabulary, b"abc", "tokenizer")
    for function, arguments in ((json.loads, ["[" * 100_000]), (math.sqrt, [-1]), (sys.exit, [3])):
        with pytest.raises(LimitError, match=r"^fails \(") as refused:
            call(function, *arguments)
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.heavy
def test_what_exceeds_a_limit_or_ends_the_process_does_not_hurt_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limited, "CPU_S", 1)
    started = time.monotonic()
    with pytest.raises(LimitError, match="takes more than 1 s of CPU time"):
        call(math.factorial, 10**7)
    assert time.monotonic() - started < patient(3)
    with pytest.raises(LimitError, match="1024 MiB of memory"):
        call(bytes, 2 << 30)
    with pytest.raises(LimitError, match="ends the process"):
        call(os.abort)
    assert call(math.gcd, 12, 18) == 6


def test_an_interrupted_call_leaves_no_answer_for_the_next_one() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    call(math.gcd, 12, 18)
    before = signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call(time.sleep, patient(30))
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert call(math.gcd, 12, 18) == 6


def test_it_reads_no_file_of_the_user_writes_none_and_reaches_no_network(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("token")
    with pytest.raises(LimitError, match="PermissionError"):
        call(os.listdir, str(tmp_path))
    with pytest.raises(LimitError, match="PermissionError"):
        call(os.mkdir, str(tmp_path / "new"))
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(LimitError, match="PermissionError"):
        call(socket.create_connection, server.getsockname())


def test_a_forked_process_has_a_process_of_its_own() -> None:
    """Two that wrote to one socket would read each other's answers."""
    call(math.gcd, 12, 18)
    parents = process_id()
    child = os.fork()
    if child == 0:
        right = all(call(math.gcd, 6 * n, 6) == 6 for n in range(1, 50)) and process_id() != parents
        limited._caller_of(os.getpid()).end()
        os._exit(not right)
    assert all(call(math.gcd, 10 * n, 10) == 10 for n in range(1, 50))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
