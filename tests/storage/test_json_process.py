"""A process that answers JSON ends with its parent, in whatever state the parent left the socket."""

import os
import socket
import subprocess
import sys

import pytest

from dist_lm.storage.json_process import JsonProcess
from tests.descriptors import SELECTABLE, thousand_descriptors
from tests.patience import patient

WAITS = """
from dist_lm.storage.json_process import serve_requests
with serve_requests() as (requests, answer):
    answer({'ready': True})
    while True:
        requests.get()
"""


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [(b"", 0, ""), (b'{"a": 1}\n', 0, ""), (b'{"a": "cut o', 0, ""), (b"no JSON\n", 1, "JSONDecodeError")],
)
def test_it_ends_when_its_parent_closes_the_socket(sent, code, said):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", WAITS, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stderr=subprocess.PIPE,
            text=True,
        )
        theirs.close()
        assert ours.recv(100) == b'{"ready": true}\n'
        ours.sendall(sent)
    try:
        _, printed = process.communicate(timeout=patient(240))
    finally:
        process.kill()
    assert process.returncode == code
    assert said in printed
    assert bool(printed) == bool(said)


def test_a_message_that_is_no_json_is_an_error_of_the_process(tmp_path):
    (tmp_path / "writes_garbage.py").write_text("import os, sys\nos.write(int(sys.argv[1]), b'\\xff\\n')\n")
    process = JsonProcess("writes_garbage", environment={"PYTHONPATH": str(tmp_path)})
    try:
        with pytest.raises(OSError, match="expected a line of JSON"):
            process.receive(60)
    finally:
        process.end()


def test_a_process_that_does_not_read_costs_a_time_limit(tmp_path):
    (tmp_path / "reads_nothing.py").write_text("import time\ntime.sleep(600)\n")
    process = JsonProcess("reads_nothing", environment={"PYTHONPATH": str(tmp_path)})
    try:
        with pytest.raises(TimeoutError, match=r"did not read a request within 0\.2 s"):
            process.send({"text": "x" * 10_000_000}, 0.2)
    finally:
        process.end()


def test_a_rank_with_thousands_of_connections_hears_its_process(tmp_path):
    """Finds a wait by select.select, which raises for descriptors above 1,023: 512 ranks have more connections."""
    (tmp_path / "answers.py").write_text(WAITS)
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with thousand_descriptors():
        process = JsonProcess("answers", environment=environment)
        try:
            assert process._connection.fileno() >= SELECTABLE
            assert process.receive(60) == {"ready": True}
        finally:
            process.end()
