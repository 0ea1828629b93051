"""`hf:ORGANISATION/NAME`: from the hub where it answers, from the cache where it does not, else refused in one line.

The hub is a server on loopback with one model of two commits; the cache has the layout of huggingface_hub.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dist_lm.errors import ArtefactError
from dist_lm.interop.snapshot import change_of, folder_of, snapshot_record

constants = pytest.importorskip("huggingface_hub.constants")
OLD, NEW = "a" * 40, "b" * 40
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"weights"}


@dataclass
class Hub:
    """What the server answers."""

    main: str = OLD
    refusal: tuple[int, str] | None = None  # (status, X-Error-Code) of every answer
    asked: list[str] = field(default_factory=list)


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            hub.asked.append(self.path)
            path, status, headers, body = self.path.partition("?")[0], 404, {"X-Error-Code": "RepoNotFound"}, b""
            if hub.refusal:
                status, headers = hub.refusal[0], {"X-Error-Code": hub.refusal[1]}
            elif path == "/api/models/we/tiny/revision/main" or path == "/api/models/we/tiny":
                status, headers, body = 200, {}, json.dumps({"id": "we/tiny", "sha": hub.main}).encode()
            elif path.startswith("/api/models/we/tiny/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": name} for name, content in FILES.items()
                ]
                status, headers, body = 200, {}, json.dumps(entries).encode()
            elif path.startswith("/we/tiny/resolve/"):
                commit, name = path.split("/")[4:6]
                status, body = 200, FILES[name]
                headers = {"ETag": f'"{name}"', "X-Repo-Commit": commit}
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that answers, and an empty cache."""
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(state))
    Thread(target=server.serve_forever, daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
    use_cache(monkeypatch, tmp_path / "cache")
    yield state
    server.shutdown()
    server.server_close()


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def use_endpoint(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants.ENDPOINT, address))
    monkeypatch.setattr(constants, "ENDPOINT", address)


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")  # nobody listens on the port of `discard`


def cached_by_hand(cache: Path, commit: str, files: dict[str, bytes]) -> Path:
    """A snapshot as huggingface_hub keeps it: blobs, a folder of links for the commit, and the commit of main."""
    repository = cache / "models--we--tiny"
    folder = repository / "snapshots" / commit
    for made in (repository / "blobs", repository / "refs", folder):
        made.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for name, content in files.items():
        (repository / "blobs" / name).write_bytes(content)
        (folder / name).symlink_to(Path("../../blobs") / name)
    return folder


def test_the_hub_gives_the_commit_and_the_cache_serves_without_it(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    """Finds a start that needs the network again, and a record of the branch in place of the commit."""
    folder = folder_of("hf:we/tiny")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    record = snapshot_record("hf:we/tiny", folder)
    assert record == {"id": "we/tiny", "revision": OLD}
    unreachable(monkeypatch)
    assert folder_of("hf:we/tiny") == folder_of(f"hf:we/tiny@{OLD}") == folder


def test_a_cache_from_another_machine_serves_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_cache(monkeypatch, tmp_path / "cache")
    unreachable(monkeypatch)
    folder = cached_by_hand(tmp_path / "cache", OLD, FILES)
    assert folder_of("hf:we/tiny") == folder


def test_a_branch_that_moved_leaves_the_import_at_its_commit(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    """Finds a run that does not continue because somebody pushed to the hub."""
    record = snapshot_record("hf:we/tiny", folder_of("hf:we/tiny"))
    hub.main = NEW
    assert folder_of("hf:we/tiny").name == NEW
    assert change_of("hf:we/tiny", record) == ""
    assert change_of(f"hf:we/tiny@{OLD}", record) == ""
    assert change_of(f"hf:we/tiny@{NEW}", record) == f"commit {NEW}"
    # A record of an earlier version has no id, and could be that of another model of this name.
    assert change_of("hf:we/tiny", {"revision": OLD}) == f"commit {NEW}"


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "RepoNotFound"), r"we/tiny: no such folder, and the hub shows no model .*`hf auth login`"),
        ((404, "RepoNotFound"), r"we/tiny: no such folder, and the hub shows no model"),
        ((403, "GatedRepo"), r"we/tiny: the model is gated: accept its terms"),
        ((404, "RevisionNotFound"), r"we/tiny@old: the hub has the model, but no revision old"),
    ],
    ids=["401", "404", "gated", "revision"],
)
def test_what_the_hub_refuses_is_said(hub: Hub, refusal: tuple[int, str], message: str):
    """Finds one message for all, which sends people without a login to look for their network."""
    hub.refusal = refusal
    source = "hf:we/tiny@old" if refusal[1] == "RevisionNotFound" else "hf:we/tiny"
    with pytest.raises(ArtefactError, match=message) as raised:
        folder_of(source)
    assert "\n" not in str(raised.value)


def test_neither_hub_nor_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    use_cache(monkeypatch, tmp_path / "cache")
    unreachable(monkeypatch)
    with pytest.raises(
        ArtefactError, match=rf"does not answer .*{tmp_path / 'cache'}.*`hf download we/tiny`"
    ) as raised:
        folder_of("hf:we/tiny")
    assert "\n" not in str(raised.value)
    for wrong in ("hf:we/ti--ny", "hf:we/tiny."):
        with pytest.raises(ArtefactError, match="no such folder"):
            folder_of(wrong)


def test_a_dead_proxy_leaves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """huggingface_hub raises the error of its HTTP client there, which is no OSError."""
    import huggingface_hub

    client_error = huggingface_hub.errors.HfHubHTTPError.__bases__[0]
    if issubclass(client_error, OSError):
        pytest.skip("this version of huggingface_hub raises an OSError")
    use_cache(monkeypatch, tmp_path / "cache")
    folder = cached_by_hand(tmp_path / "cache", OLD, FILES)
    fetch = huggingface_hub.snapshot_download

    def with_dead_proxy(*args, local_files_only: bool = False, **kwargs) -> str:
        if not local_files_only:
            raise client_error("the proxy is dead")
        return str(fetch(*args, local_files_only=True, **kwargs))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", with_dead_proxy)
    assert folder_of("hf:we/tiny") == folder
    shutil.rmtree(folder.parent)
    with pytest.raises(ArtefactError, match="the proxy is dead"):
        folder_of("hf:we/tiny")
