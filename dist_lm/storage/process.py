"""Finds processes on one machine by a mark in their environment, and ends them reliably.

torchrun gives every rank its own session, so the ranks share no process group. Instead, the processes that an agent
starts carry a mark in their environment, which children inherit and keep when they are reparented.
"""

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

MARK = "DIST_LM_GANG"  # environment variable
POLL_S = 0.05
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def marked(mark: str, variable: str = MARK) -> list[psutil.Process]:
    """Returns the living processes on this machine whose environment variable has the value `mark`, except this one.

    Zombies, and processes whose environment this user may not read, are left out.
    """
    return _matching(lambda process: is_alive(process) and process.environ().get(variable) == mark)


def users_of(directory: Path) -> list[psutil.Process]:
    """Returns the processes on this machine with an open file below `directory`, except this one.

    `directory` must be absolute. Processes of other users, whose files cannot be seen, are left out.
    """
    return _matching(lambda process: any(directory in Path(file.path).parents for file in process.open_files()))


def _matching(matches: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Returns the other processes on this machine for which `matches` holds; those it cannot examine are left out."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and matches(process):
                processes.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended, or belongs to another user
            continue
    return processes


def title(process: psutil.Process) -> str:
    """Returns the command line of a process, which it may have overwritten; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def is_alive(process: psutil.Process) -> bool:
    """Returns whether a process runs; a zombie does not."""
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def state(process: psutil.Process) -> str:
    """Returns the kernel's letter for the state (T stopped, D waiting for a device, else R); empty if it has ended."""
    try:
        status = process.status()
    except psutil.NoSuchProcess:
        return ""
    return {psutil.STATUS_STOPPED: "T", psutil.STATUS_TRACING_STOP: "T", psutil.STATUS_DISK_SLEEP: "D"}.get(status, "R")


def catches(process: psutil.Process, number: signal.Signals) -> bool:
    """Returns whether a process has installed a handler for a signal (by default SIGUSR1 would end it).

    False if the process has ended. On systems other than Linux, where this cannot be seen, always True. A signal that
    the process ignores counts as not caught.
    """
    if sys.platform != "linux":
        return True

    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False

    # SigCgt is a hexadecimal mask; bit N - 1 stands for signal N.
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def signal_name(number: int) -> str:
    """Returns the name of a signal, such as SIGKILL; a real-time signal has only its number."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Sends a signal to a process, which may have ended."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def end(find: Callable[[], list[psutil.Process]], grace_s: float, kill_s: float = 10.0) -> list[int]:
    """Ends every process that `find` returns: SIGTERM once to each, then SIGKILL to those that live after `grace_s`.

    Times are in seconds. Returns when all that `find` ever found have ended, and at the latest after `grace_s + kill_s`
    seconds.

    Args:
        find: called every `POLL_S` seconds; processes that have ended are left out of what it returns.

    Returns:
        Ids of the processes that still live `kill_s` seconds after the first SIGKILL (blocked in the kernel); an empty
        list: all have ended.

    Raises:
        psutil.AccessDenied: a process belongs to another user.
    """
    known_processes: set[psutil.Process] = set()

    def find_living() -> list[psutil.Process]:
        # Search again in each round: a process may have started others meanwhile. A process that is ending has lost its
        # environment, so that `find` may miss its mark, but it still holds files and devices.
        known_processes.update(find())
        return [process for process in known_processes if process.is_running() and is_alive(process)]

    terminated: set[int] = set()
    deadline = time.monotonic() + grace_s
    while (living := find_living()) and time.monotonic() < deadline:
        for process in living:
            if process.pid not in terminated:
                terminated.add(process.pid)
                send(process, signal.SIGTERM)
        time.sleep(POLL_S)

    deadline = time.monotonic() + kill_s
    while (living := find_living()) and time.monotonic() < deadline:
        for process in living:
            send(process, signal.SIGKILL)
        time.sleep(POLL_S)

    return [process.pid for process in living]


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))  # a batch job may have only some of the machine's cores
    return os.cpu_count() or 1


class CpuUsage:
    """Measures how many of the cores that this process may use are left by other programs, from its creation on."""

    SHORTEST_S = 0.2  # length of a measurement: the kernel counts in hundredths of a second

    def __init__(self) -> None:
        self._before = self._sample()

    def free_cores(self) -> int:
        """Returns the number of cores that were idle or used by this process since the object was made, rounded.

        Waits until `SHORTEST_S` have passed. Where the system does not count, all cores are free.
        """
        time.sleep(max(0.0, self.SHORTEST_S - (time.monotonic() - self._before[0])))
        began, idle_before, all_before, process_s_before = self._before
        now, idle, total, process_s = self._sample()
        # Sandboxed kernels have counters that stand still.
        if total <= all_before:
            return cores()
        return round((idle - idle_before + process_s - process_s_before) / (now - began))

    @staticmethod
    def _sample() -> tuple[float, float, float, float]:
        """Returns seconds: the clock, idle and all time of the cores, and the CPU time of this process."""
        times = psutil.cpu_times(percpu=True)
        if sys.platform == "linux":
            allowed = os.sched_getaffinity(0)
            times = [times[core] for core in allowed if core < len(times)] or times
        idle = sum(core.idle + getattr(core, "iowait", 0.0) for core in times)
        return time.monotonic(), idle, sum(sum(core) for core in times), time.process_time()


def reserve_port() -> socket.socket:
    """Returns a socket with a TCP port that no address of this machine uses, as torch's TCPStore listens on all of
    them.

    While it is open, the kernel gives the port to no other socket that asks for any; a server that asks for this one
    may listen there. The caller closes it.

    Raises:
        OSError: no port is free.
    """
    # A socket of IPv6 takes the port of IPv4 too, so no other server can have either.
    reserved = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
    if reserved.family == socket.AF_INET6:
        reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    return reserved


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process (SIGKILL) when its parent ends. Does nothing on systems other than Linux.

    Args:
        parent: expected process id of the parent; if it has already ended, this process ends at once with code 1. None:
            not checked.

    Raises:
        OSError: the kernel refuses.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")

    # The parent may have ended before prctl, which then sends no signal.
    if parent is not None and os.getppid() != parent:
        os._exit(1)
