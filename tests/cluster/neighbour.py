# One system call in each try, so names are plain texts.
# ruff: noqa: PTH103, PTH104, PTH108, PTH112, PTH113, PTH116, PTH118, PTH120, PTH123, PTH207, PTH208, PTH211, SIM115
"""`python -S neighbour.py FOLDER RUN`: another user of the machine (uid 65534), who tries what he can against a run.

He knows what every user can see: processes of user 0, their command lines, the ports and sockets of the machine. He
tries everything again and again until his standard input is closed, and prints a JSON object: what he was refused and
what he could do, by try, and how often he has tried everything while there were ranks or a server. After each time he
leaves the file ROUND in FOLDER.

FOLDER: the temporary folder of the run, where he may create names, as in /tmp. RUN: its run directory.
"""

import ctypes
import encodings.idna  # noqa: F401  needed by connections, and another user cannot load it
import glob
import http.client
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

UID = 65534
RANK = b"dist_lm.train"
SERVER = b"dist_lm\0serve"
ROUND = "round_of_the_neighbour"
OURS = (RANK, SERVER, b"dist_lm.cluster", b"dist_lm.launch", b"ray/core", b"ray::", b"ray/_private")
PTRACE_ATTACH = 16
VALIDATE, ADD, MAGIC = 0, 4, 0x3C85F7CE  # torch's TCPStore
RAY_CALLS = (
    "/ray.rpc.InternalKVGcsService/InternalKVKeys",
    "/ray.rpc.ActorInfoGcsService/GetAllActorInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.NodeManagerService/ShutdownRaylet",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.CoreWorkerService/KillActor",
    "/ray.rpc.CoreWorkerService/Exit",
)

