"""`python -m tests.cluster.neighbourhood FOLDER RUN COMMAND...`: a run beside another user of the machine.

The run and its neighbour have processes, network and shared memory of their own, so that nobody else's are tried. It
prints one JSON object:

    code, out, err      of the command
    ports               [program, address] of each listening port, of processes of the run, as they were seen
    secrets_seen        whether a command line held the token of the run's Ray
    neighbour           what the neighbour could do and what he was refused (`neighbour.py`)
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

NEIGHBOUR = Path(__file__).parent / "neighbour.py"
# Without an address besides loopback, Ray finds none of this host.
SETUP = (
    ("ip", "link", "set", "lo", "up"),
    ("ip", "address", "add", "10.77.0.1/32", "dev", "lo"),
    ("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm"),
)
APART = ("unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc")
LOOK_S = 0.2


def program_of(process: psutil.Process) -> str:
    """A name for a process in the table of ports."""
    line = process.cmdline()
    modules = [line[at + 1] for at, word in enumerate(line[:-1]) if word == "-m"]
    if modules:
        # One program has all verbs; the verb says what it is.
        return " ".join(line[line.index("dist_lm") :][:2]) if modules[0] == "dist_lm" else modules[0]
    return process.name()


def look(ports: set[tuple[str, str]], tokens: set[str]) -> None:
    """Adds the listening ports of all processes but this one and the neighbour's, and the tokens of Ray."""
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, OSError):
            if process.pid == os.getpid() or process.uids().real != 0:
                continue
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    ports.add((program_of(process), connection.laddr.ip.removeprefix("::ffff:")))
            path = process.environ().get("RAY_AUTH_TOKEN_PATH")
            if path:
                tokens.add(Path(path).read_text().strip())


def main() -> None:
    folder, run, *command = sys.argv[1:]
    for step in SETUP:
        subprocess.run(step, check=True)

    neighbour = subprocess.Popen(
        [sys.executable, "-S", str(NEIGHBOUR), folder, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert neighbour.stdout
    neighbour.stdout.readline()

    ports: set[tuple[str, str]] = set()
    tokens: set[str] = set()
    shown: list[str] = []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=os.environ | {"TMPDIR": folder}
        )
        while process.poll() is None:
            look(ports, tokens)
            for other in psutil.process_iter(["cmdline"]):
                shown += [word for word in other.info["cmdline"] or () if any(token in word for token in tokens)]
            time.sleep(LOOK_S)
        out.seek(0)
        err.seek(0)
        told, _ = neighbour.communicate("")
        report = {
            "code": process.returncode,
            "out": out.read(),
            "err": err.read(),
            "ports": sorted(ports),
            "tokens": len(tokens),
            "secrets_seen": shown,
            "neighbour": json.loads(told),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
