"""Sends bytes and open files over a socket of the sandbox.

This module runs inside the sandbox. Only the standard library is imported, and little of it.
"""

from __future__ import annotations

import _socket  # `socket` itself takes long to import
import os
import select
import sys

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Sequence

JUDGED = b"j"  # first byte of a request to the server, if a test of it has a judge
_MOST_FILES = 8


def socketpair() -> tuple[int, int]:
    """Returns the descriptors of two sockets that are connected."""
    first, second = _socket.socketpair()
    return first.detach(), second.detach()


def read_exactly(channel: int, length: int) -> bytes:
    """Returns the next `length` bytes; waits for them.

    Raises:
        OSError: the other side has gone.
    """
    data = bytearray()
    while len(data) < length:
        piece = os.read(channel, min(length - len(data), 1 << 20))
        if not piece:
            raise OSError("the other side has ended")
        data += piece
    return bytes(data)


def write_frame(channel: int, content: bytes) -> None:
    """Writes the length of `content` in four bytes, then `content`."""
    data = memoryview(len(content).to_bytes(4, "big") + content)
    while data:
        data = data[os.write(channel, data) :]


def has_more(channel: int) -> bool:
    """Returns whether bytes have come, or the other side has gone."""
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    return bool(poller.poll(0))


def send_files(channel: int, content: bytes, files: Sequence[int]) -> None:
    """Sends a few bytes together with open files, which stay open here.

    Raises:
        OSError: the other side has gone.
    """
    # A socket object for one call: `detach` leaves the descriptor open, which its end would close.
    end = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, channel)
    try:
        numbers = b"".join(file.to_bytes(4, sys.byteorder) for file in files)
        end.sendmsg([content], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)])
    finally:
        end.detach()


def receive_files(channel: int, length: int) -> tuple[bytes, list[int]]:
    """Returns the next `length` bytes and the descriptors of the files that come with them, for the caller to close.

    Waits for the bytes. There may be no files.

    Raises:
        OSError: the other side has gone.
    """
    # As in `send_files`.
    end = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, channel)
    try:
        content, messages, _, _ = end.recvmsg(length, _socket.CMSG_LEN(4 * _MOST_FILES), _socket.MSG_WAITALL)
    finally:
        end.detach()
    if len(content) < length:
        raise OSError("the other side has ended")
    numbers = b"".join(data for _, _, data in messages)
    return content, [int.from_bytes(numbers[i : i + 4], sys.byteorder) for i in range(0, len(numbers), 4)]