SERVED = ("/v1/models", "/metrics", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/infill", "/score")
SERVED += ("/tokenize", "/detokenize")
ASKED = (
    b'{"prompt": "a", "tokens": [1], "input": "a", "input_prefix": "a", "messages": [{"role": "user", "content": "a"}]}'
)

Outcome = tuple[bool, str]
"""Whether he could do what he should not, and how it went."""


# --- what every user sees ---


def processes(*marks: bytes) -> list[int]:
    """Processes of user 0 with one of `marks` in their command line."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    line = file.read()
                if os.stat(f"/proc/{entry}").st_uid == 0 and any(mark in line for mark in marks):
                    found.append(int(entry))
            except OSError:
                continue
    return found


def listening() -> list[tuple[str, int]]:
    """Addresses at which user 0 listens in this network, which the run has for itself."""
    found = []
    for family, table in ((socket.AF_INET, "/proc/net/tcp"), (socket.AF_INET6, "/proc/net/tcp6")):
        with open(table) as file:
            lines = file.read().splitlines()[1:]
        for line in lines:
            words = line.split()
            if words[3] == "0A" and words[7] == "0":
                packed, port = words[1].split(":")
                host = b"".join(bytes.fromhex(packed[at : at + 8])[::-1] for at in range(0, len(packed), 8))
                found.append((socket.inet_ntop(family, host), int(port, 16)))
    return found


def connected(place: tuple[str, int]) -> socket.socket:
    """A connection, within half a second.

    Raises:
        OSError: none is possible.
    """
    return socket.create_connection(place, timeout=0.5)


def answer_to(place: tuple[str, int], message: bytes, ends: Callable[[bytes], bool] = bool) -> bytes:
    """What comes back within half a second."""
    received = b""
    with connected(place) as connection:
        connection.sendall(message)
        try:
            while not ends(received):
                part = connection.recv(1 << 16)
                if not part:
                    break
                received += part
        except OSError:
            pass
    return received


def refusals(actions: Iterator[tuple[str, Callable[[], object]]]) -> Outcome:
    """All actions must raise OSError."""
    refused = []
    for name, action in actions:
        try:
            action()
        except OSError as error:
            refused.append(f"{name}: {error.strerror or error}")
        else:
            return True, name
    return False, f"{len(refused)} refused, the last one {refused[-1]}" if refused else "nothing is there"


def of_the_run(pattern: str) -> list[str]:
    """Paths that are not his own."""
    return [name for name in glob.glob(pattern) if os.lstat(name).st_uid != UID]


# --- gRPC, as far as one call needs it ---


def grpc_status(place: tuple[str, int], path: str, token: str = "") -> int | None:
    """Calls a method with an empty message; returns its gRPC status (16: unauthenticated), None without any."""
    fields = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"ray")]
    fields += [(b"content-type", b"application/grpc"), (b"te", b"trailers")]
    if token:
        fields.append((b"authorization", b"Bearer " + token.encode()))
    block = b"".join(b"\0" + bytes([len(k)]) + k + bytes([len(v)]) + v for k, v in fields)
    call = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, block)
    answer = answer_to(place, call + frame(0, 1, 1, b"\0" * 5), lambda text: b"grpc-status" in text)
    _, name, rest = answer.partition(b"grpc-status")
    if not name:
        return None
    return int(rest[1 : 1 + rest[0]])


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content


# --- the tries ---


def reads_a_token_file() -> Outcome:
    names = of_the_run(f"{FOLDER}/dln-*") + glob.glob("/root/.ray/*")
    return refusals((name, lambda name=name: os.listdir(name)) for name in names)


def opens_the_token_by_its_name() -> Outcome:
    names = [f"{name}/token" for name in of_the_run(f"{FOLDER}/dln-*")]
    return refusals((name, lambda name=name: open(name).read()) for name in names)


def reads_an_environment() -> Outcome:
    names = [f"/proc/{pid}/environ" for pid in processes(*OURS)]
    return refusals((name, lambda name=name: open(name).read()) for name in names)


def reads_memory_or_descriptors() -> Outcome:
    names = [f"/proc/{pid}/{part}" for pid in processes(*OURS) for part in ("mem", "maps", "fd/0")]
    return refusals((name, lambda name=name: open(name, "rb").read(1)) for name in names)


def writes_memory() -> Outcome:
    return refusals((f"/proc/{pid}/mem", lambda pid=pid: open(f"/proc/{pid}/mem", "r+b")) for pid in processes(*OURS))


def sees_a_secret_in_a_command_line() -> Outcome:
    secret = os.environ.get("NEIGHBOUR_LOOKS_FOR", "").encode()
    lines = []
    for pid in processes(*OURS):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                lines.append(file.read())
        except OSError:
            continue
    words = [word for line in lines for word in line.split(b"\0")]
    tokens = [word for word in words if len(word) >= 32 and word.isalnum() and not word.isalpha()]
    return bool(secret and any(secret in line for line in lines)), f"{len(words)} words, {len(tokens)} like a token"


def attaches_to_a_rank() -> Outcome:
    libc = ctypes.CDLL(None, use_errno=True)

    def attach(pid: int) -> None:
        if libc.ptrace(PTRACE_ATTACH, pid, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    return refusals((f"ptrace {pid}", lambda pid=pid: attach(pid)) for pid in processes(*OURS))


def signals_a_process() -> Outcome:
    numbers = (signal.SIGKILL, signal.SIGUSR1, signal.SIGSTOP)
    pairs = [(pid, number) for pid in processes(*OURS) for number in numbers]
    return refusals((f"kill {pid}", lambda pid=pid, number=number: os.kill(pid, number)) for pid, number in pairs)


def changes_priority_or_limits() -> Outcome:
    limit = (resource.RLIMIT_NOFILE, (0, 0))
    pids = processes(*OURS)
    nice = [(f"nice {pid}", lambda pid=pid: os.setpriority(os.PRIO_PROCESS, pid, 19)) for pid in pids]
    limits = [(f"prlimit {pid}", lambda pid=pid: resource.prlimit(pid, *limit)) for pid in pids]
    return refusals(iter(nice + limits))


def writes_a_key_of_a_store() -> Outcome:
    """torch's TCPStore answers an addition with the sum."""
    add = struct.pack("=BI", VALIDATE, MAGIC) + struct.pack("=BQ", ADD, 5) + b"key_n" + struct.pack("=q", 7)
    for place in listening():
        try:
            if answer_to(place, add) == struct.pack("=q", 7):
                return True, f"a store at {place}"
        except OSError:
            continue
    return False, f"no store at {len(listening())} ports"


def opens_the_file_of_a_store() -> Outcome:
    names = of_the_run(f"{FOLDER}/dlm-*") + of_the_run(f"{FOLDER}/torchelastic_*")
    names += [f"{name}/tmp" for name in of_the_run(f"{FOLDER}/dln-*")]
    return refusals((name, lambda name=name: os.listdir(name)) for name in names)


def calls_ray_without_a_token() -> Outcome:
    return calls_ray("")


def calls_ray_with_a_token_of_his() -> Outcome:
    return calls_ray("0" * 64)


def calls_ray(token: str) -> Outcome:
    statuses: dict[int, int] = {}
    for place in listening():
        for path in RAY_CALLS:
            try:
                status = grpc_status(place, path, token)
            except OSError:
                break
            if status is None:
                break
            # 12: no such method at this port, 14: it is about to end
            if status not in (16, 12, 14):
                return True, f"{path} at {place}: status {status}"
            statuses[status] = statuses.get(status, 0) + 1
    return False, f"calls by status: {statuses}"


def asks_the_runtime_environment_agent() -> Outcome:
    names = ("get_or_create_runtime_env", "delete_runtime_env_if_possible", "get_runtime_envs_info")
    return asks_by_http([(f"/{name}", b"") for name in names], {}, timeout_s=0.5)


def asks_a_server_without_a_key() -> Outcome:
    return asks_a_server({})


def asks_a_server_with_a_key_of_his() -> Outcome:
    return asks_a_server({"Authorization": "Bearer " + "0" * 64})


def asks_a_server(headers: dict[str, str]) -> Outcome:
    """A server that lets him in answers, or says what is wrong with the body."""
    return asks_by_http([(path, ASKED if path not in SERVED[:2] else None) for path in SERVED], headers, timeout_s=5)


def asks_by_http(requests: list[tuple[str, bytes | None]], headers: dict[str, str], timeout_s: float) -> Outcome:
    """Asks whatever listens; `requests`: paths with their bodies (None: a GET). A place that speaks no HTTP is left."""
    statuses: dict[int, int] = {}
    for place in listening():
        for path, body in requests:
            host = place[0].removeprefix("::ffff:")
            request = urllib.request.Request(f"http://{host}:{place[1]}{path}", body, headers)
            try:
                with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                    return True, f"{path} at {place}: {answer.status}"
            except urllib.error.HTTPError as error:
                if error.code not in (401, 403, 404, 405):
                    return True, f"{path} at {place}: {error.code}"
                statuses[error.code] = statuses.get(error.code, 0) + 1
            except (OSError, ValueError, http.client.HTTPException):
                break
    return False, f"answers by status: {statuses}"


def finds_a_dashboard_or_a_client_server() -> Outcome:
    wanted = (8265, 10001, 29500, 52365, 44217, 44227)
    found = [place for place in listening() if place[1] in wanted]
    return bool(found), f"{found}"


def writes_into_the_run() -> Outcome:
    run = RUN
    names = [run, f"{run}/checkpoints", f"{run}/logs", os.path.dirname(os.path.dirname(run))]
    create = [(f"{name}/his", lambda name=name: open(f"{name}/his", "x")) for name in names if os.path.isdir(name)]
    files = glob.glob(f"{run}/*") + glob.glob(f"{run}/logs/*") + glob.glob(f"{run}/checkpoints/*/*")
    change = [(name, lambda name=name: open(name, "ab")) for name in files if os.path.isfile(name)]
    remove = [(name, lambda name=name: os.unlink(name)) for name in files if os.path.isfile(name)]
    return refusals(iter(create + change + remove))


def puts_links_where_names_will_be() -> Outcome:
    """Names that programs choose without a random part; what is written through them would appear in his folder."""
    own = os.path.join(FOLDER, "of_the_neighbour")
    os.makedirs(own, mode=0o777, exist_ok=True)
    for name in ("ray", "dlm-store", "dln", "torchelastic", "nccl_trace_rank_0", "pymp", "wandb", "torchinductor_root"):
        try:
            os.symlink(own, os.path.join(FOLDER, name))
        except FileExistsError:
            continue
    return bool(os.listdir(own)), f"written through his links: {os.listdir(own)}"


def removes_folders_of_the_run() -> Outcome:
    names = of_the_run(f"{FOLDER}/*")
    return refusals((name, lambda name=name: os.rename(name, name + ".his")) for name in names)


def opens_shared_memory() -> Outcome:
    names = [name for name in glob.glob("/dev/shm/*") if os.stat(name).st_uid == 0]
    return refusals((name, lambda name=name: open(name, "r+b")) for name in names)


def connects_to_unix_sockets() -> Outcome:
    with open("/proc/net/unix") as file:
        paths = {words[7] for line in file.read().splitlines()[1:] if len(words := line.split()) > 7}
    ours = [path for path in paths if path.startswith(FOLDER)]

    def connect(path: str) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(0.5)
            connection.connect(path)

    return refusals((path, lambda path=path: connect(path)) for path in ours)


def moves_into_a_cgroup() -> Outcome:
    groups = [name for name in glob.glob("/sys/fs/cgroup/**/cgroup.procs", recursive=True) if "dist_lm" in name]
    # The root of the unified hierarchy, or those of the controllers where each has a hierarchy of its own.
    groups += glob.glob("/sys/fs/cgroup/cgroup.procs") + glob.glob("/sys/fs/cgroup/*/cgroup.procs")
    return refusals((name, lambda name=name: open(name, "w").write("0")) for name in groups)


def fills_the_run_with_connections() -> Outcome:
    """Many connections that say nothing, to every port; the run must go on."""
    held = []
    for place in listening():
        for _ in range(20):
            try:
                held.append(connected(place))
            except OSError:
                break
    time.sleep(0.2)
    for connection in held:
        connection.close()
    return False, f"{len(held)} connections"


def sends_junk() -> Outcome:
    junk = (b"\0" * 64, b"\xff" * 4096, struct.pack("q", 0) + b"\1" * 64, b"GET / HTTP/1.1\r\n\r\n")
    n_sent = 0
    for place in listening():
        for message in junk:
            try:
                answer_to(place, message)
            except OSError:
                break
            n_sent += 1
    return False, f"{n_sent} messages"


TRIES = (
    reads_a_token_file,
    opens_the_token_by_its_name,
    reads_an_environment,
    reads_memory_or_descriptors,
    writes_memory,
    sees_a_secret_in_a_command_line,
    attaches_to_a_rank,
    signals_a_process,
    changes_priority_or_limits,
    writes_a_key_of_a_store,
    opens_the_file_of_a_store,
    calls_ray_without_a_token,
    calls_ray_with_a_token_of_his,
    asks_the_runtime_environment_agent,
    asks_a_server_without_a_key,
    asks_a_server_with_a_key_of_his,
    finds_a_dashboard_or_a_client_server,
    writes_into_the_run,
    puts_links_where_names_will_be,
    removes_folders_of_the_run,
    opens_shared_memory,
    connects_to_unix_sockets,
    moves_into_a_cgroup,
    fills_the_run_with_connections,
    sends_junk,
)


def become_the_neighbour() -> None:
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)


def main() -> None:
    become_the_neighbour()
    print("ready", flush=True)

    could: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    n_rounds = 0
    while not select.select([sys.stdin], [], [], 0.1)[0]:
        # A server that does not listen yet has nothing that he could ask.
        is_in_time = bool(processes(RANK) or (processes(SERVER) and listening()))
        for attempt in TRIES:
            try:
                success, text = attempt()
            except Exception:
                # A try that was not made refuses nothing.
                success, text = True, traceback.format_exc()
            told = (could if success else refused).setdefault(attempt.__name__, [])
            if text not in told:
                told.append(text)
        if is_in_time:
            n_rounds += 1
            open(os.path.join(FOLDER, ROUND), "w").close()
    print(json.dumps({"rounds": n_rounds, "could": could, "refused": refused}), flush=True)


FOLDER, RUN = sys.argv[1:3] if __name__ == "__main__" else ("", "")
if __name__ == "__main__":
    main()
