"""gloo's connections, guarded against other users of the machine.

A gloo group listens on a TCP port until it is destroyed, and takes the first connection that names the number of a pair
(0, 1, ...) for the rank that it expects: it asks for no secret, and torch is built without gloo's TLS. So whoever can
reach the port in time could speak for a rank. Inside `guarded` no byte of a connection is read before its other end is
known to belong to the user of this process, and after the block no one can connect at all:

- A filter on the listening socket, which its connections inherit, drops every packet that carries data.
- A thread looks up the owner of each connection in /proc/net/tcp. It takes the filter from one of this user, and closes
  one of another user.
- At the end of the block another filter drops whatever reaches the listening sockets.

The sender repeats what was dropped after 0.2 s, once in the life of a connection; collectives cost what they cost
before. A connection from another machine is let in: its owner cannot be seen from here. Without Linux nothing is
guarded.
"""

import ctypes
import logging
import os
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d

log = logging.getLogger(__name__)

ATTACH_FILTER, DETACH_FILTER, GET_FILTER = 26, 27, 26  # asm-generic/socket.h
LOOK_S, LONGEST_LOOK_S = 0.002, 0.02  # between two looks at the connections; it grows while a rank waits for others
N_PORTS = 20  # most ports that a stranger may reach before their filter is there
INSTRUCTION_BYTES = 8
ACCEPTED_S = 0.005  # for gloo's thread to accept a connection
DESCRIPTORS = Path("/proc/self/fd")
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
# Classic BPF (linux/filter.h) as (code, jump if true, jump if false, k): what it returns is how much of a packet stays.
DROP_ALL = ((0x06, 0, 0, 0),)
DROP_DATA = (
    (0x30, 0, 0, 12),  # A = byte 12 of the TCP header, whose upper half is the length of the header in words
    (0x74, 0, 0, 4),
    (0x64, 0, 0, 2),  # A = that length in bytes
    (0x07, 0, 0, 0),  # X = A
    (0x80, 0, 0, 0),  # A = length of the packet
    (0x1D, 1, 0, 0),  # they differ: there is data
    (0x06, 0, 0, 0),
    (0x06, 0, 0, 0xFFFFFFFF),
)
# The kernel takes the size of the buffer for a number of instructions, so it writes behind one that is too short.
FILTER_BYTES = INSTRUCTION_BYTES * max(len(DROP_ALL), len(DROP_DATA))


class StrangerError(RuntimeError):
    """Another user has connected to a port of this rank before it was guarded."""


@contextmanager
def guarded() -> Iterator[None]:
    """Makes torch create its gloo groups behind the guard inside the block, also where it splits groups.

    Blocks may overlap in several threads.

    Raises:
        StrangerError: at the end of the block, see there: no group of the block may be used.
    """
    if sys.platform != "linux":
        yield
        return

    with _GUARD.watching():
        yield


