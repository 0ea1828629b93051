"""The files of the chat page: who gets them, what a browser may do with them, and what stands in them."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from dist_lm.server import chat_page
from dist_lm.server.door import DoorRules, refusal_of

FILES = sorted(chat_page.FOLDER.iterdir())
SCRIPTS = [file for file in FILES if file.suffix == ".js"]
# What turns text into HTML or into code.
SINKS = (
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|\beval\(|new Function"
)
KEYED = DoorRules("0.0.0.0", key="secret")
LOCAL = DoorRules("127.0.0.1")


@pytest.fixture(scope="module")
def get() -> Callable[[str], httpx.Response]:
    """Asks the application for a path."""
    app = FastAPI()
    chat_page.add_chat_page(app)
    transport = httpx.ASGITransport(app)

    async def response_of(path: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path)

    return lambda path: asyncio.run(response_of(path))


def directives_of(response: httpx.Response) -> dict[str, str]:
    policy = response.headers["content-security-policy"]
    return dict(directive.split(" ", 1) for directive in policy.split("; "))


def test_every_file_has_the_policy_and_its_type(get: Callable[[str], httpx.Response]):
    """Finds a file that a browser would run under weaker rules, or not at all."""
    for path in ("/", *(f"/page/{file.name}" for file in FILES)):
        response = get(path)
        assert response.status_code == 200, path
        directives = directives_of(response)
        assert directives["default-src"] == directives["frame-ancestors"] == directives["base-uri"] == "'none'"
        assert directives["script-src"] == directives["style-src"] == directives["connect-src"] == "'self'"
        assert directives["require-trusted-types-for"] == "'script'"
        assert response.headers["x-content-type-options"] == "nosniff"
    assert get("/page/main.js").headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize(
    "path", ["/page/", "/page/none.js", "/page/../door.py", "/page/%2e%2e/door.py", "/page/a/b.js"]
)
def test_nothing_else_is_a_file_of_the_page(get: Callable[[str], httpx.Response], path: str):
    """Finds a path that leaves the folder."""
    assert get(path).status_code == 404


def test_files_ask_nobody_else_and_make_no_html():
    """Finds an address outside the server, a script or style inside the page, and text that is read as HTML."""
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        addresses = set(re.findall(r"https?://[\w.-]+", text)) - {"http://www.w3.org"}  # a namespace, no address
        assert not addresses, file.name
        assert not re.search(SINKS, text), file.name
        assert "@import" not in text, file.name

    page = (chat_page.FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=", page)
    assert all("src=" in script for script in re.findall(r"<script[^>]*>", page))


def test_modules_import_files_that_are_there():
    """Finds a module that was renamed, and a name that its module does not export."""
    for script in SCRIPTS:
        for names, source in re.findall(r"import \{([^}]+)\} from \"\./([\w.]+)\"", script.read_text()):
            exported = Path(chat_page.FOLDER / source).read_text()
            for name in names.split(","):
                assert re.search(rf"export (async )?(function\*?|class|const) {name.strip()}\b", exported), (
                    script.name,
                    name,
                )


@pytest.mark.parametrize(
    ("rules", "path", "headers", "status"),
    [
        (KEYED, "/", {}, None),
        (KEYED, "/page/main.js", {}, None),
        (KEYED, "/v1/models", {}, 401),
        (KEYED, "/page", {}, 401),
        (KEYED, "//", {}, 401),
        (LOCAL, "/", {"host": "evil.example"}, 403),  # a name that a page made point here
        (LOCAL, "/", {"origin": "https://evil.example"}, 403),
        (LOCAL, "/", {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}, None),  # a link that was followed
        (LOCAL, "/", {"sec-fetch-site": "cross-site", "sec-fetch-dest": "iframe"}, 403),
        (LOCAL, "/page/main.js", {"sec-fetch-site": "cross-site", "sec-fetch-dest": "script"}, 403),
        (LOCAL, "/v1/models", {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}, 403),
        (LOCAL, "/v1/chat/completions", {"origin": "http://localhost:8000"}, None),  # the page itself
        (LOCAL, "/v1/chat/completions", {"origin": "http://localhost:9000"}, 403),  # another server of this machine
        (LOCAL, "/v1/chat/completions", {"origin": "null"}, 403),
    ],
    ids=str,
)  # fmt: skip
def test_the_page_needs_no_key_and_what_it_asks_for_does(
    rules: DoorRules, path: str, headers: dict[str, str], status: int | None
):
    """Finds a route that the page opens for others, and a page that cannot be opened."""
    values = {"host": "localhost:8000"} | headers
    refusal = refusal_of(rules, path, [(name.encode(), value.encode()) for name, value in values.items()])
    assert (refusal and refusal[0]) == status
