"""The last collectives of every rank, on demand. They show the rank that keeps the others waiting in a hang.

torch records each collective that a rank calls. Its worker server hands the records out in a thread without Python, so
also while the rank is in a collective that never returns. The server listens on a Unix socket in a directory that only
the user of the ranks can enter.
"""

import http.client
import json
import logging
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from dist_lm.storage import durable

log = logging.getLogger(__name__)

VARIABLE = "DIST_LM_COLLECTIVES"  # environment variable of a rank: directory of the sockets, one per local rank
HANDLERS = {"gloo": "fr_trace_json", "nccl": "dump_nccl_trace_json"}  # backend -> handler of torch's server
ANSWER_S = 5.0


@contextmanager
def collectives_served(environ: Mapping[str, str]) -> Iterator[None]:
    """Hands out this rank's records inside the block, if its agent has made a directory for the socket.

    If the server cannot start, a warning is logged and the block runs without it.
    """
    if VARIABLE not in environ:
        yield
        return
    from torch._C._distributed_c10d import _WorkerServer

    path = socket_of(Path(environ[VARIABLE]), int(environ["LOCAL_RANK"]))
    try:
        server = _WorkerServer(str(path))
    except RuntimeError as error:  # such as a path of more than 107 bytes
        log.warning("a hang will not show the collectives of this rank: %s", error)
        yield
        return
    try:
        yield
    finally:
        server.shutdown()


def socket_of(directory: Path, local_rank: int) -> Path:
    """Returns the socket of a local rank."""
    return directory / str(local_rank)


def dump_collectives(directory: Path, files: Mapping[int, Path]) -> None:
    """Writes the records of local ranks, all within about `ANSWER_S` for each backend. A rank that does not answer gets
    a file that says so.

    Args:
        directory: holds the sockets.
        files: local rank -> file, which is replaced. It holds JSON `{backend: torch's record}`, or `{"error": why there
            is none}`.

    Raises:
        OSError: a file cannot be written.
    """

    def dump(local: int, file: Path) -> None:
        try:
            records = _records(socket_of(directory, local))
        except (OSError, http.client.HTTPException, ValueError) as error:
            records = {"error": f"the rank does not answer: {error or type(error).__name__}"}
        durable.write_json(file, records)

    # In parallel, as each silent rank takes its whole timeout.
    with ThreadPoolExecutor(max(1, len(files))) as pool:
        list(pool.map(dump, files.keys(), files.values()))


def _records(path: Path) -> dict[str, Any]:
    """Returns torch's records of a rank by backend; backends that this torch lacks are left out.

    Raises:
        OSError: the rank does not answer within `ANSWER_S`.
        HTTPException: the answer is not HTTP.
        ValueError: the answer is not JSON.
    """
    records = {}
    for backend, handler in HANDLERS.items():
        with closing(http.client.HTTPConnection("localhost")) as connection:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(ANSWER_S)
            connection.sock.connect(str(path))
            connection.request("POST", f"/handler/{handler}")
            answer = connection.getresponse()
            # Else this torch has no such backend.
            if answer.status == http.HTTPStatus.OK:
                records[backend] = json.loads(answer.read())
    return records


def waited_for(files: Mapping[int, Path]) -> str:
    """Returns a text with the collectives that a hang waits for and the missing ranks; empty if the files do not show
    it.

    A rank that has called fewer collectives of a process group than its other members keeps them waiting. Missing files
    are passed over.

    Args:
        files: global rank -> file of `dump_collectives`.

    Raises:
        ArtefactError: a file is damaged.
        OSError: a file cannot be read.
    """
    # (backend, process group) -> the last collective of each rank
    last_calls: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for rank, file in files.items():
        record = durable.read_json(file)
        for backend in HANDLERS.keys() & record.keys():
            for entry in record[backend].get("entries", ()):
                if not entry["is_p2p"]:
                    last_calls.setdefault((backend, entry["process_group"][0]), {})[rank] = entry

    texts = []
    for _, call_of in sorted(last_calls.items()):
        # All ranks of a group call its collectives in one order, so the one that has called fewer is behind.
        ahead = max(call_of.values(), key=_number)
        behind = sorted(rank for rank, entry in call_of.items() if _number(entry) < _number(ahead))
        if behind:
            group = ahead["process_group"][1] or ahead["process_group"][0]
            ranks = ", ".join(map(str, behind[:8])) + (", ..." if len(behind) > 8 else "")
            texts.append(f"{ahead['profiling_name']} number {_number(ahead)} of {group} waits for rank {ranks}")
    return "; ".join(texts)


def _number(entry: Mapping[str, Any]) -> int:
    return entry["collective_seq_id"]
