"""A server of files on loopback that can be slow, break off, stand still, or send only whole files."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Served:
    """A folder behind a server on loopback, and the bytes of bodies that went out."""

    folder: Path
    url: str = ""
    sent: list[int] = field(default_factory=list)
    break_after: int = -1  # bytes of a body after which the next connection breaks; -1: none does
    always_break: bool = False
    ranges: bool = True
    etags: bool = True
    stall_after: int = -1  # bytes of a body after which the next answers stand still; -1: none does
    stalls: int = 0  # answers that do
    parts: int = 10  # writes of a body; each wakes its reader
    pause_s: float = 0.0  # before each part of a body
    before_body: Callable[[int], None] = lambda size: None  # called before each body that is sent, with its size
    released: threading.Event = field(default_factory=threading.Event)  # ends what stands still
    fails: int = 0  # status of every answer; 0: none fails
    empty_parts: int = 0  # next answers to requests of a part that have no byte of it


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD with ranges and ETags, as object stores and CDNs answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is several writes, and each would wait 40 ms for the one before

    def __init__(self, served: Served, *args, **options) -> None:
        self.served = served
        super().__init__(*args, **options)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.served.folder / self.path.lstrip("/").partition("?")[0]
        if self.served.fails or not path.is_file():
            self.send_response(self.served.fails or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.served.ranges else None
        first, last = (int(part[1]), int(part[2] or len(content) - 1)) if part else (0, len(content) - 1)
        last = min(last, len(content) - 1)
        self.send_response(206 if part else 200)
        self.send_header("Accept-Ranges", "bytes" if self.served.ranges else "none")
        if self.served.etags:
            self.send_header("ETag", f'"{hash(content):x}"')
        is_empty = bool(part) and self.served.empty_parts > 0
        self.served.empty_parts -= is_empty
        self.send_header("Content-Length", "0" if is_empty else str(last - first + 1))
        if part:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if body and not is_empty:
            sent = content[first : last + 1]
            if 0 <= self.served.break_after < len(sent) or self.served.always_break:
                self.wfile.write(sent[: max(0, self.served.break_after)])
                self.served.break_after = -1
                self.close_connection = True
                return
            if self.served.stalls and 0 <= self.served.stall_after < len(sent):
                self.served.stalls -= 1
                self.wfile.write(sent[: self.served.stall_after])
                self.served.released.wait(60)
                self.close_connection = True
                return
            self.served.sent.append(len(sent))
            self.served.before_body(len(sent))
            part_size = len(sent) // self.served.parts + 1
            for first_of_part in range(0, len(sent), part_size):
                time.sleep(self.served.pause_s)
                self.wfile.write(sent[first_of_part : first_of_part + part_size])

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """Serves a folder while the block runs."""
    served = Served(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, served))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  a reader may leave early
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield served
    served.released.set()
    server.shutdown()
    server.server_close()
    thread.join(10)
