"""A part of this machine closed off: network, processes, mounts. All in it dies with it, or with the test."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from dist_lm.storage.process import is_alive
from tests.cluster.waiting import eventually
from tests.patience import patient

# everything but /tmp, /dev/shm and the writable directory is read-only; paths below /tmp keep their names
SCRIPT = """
set -euo pipefail
hosts=$1 writable=$2; shift 2
ip link set lo up
ip addr add 10.99.0.1/32 dev lo  # with nothing but loopback addresses, name look-ups fail
mount -t tmpfs tmpfs /mnt
number=0
for path in "$writable" "$@"; do
  number=$((number + 1)); mkdir "/mnt/$number"; mount --rbind "$path" "/mnt/$number"
done
mount --bind "$hosts" /etc/hosts
mount -o remount,bind,ro /
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs tmpfs /dev/shm
number=0
for path in "$writable" "$@"; do
  number=$((number + 1))
  case $path in /tmp/*) mkdir -p "$path" ;; esac
  mount --rbind "/mnt/$number" "$path"
  if [ "$number" -gt 1 ]; then mount -o remount,bind,ro "$path"; fi
done
umount --lazy /mnt
echo ready
while read -r; do :; done  # until the test closes our standard input, or ends
"""


class Namespace:
    """Processes in it see only each other and the loopback network."""

    def __init__(self, hosts: Path, writable: Path, readable: Sequence[Path]) -> None:
        """Make it.

        Args:
            hosts: takes the place of /etc/hosts.
            writable: the one directory, besides a /tmp of its own, that can be written to.
            readable: directories that must be there, even if they lie below the /tmp outside.
        """
        self._holder = subprocess.Popen(
            [
                *("unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"),
                *("bash", "-c", SCRIPT, "namespace", str(hosts), str(writable), *map(str, readable)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if self._holder.stdout.readline() != "ready\n":
            raise RuntimeError(f"no namespace: {self._holder.stderr.read()}")
        (self._init,) = psutil.Process(self._holder.pid).children()
        self._identity = self._space_of(self._init.pid)

    def command(self, *command: str, directory: Path | str = "/") -> list[str]:
        """The command line that runs `command` inside."""
        return ["nsenter", f"--target={self._init.pid}", "--net", "--pid", "--mount", f"--wdns={directory}", *command]

    def run(
        self,
        *command: str,
        environ: Mapping[str, str] | None = None,
        directory: Path | str = "/",
        seconds: float = 60,
        check: bool = True,
    ) -> str:
        """Run a command inside to its end; what it printed."""
        done = subprocess.run(
            self.command(*command, directory=directory),
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command} left with {done.returncode}: {done.stdout}"
        return done.stdout

    def sockets(self) -> str:
        """Its listening unix sockets and who has them, by the process ids of the outside."""
        command = ["nsenter", f"--target={self._init.pid}", "--net", "ss", "-xlpH"]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

    def processes(self) -> list[psutil.Process]:
        """The living processes inside, but for the first one."""
        return [
            found
            for found in psutil.process_iter()
            if found.pid != self._init.pid and self._space_of(found.pid) == self._identity and is_alive(found)
        ]

    def close(self) -> None:
        """End all that runs inside."""
        processes = self.processes()
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(timeout=patient(120))
        eventually("the namespace is empty", lambda: not any(map(is_alive, processes)))

    @staticmethod
    def _space_of(pid: int) -> str | None:
        try:
            return str(Path(f"/proc/{pid}/ns/pid").readlink())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return None
