"""The chat page at `/`: static files that are the same for everybody, so they need no key.

The page talks to the server's own API, with the key that its user types in. Its policy lets a browser run the files of
this folder and nothing else, send requests to this server alone, and show the page in no frame of another page.
"""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException

ROOT = "/"
PREFIX = "/page/"
FOLDER = Path(__file__).parent / "web"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    # No text becomes HTML: `innerHTML` and its like raise an error.
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{directive} {sources}" for directive, sources in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def is_page_path(path: str) -> bool:
    """Returns whether a path is that of the page or of one of its files; nothing else lies there."""
    return path == ROOT or path.startswith(PREFIX)


def add_chat_page(app: FastAPI) -> None:
    """Adds the routes of the page, whose files are read once.

    Raises:
        OSError: a file cannot be read.
    """
    files = {file.name: (file.read_bytes(), TYPES[file.suffix]) for file in FOLDER.iterdir() if file.suffix in TYPES}

    @app.get(ROOT)
    async def page() -> Response:
        content, media_type = files["index.html"]
        return Response(content, media_type=media_type, headers=HEADERS)

    @app.get(f"{PREFIX}{{name}}")
    async def page_file(name: str) -> Response:
        # A name is looked up and never joined to a path, so it cannot lead out of the folder.
        if name not in files:
            raise HTTPException(404, "the chat page has no such file")
        content, media_type = files[name]
        return Response(content, media_type=media_type, headers=HEADERS)
