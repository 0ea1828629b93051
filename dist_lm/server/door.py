"""Who may talk to the server: a wrapper of the application that looks at headers, and at the size of bodies.

A web page that a user of this machine opens can send requests to a loopback address. So the server answers only under
its own names (a page may have made a name of its own point here), and never to a page of another origin.
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from dist_lm.chat.openai_errors import error_value
from dist_lm.errors import require
from dist_lm.server import chat_page

LOOPBACK = ("localhost", "127.0.0.1", "::1")
BODY_S = 30.0  # seconds for a body to arrive
SEND_S = 60.0  # seconds in which a client must take a piece of a response
MOST_BODIES = 64  # bodies of the largest size that may be in memory together
PUBLIC = ("/health",)  # paths that need no key, beside those of the chat page
PATHS = {
    chat_page.ROOT,
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/infill", "/score"),
    *("/tokenize", "/detokenize", "/health", "/metrics"),
}

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class DoorRules:
    """Whom the server answers."""

    host: str  # the address that it listens on
    key: str = field(default="", repr=False)  # empty: none is needed
    hosts: Sequence[str] = ()  # names of the server beside its address, without a port
    origins: Sequence[str] = ()  # web pages that may call it, such as https://chat.example.org

    def __post_init__(self) -> None:
        is_local = is_loopback(self.host)
        require(
            is_local or bool(self.key),
            "--host",
            self.host,
            "127.0.0.1, or a key in the variable DIST_LM_API_KEY: anybody could use the model",
        )
        require(
            self.key.isascii() and self.key.isprintable() and self.key == self.key.strip(),
            "DIST_LM_API_KEY",
            "(not shown)",
            "printable ASCII without spaces around it, which a header can hold",
        )


def is_loopback(host: str) -> bool:
    """Returns whether an address or name is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def refusal_of(rules: DoorRules, path: str, headers: Sequence[tuple[bytes, bytes]]) -> tuple[int, str, str] | None:
    """Returns (status, message, code) for a request that is refused by its headers; None: it may come in."""
    # Every byte is a character of Latin-1, so decoding cannot fail.
    values = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
    host = values.get("host", "")
    name = (urlsplit(f"//{host}").hostname or "") if _is_authority(host) else ""
    known = {*rules.hosts, rules.host, *(LOOPBACK if is_loopback(rules.host) else ())}
    # With a key, a name of somebody else's making gains nothing: the page does not know the key.
    if name not in known and not (rules.key and not rules.hosts):
        return (
            403,
            f"Host {name[:80]!r}: not a name of this server: expected {', '.join(sorted(known))}",
            "host_refused",
        )

    origin = values.get("origin")
    if origin is not None and origin not in (*rules.origins, f"http://{host}", f"https://{host}"):
        return 403, f"Origin {origin[:80]!r}: web pages of other origins are refused (--allow-origin)", "origin_refused"
    # A link elsewhere may open the chat page, which is the same for everybody and can be shown in no frame.
    opens_page = (path, values.get("sec-fetch-dest")) == (chat_page.ROOT, "document")
    if origin is None and values.get("sec-fetch-site") in ("cross-site", "same-site") and not opens_page:
        return 403, "web pages of other origins are refused (--allow-origin)", "origin_refused"

    if rules.key and path not in PUBLIC and not chat_page.is_page_path(path):
        token = bearer_token(values.get("authorization", ""))
        # A comparison that ends at the first wrong character would tell by its time how many are right.
        if not hmac.compare_digest(token.encode(), rules.key.encode()):
            return 401, "the key is missing or wrong: send it as `Authorization: Bearer KEY`", "invalid_api_key"
    return None


def bearer_token(authorization: str) -> str:
    """Returns the key in the header `Authorization`; empty if it has another form."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _is_authority(host: str) -> bool:
    try:
        return bool(urlsplit(f"//{host}").hostname) and not {*host} & {*"/?#@\\ "}
    except ValueError:
        return False


class Door:
    """Lets requests in by `refusal_of`, with whole bodies of at most `body_bytes`."""

    def __init__(self, app: App, rules: DoorRules, body_bytes: int, count: Callable[[str, int], None]) -> None:
        """
        Args:
            count: called with path and status of every response; the path is one of `PATHS`, or `other`.
        """
        self._app = app
        self._rules = rules
        self._body_bytes = body_bytes
        self._count = count
        self._held_bytes = 0  # size of bodies whose requests are under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no web socket is offered
            await send({"type": "websocket.close", "code": 1008})
            return

        path = scope["path"] if scope["path"] in PATHS else "other"

        async def send_in_time(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(path, message["status"])
            try:
                # A client that takes nothing would hold its request and the pages of its answer for ever.
                async with asyncio.timeout(SEND_S):
                    await send(message)
            except TimeoutError as error:
                raise _SlowClientError from error

        try:
            await self._let_in(scope, receive, send_in_time)
        except _SlowClientError:
            return  # the connection is closed, because the response is not complete

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request with its whole body to the application, or refuses it."""
        if refusal := refusal_of(self._rules, scope["path"], scope["headers"]):
            status, message, code = refusal
            await _refuse(send, status, message, code)
            return

        body = bytearray()
        try:
            if refused := await self._read(scope, receive, body):
                await _refuse(send, *refused)
            else:
                await self._app(scope, _whole(bytes(body), receive), send)
        finally:
            # Also after an error: bytes that stayed counted would refuse the bodies of later requests.
            self._held_bytes -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> tuple[int, str, str] | None:
        """Appends the content of a body, of which no more is read than the limit.

        Returns:
            (status, message, code) if it is refused; None: it is complete.
        """
        too_long = 413, f"the body is longer than {self._body_bytes:,} bytes", "body_too_large"

        # A length that is declared is refused before anything is read, one that is not while it is read.
        # `int` raises an error at thousands of digits; 20 digits exceed any limit.
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > self._body_bytes:
            return too_long
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    content = message.get("body", b"")
                    body += content
                    self._held_bytes += len(content)
                    if len(body) > self._body_bytes:
                        return too_long
                    # Bodies stay in memory until their requests end, so their sum has a limit too.
                    if self._held_bytes > MOST_BODIES * self._body_bytes:
                        return 429, "bodies of other requests fill the memory for them: try again later", "many_bytes"
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return None
        except TimeoutError:
            return 408, f"the body did not arrive within {BODY_S:g} s", "timeout"


class _SlowClientError(OSError):
    """A client did not take a piece of a response in time; Starlette ends a stream at an OSError."""


def _whole(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that gives the body first, and then tells whether the client has gone."""
    is_read = False

    async def receive_whole() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_whole


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    content = json.dumps(error_value(message, status, code=code)).encode()

    # The rest of a refused body is not read, so the connection cannot be used again.
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
