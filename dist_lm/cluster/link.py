"""A connection between two nodes, tried and timed: one listens for a secret, the other sends it and some bytes."""

import secrets
import socket
import threading
import time
from contextlib import suppress

_CHUNK = bytes(1 << 20)
TIMEOUT_S = 10.0


class LinkServer:
    """Takes in what other nodes send, from those that know its secret; anyone else is hung up on."""

    def __init__(self, address: str) -> None:
        """Listen on a free port of `address`."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family)
        self.port: int = self._socket.getsockname()[1]
        self.secret = secrets.token_bytes(32)
        threading.Thread(target=self._serve, name="links", daemon=True).start()

    def close(self) -> None:
        """Listen no longer."""
        with suppress(OSError):  # systems differ in whether a listening socket can be shut down
            self._socket.shutdown(socket.SHUT_RDWR)  # closing it does not wake the thread that accepts
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._take, args=(peer,), name="link", daemon=True).start()

    def _take(self, peer: socket.socket) -> None:
        peer.settimeout(TIMEOUT_S)
        try:
            with peer, peer.makefile("rb") as stream:
                if not secrets.compare_digest(stream.read(len(self.secret)), self.secret):
                    return
                left = int.from_bytes(stream.read(8), "big")
                while left > 0:
                    left -= len(stream.read(min(left, len(_CHUNK))) or b"\0" * left)
                peer.sendall(b"\1")
        except OSError:  # the other side reports it
            return


def send(address: str, port: int, secret: bytes, n_bytes: int) -> float | str:
    """Bytes per second to a `LinkServer`, or why there is no connection."""
    content = memoryview(_CHUNK)
    try:
        with socket.create_connection((address, port), timeout=TIMEOUT_S) as link:
            started = time.perf_counter()
            link.sendall(secret + n_bytes.to_bytes(8, "big"))
            left = n_bytes
            while left > 0:
                link.sendall(content[: min(left, len(content))])
                left -= len(content)
            if link.recv(1) != b"\1":
                return f"{address}:{port} hung up"
            return n_bytes / (time.perf_counter() - started)
    except OSError as error:
        return f"{address}:{port}: {error.strerror or error}"