class GuardedGloo(dist.ProcessGroupGloo):
    """A gloo group whose constructor guards its connections."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        """Connects to all ranks of the group (collective).

        Raises:
            StrangerError: another user was faster than the guard.
        """
        if sys.platform != "linux":
            super().__init__(store, rank, size, timeout=timeout)
            return

        with _GUARD.watching():
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = timeout
            # As torch's own constructor does.
            interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
            options._devices = [_GUARD.new_device(interface) for interface in interfaces or [""]]
            options._threads = 2 * len(options._devices)
            super().__init__(store, rank, size, options)

            # A rank that left its group at once would close its connections before the others have seen their owner.
            store.set(f"guarded/{rank}", "1")
            store.wait([f"guarded/{peer}" for peer in range(size)], timeout)


@dataclass
class _Connections:
    """All listening sockets of gloo in this process, and the thread that watches them inside `watching`."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    addresses: dict[int, tuple] = field(default_factory=dict)  # inode of a listening socket -> its address
    judged: set[int] = field(default_factory=set)  # inodes of connections
    strangers: dict[tuple, str] = field(default_factory=dict)  # address -> who came before its filter, in words
    refused: set[int | None] = field(default_factory=set)  # users whose connections were closed
    n_blocks: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Lets connections of this user in during the block, and nobody afterwards, once no other block is open.

        Raises:
            StrangerError: at the end of the outermost block.
        """
        with self.lock:
            self.n_blocks += 1
            if self.n_blocks == 1:
                self._open()

        try:
            yield
        finally:
            with self.lock:
                self.n_blocks -= 1
                if self.n_blocks == 0:
                    self._close()

        with self.lock:
            if self.strangers and self.n_blocks == 0:
                strangers, self.strangers = self.strangers, {}
                raise StrangerError(
                    f"{'; '.join(strangers.values())}: another user of this machine tries to take part in this run; "
                    "start it again, and ask him to stop"
                )

    def new_device(self, interface: str) -> dist.ProcessGroupGloo.Device:
        """Returns a device of gloo, whose port has the filter already.

        Args:
            interface: name of a network interface; empty: gloo chooses.

        Raises:
            StrangerError: another user connects to every new port at once.
        """
        for _ in range(N_PORTS):
            with self.lock:
                before = {descriptor for descriptor in _descriptors() if _is_open(descriptor)}
                if interface:
                    device = dist.ProcessGroupGloo.create_device(interface=interface)
                else:
                    device = dist.ProcessGroupGloo.create_default_device()
                new_addresses = self._adopt(before)

                # Nobody knows the port yet: who has connected before the filter was there is no rank. gloo takes such a
                # connection at once.
                time.sleep(ACCEPTED_S)
                self._look()
                strangers = [self.strangers.pop(address) for address in new_addresses if address in self.strangers]
                if not strangers:
                    return device
                log.warning("%s: this rank takes another port", "; ".join(strangers))
        raise StrangerError(f"another user of this machine has connected to {N_PORTS} ports of this rank at once")

    def _adopt(self, before: set[int]) -> Collection[tuple]:
        """Puts the filter on the sockets that listen now, and whose descriptors are not in `before`; at once, as others
        see their ports already. Returns their addresses."""
        new_addresses = {}
        for inode, tcp_socket in _tcp_sockets(before):
            with tcp_socket:
                if _is_listening(tcp_socket):
                    _attach(tcp_socket, DROP_DATA)
                    new_addresses[inode] = tcp_socket.getsockname()
        assert new_addresses, "gloo listens on another kind of socket than TCP"
        self.addresses |= new_addresses
        return new_addresses.values()

    def _open(self) -> None:
        distributed_c10d.ProcessGroupGloo = GuardedGloo  # type: ignore[misc]
        # Groups that are split from earlier ones connect through the ports of those.
        self._filter(DROP_DATA)
        self.ended.clear()
        self.thread = threading.Thread(target=self._watch, name="gloo-guard", daemon=True)
        self.thread.start()

    def _close(self) -> None:
        distributed_c10d.ProcessGroupGloo = dist.ProcessGroupGloo  # type: ignore[misc]
        self.ended.set()
        self._filter(DROP_ALL)
        self._look()
        self.judged &= _inodes()

    def _filter(self, program: tuple[tuple[int, int, int, int], ...]) -> None:
        """Puts a filter on the listening sockets, and forgets those that are closed."""
        still_open = {}
        for inode, tcp_socket in _tcp_sockets():
            with tcp_socket:
                if inode in self.addresses:
                    _attach(tcp_socket, program)
                    still_open[inode] = self.addresses[inode]
        self.addresses = still_open

    def _watch(self) -> None:
        pause_s = LOOK_S
        while not self.ended.wait(pause_s):
            with self.lock:
                if self.n_blocks:
                    self._look()
            pause_s = min(1.05 * pause_s, LONGEST_LOOK_S)

    def _look(self) -> None:
        """Judges the connections that have come since the last look. Reads the kernel's table once, as on many ranks it
        has thousands of lines."""
        ports = set(self.addresses.values())
        with ExitStack() as copies:
            new_connections = {}
            for inode, tcp_socket in _tcp_sockets():
                copies.enter_context(tcp_socket)
                if inode in self.judged or inode in self.addresses:
                    continue
                # A connection that ends meanwhile needs no judgement.
                with suppress(OSError):
                    if tcp_socket.getsockname() in ports and not _is_listening(tcp_socket):
                        new_connections[inode] = tcp_socket

            # Not before: a connection that is younger than the table would have no owner.
            owners = _owners() if new_connections else {}
            for inode, connection in new_connections.items():
                with suppress(OSError):
                    if self._judge(connection, owners):
                        self.judged.add(inode)

    def _judge(self, connection: socket.socket, owners: Mapping[tuple[str, str], int]) -> bool:
        """Takes the filter from a connection of this user or of another machine, and closes one of another user.

        Args:
            owners: what `_owners` has returned since the connection was there.

        Returns:
            False if the kernel does not name the owner now: it skips entries of its table that move while it is read,
            and has none for a process that has left. Behind its filter such a connection can wait.
        """
        here, there = connection.getsockname(), connection.getpeername()
        has_filter = bool(connection.getsockopt(socket.SOL_SOCKET, GET_FILTER, FILTER_BYTES))
        uid = owners.get((_in_table(there), _in_table(here)))
        if uid == os.geteuid() or (uid is None and not _is_of_this_machine(there)):
            if has_filter:
                connection.setsockopt(socket.SOL_SOCKET, DETACH_FILTER, 0)
            return True
        if uid is None and has_filter:
            return False

        who = f"user {uid}" if uid is not None else "a process that has left"
        if not has_filter:
            self.strangers[here] = f"{who} has connected to {here[0]}:{here[1]} before it was guarded"
        elif uid not in self.refused:
            # Once for each user, as one who connects again and again must not fill the log.
            self.refused.add(uid)
            log.warning("refused: %s has connected to %s:%d, where ranks meet", who, *here[:2])
        connection.shutdown(socket.SHUT_RDWR)
        return True


_GUARD = _Connections()


def _tcp_sockets(without: Collection[int] = ()) -> Iterator[tuple[int, socket.socket]]:
    """Yields the inode of each TCP socket of this process, and a copy of the socket, which the caller closes.

    Args:
        without: descriptors to pass over.
    """
    seen = set()
    for listed in _descriptors() - set(without):
        # The descriptor may be closed, or belong to something else, by now.
        with suppress(OSError):
            descriptor = os.dup(listed)
            status = os.fstat(descriptor)
            if status.st_ino in seen or not stat.S_ISSOCK(status.st_mode):
                os.close(descriptor)
                continue
            seen.add(status.st_ino)
            tcp_socket = socket.socket(fileno=descriptor)
            if tcp_socket.family in (socket.AF_INET, socket.AF_INET6) and tcp_socket.type == socket.SOCK_STREAM:
                yield status.st_ino, tcp_socket
            else:
                tcp_socket.close()


def _inodes() -> set[int]:
    """Returns the inodes of all TCP sockets of this process."""
    inodes = set()
    for inode, tcp_socket in _tcp_sockets():
        tcp_socket.close()
        inodes.add(inode)
    return inodes


def _descriptors() -> set[int]:
    """Returns the open descriptors of this process, and the one by which they are listed, which is closed again."""
    return {int(entry.name) for entry in DESCRIPTORS.iterdir()}


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _is_listening(tcp_socket: socket.socket) -> bool:
    return bool(tcp_socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def _attach(tcp_socket: socket.socket, program: tuple[tuple[int, int, int, int], ...]) -> None:
    """Puts a filter on a socket, in place of the one that it has."""
    instructions = (_Instruction * len(program))(*(_Instruction(*line) for line in program))
    tcp_socket.setsockopt(socket.SOL_SOCKET, ATTACH_FILTER, bytes(_Program(len(program), instructions)))


def _owners() -> dict[tuple[str, str], int]:
    """Returns the user of each TCP socket of a living process of this machine, by its own address and that of its other
    end, as `_in_table` writes them."""
    owners = {}
    for table in TABLES:
        # A kernel without IPv6 has one table.
        if not table.exists():
            continue
        for line in table.read_text().splitlines()[1:]:
            words = line.split()
            # A socket that its process has closed has no inode, and is listed as one of user 0.
            if words[9] != "0":
                owners[words[1], words[2]] = int(words[7])
    return owners


def _in_table(address: tuple) -> str:
    """Returns an address as /proc/net/tcp has it: words of 4 bytes as numbers of this machine, and the port."""
    host, port = address[:2]
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host.partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


def _is_of_this_machine(address: tuple) -> bool:
    """Returns whether an IP address belongs to this machine: then a socket can be bound to it."""
    host = address[0]
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0, *address[2:]))
        except OSError:
            return False
    return True
