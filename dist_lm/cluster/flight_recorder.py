"""The last collectives of every rank, on demand: what a hang waits for.

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
HANDLERS = {"gloo": "fr_trace_json", "nccl": "dump_nccl_trace_json"}  # of torch's server, by backend
ANSWER_S = 5.0


@contextmanager
def collectives_served(environ: Mapping[str, str]) -> Iterator[None]:
    """Hand out this rank's records inside the block, if its agent has made a directory for the socket."""
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
    """The socket of a local rank."""
    return directory / str(local_rank)


def dump_collectives(directory: Path, files: Mapping[int, Path]) -> None:
    """Write the records of local ranks, all within about `ANSWER_S`.

    Args:
        directory: of the sockets.
        files: by local rank. A file holds JSON `{backend: torch's record}`, or `{"error": why there is none}`.
    """

    def dump(local: int, file: Path) -> None:
        try:
            found = _records(socket_of(directory, local))
        except (OSError, http.client.HTTPException, ValueError) as error:
            found = {"error": f"the rank does not answer: {error or type(error).__name__}"}
        durable.write_json(file, found)

    with ThreadPoolExecutor(max(1, len(files))) as pool:
        list(pool.map(dump, files.keys(), files.values()))


def _records(path: Path) -> dict[str, Any]:
    found = {}
    for backend, handler in HANDLERS.items():
        with closing(http.client.HTTPConnection("localhost")) as connection:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(ANSWER_S)
            connection.sock.connect(str(path))
            connection.request("POST", f"/handler/{handler}")
            answer = connection.getresponse()
            if answer.status == http.HTTPStatus.OK:  # else this torch has no such backend
                found[backend] = json.loads(answer.read())
    return found


def waited_for(files: Mapping[int, Path]) -> str:
    """What the ranks of a hang wait for, by the files of `dump_collectives`; empty if they do not show it.

    A rank that has called fewer collectives of a process group than its other members keeps them waiting.
    """
    called: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}  # by backend and group: the last one of each rank
    for rank, file in files.items():
        record = json.loads(file.read_bytes()) if file.exists() else {}
        for backend in HANDLERS.keys() & record.keys():
            for entry in record[backend].get("entries", ()):
                if not entry["is_p2p"]:
                    called.setdefault((backend, entry["process_group"][0]), {})[rank] = entry
    found = []
    for _, last in sorted(called.items()):
        ahead = max(last.values(), key=_number)
        behind = sorted(rank for rank, entry in last.items() if _number(entry) < _number(ahead))
        if behind:
            group = ahead["process_group"][1] or ahead["process_group"][0]
            ranks = ", ".join(map(str, behind[:8])) + (", ..." if len(behind) > 8 else "")
            found.append(f"{ahead['profiling_name']} number {_number(ahead)} of {group} waits for rank {ranks}")
    return "; ".join(found)


def _number(entry: Mapping[str, Any]) -> int:
    return entry["collective_seq_id"]
