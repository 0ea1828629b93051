"""A loopback server that speaks as much of wandb's protocol as its client, `wandb sync` and wandb-workspaces need.

It keeps what it is sent, and can be told to stall, to fail or to vanish, at any time and from any thread:

    with WandbServer() as server:
        subprocess.run([...], env=os.environ | server.environ(home))
        server.run("my-run-id").history()

What it knows of a run is as the real server has it: history, events and console are files of lines, a client says at
which line its chunk goes, and one that takes a run up again asks how many lines there are.
"""

import base64
import gzip
import json
import secrets
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.tracking.wandb_stub_run import HISTORY, StubArtifact, StubRun, resumed

ENTITY = "stub"
STALL_LOOK_S = 0.05


@dataclass(frozen=True)
class Operation:
    """One GraphQL request."""

    name: str
    query: str
    variables: dict[str, Any]


class WandbServer:
    """The server, on a free port of 127.0.0.1; a context manager.

    Attributes:
        api_key: the only key that is let in.
        stall: requests wait while it is set, and are answered after.
        error: a status that requests are answered with while it is set, such as 500.
        vanish: connections are cut, new ones too, while it is set.
        unforeseen: requests that the stub failed at, and how; empty unless the stub is wrong.
        operations: every GraphQL request, in order.
        requests: (method, path) of everything else.
        received: the bodies and headers of everything but the key; in it no secret must be found.
    """

    def __init__(self) -> None:
        self.api_key = secrets.token_hex(20)
        self.stall = False
        self.error: int | None = None
        self.operations: list[Operation] = []
        self.unforeseen: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.received: list[bytes] = []
        self.runs: dict[str, StubRun] = {}
        self.artifacts: list[StubArtifact] = []
        self.views: list[dict[str, Any]] = []  # every one that was sent
        self.view_ids: dict[str, str] = {}  # by name
        self.storage: dict[str, bytes] = {}
        self._vanish = False
        self._closing = False
        self._lock = threading.RLock()
        self._connections: set[socket.socket] = set()
        self._http = _Http(("127.0.0.1", 0), _handler_of(self))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "WandbServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing = True
        self._http.shutdown()
        self._cut()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def vanish(self) -> bool:
        return self._vanish

    @vanish.setter
    def vanish(self, gone: bool) -> None:
        self._vanish = gone
        if gone:
            self._cut()

    def environ(self, home: Path) -> dict[str, str]:
        """What sends a wandb client here, with a home directory of its own so that no real login is seen."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": self.api_key,
            "WANDB_ERROR_REPORTING": "false",
            "HOME": str(home),
            "NETRC": str(home / ".netrc"),
            "NO_PROXY": "127.0.0.1",
        }

    def run(self, name: str) -> StubRun:
        """The run of this id.

        Raises:
            KeyError: nobody sent one.
        """
        with self._lock:
            return self.runs[name]

    def named(self, operation: str) -> list[dict[str, Any]]:
        """The variables of every request of an operation, such as `UpsertView2`."""
        with self._lock:
            return [found.variables for found in self.operations if found.name == operation]

    # what follows is called by connections' threads

    def _admits(self) -> bool:
        """Whether a request may be answered now; waits while the server stalls."""
        while self.stall and not self._closing and not self._vanish:
            time.sleep(STALL_LOOK_S)
        return not (self._vanish or self._closing)

    def _cut(self) -> None:
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the client was faster

    def _answer_or_note(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        try:
            return self._answer(method, path, body)
        except Exception:
            self.unforeseen.append(f"{method} {path} {body.decode(errors='replace')}\n{traceback.format_exc()}")
            return 400, {"errors": [{"message": "the stub did not foresee this"}]}

    def _answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        with self._lock:
            if parts == ["graphql"]:
                return self._graphql(json.loads(body))
            self.requests.append((method, path))
            if method == "POST" and parts[0] == "files" and parts[-1] == "file_stream":
                return 200, self._file_stream(parts[1], parts[2], parts[3], json.loads(body))
            if method == "PUT" and parts[0] == "storage":
                self._stored("/".join(parts[1:]), body)
                return 200, {}
            if method == "GET" and parts[0] == "storage" and "/".join(parts[1:]) in self.storage:
                return 200, self.storage["/".join(parts[1:])]
        return 404, {"error": f"the stub knows no {method} {path}"}

    def _file_stream(self, entity: str, project: str, name: str, sent: dict[str, Any]) -> dict[str, Any]:
        run = self._run(entity, project, name)
        for file, chunk in (sent.get("files") or {}).items():
            for number, line in enumerate(chunk["content"], start=chunk["offset"]):
                run.lines.setdefault(file, {})[number] = line
        if sent.get("complete") is not None:
            run.complete = sent["complete"]
        if sent.get("exitcode") is not None:
            run.exit_code = sent["exitcode"]
        return {"exitcode": None, "limits": {}}

    def _run(self, entity: str | None, project: str | None, name: str) -> StubRun:
        if name not in self.runs:
            self.runs[name] = StubRun(entity or ENTITY, project or "uncategorized", name)
        return self.runs[name]

    def _stored(self, path: str, body: bytes) -> None:
        self.storage[path] = body
        kind, _, rest = path.partition("/")
        owner, _, file = rest.partition("/")
        if kind == "files":
            self.runs[owner].files[file] = body
        elif kind == "manifests":
            next(a for a in self.artifacts if a.id == owner).manifest = json.loads(body)

    def _graphql(self, request: dict[str, Any]) -> tuple[int, Any]:
        query, variables = request["query"], request.get("variables") or {}
        name = request.get("operationName") or query.split("(")[0].split("{")[0].split()[-1]
        self.operations.append(Operation(name, query, variables))
        answer: Callable[[dict[str, Any]], Any] | None = getattr(self, f"_on_{name}", None)
        if answer is None:
            return 200, {"data": None, "errors": [{"message": f"the stub knows no operation {name}", "path": []}]}
        return 200, {"data": answer(variables)}

    def _on_ServerFeaturesQuery(self, _: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def _on_ServerInfo(self, _: dict[str, Any]) -> Any:
        return {"serverInfo": {"cliVersionInfo": {"max_cli_version": "99.0.0"}, "latestLocalVersionInfo": None}}

    def _on_Viewer(self, _: dict[str, Any]) -> Any:
        teams = {"edges": [{"node": {"name": ENTITY, "id": "team"}}]}
        viewer = {"id": "viewer", "entity": ENTITY, "username": ENTITY, "email": "stub@localhost", "flags": "{}"}
        names = {"name": ENTITY, "admin": False, "apiKeys": {"edges": []}, "deletedAt": None}
        return {"viewer": viewer | names | {"teams": teams}}

    def _on_GetDefaultEntity(self, _: dict[str, Any]) -> Any:
        return {"viewer": {"id": "viewer", "entity": ENTITY}}

    def _on_OrgFeatureFlags(self, _: dict[str, Any]) -> Any:
        return {"organization": {"featureFlags": []}}

    def _on_FetchOrgEntityFromEntity(self, _: dict[str, Any]) -> Any:
        return {"entity": {"organization": None, "user": None}}

    def _on_OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> Any:
        return {"entity": {"organization": None}}

    def _on_XXHashDigestsEnabled(self, _: dict[str, Any]) -> Any:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def _on_FetchArtifactDigestAlgorithm(self, _: dict[str, Any]) -> Any:
        return {"project": None}

    def _on_RunResumeStatus(self, asked: dict[str, Any]) -> Any:
        run = self.runs.get(asked["name"])
        model = {"id": "project", "name": asked.get("project"), "entity": {"id": "entity", "name": ENTITY}}
        return {"model": model | {"bucket": resumed(run) if run else None}}

    def _on_UpsertBucket(self, sent: dict[str, Any]) -> Any:
        inserted = sent["name"] not in self.runs
        run = self._run(sent.get("entity"), sent.get("project"), sent["name"])
        run.settings |= {name: value for name, value in sent.items() if value is not None}
        if not inserted and "groupName" in sent:
            run.complete, run.exit_code = False, None
        bucket = {
            "id": run.id,
            "name": run.name,
            "displayName": run.settings.get("displayName"),
            "description": None,
            "config": run.settings.get("config"),
            "sweepName": None,
            "project": {"id": "project", "name": run.project, "entity": {"id": "entity", "name": run.entity}},
            "historyLineCount": run.line_count(HISTORY),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _on_RunStoppedStatus(self, _: dict[str, Any]) -> Any:
        return {"project": {"run": {"stopped": False}}}

    def _on_CreateRunFiles(self, sent: dict[str, Any]) -> Any:
        run = self._run(sent["entity"], sent["project"], sent["run"])
        files = [{"name": file, "uploadUrl": f"{self.url}/storage/files/{run.name}/{file}"} for file in sent["files"]]
        return {"createRunFiles": {"runID": run.id, "uploadHeaders": [], "files": files}}

    def _on_MarkRunFilesUploaded(self, _: dict[str, Any]) -> Any:
        return {"markRunFilesUploaded": {"success": True}}

    def _on_NotifyScriptableRunAlert(self, sent: dict[str, Any]) -> Any:
        self._run(sent["entityName"], sent["projectName"], sent["runName"]).alerts.append(sent)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _on_CreateArtifact(self, sent: dict[str, Any]) -> Any:
        artifact = StubArtifact(f"artifact-{len(self.artifacts)}", sent["input"])
        self.artifacts.append(artifact)
        known = {"id": artifact.id, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": known}}

    def _on_CreateArtifactManifest(self, sent: dict[str, Any]) -> Any:
        url = f"{self.url}/storage/manifests/{sent['artifactID']}/manifest.json" if sent["includeUpload"] else None
        file = {"id": "file", "uploadUrl": url, "uploadHeaders": []}
        manifest = {"id": sent["artifactID"], "file": file}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _on_UpdateArtifactManifest(self, sent: dict[str, Any]) -> Any:
        url = f"{self.url}/storage/manifests/{sent['artifactManifestID']}/manifest.json"
        file = {"id": "file", "uploadUrl": url if sent["includeUpload"] else None, "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": sent["artifactManifestID"], "file": file}}}

    def _on_CreateArtifactFiles(self, sent: dict[str, Any]) -> Any:
        def node(file: dict[str, Any]) -> dict[str, Any]:
            path = f"artifacts/{file['artifactID']}/{file['name']}"
            return {
                "id": path,
                "name": file["name"],
                "displayName": file["name"],
                "storagePath": path,
                "uploadUrl": f"{self.url}/storage/{path}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }

        edges = [{"node": node(file)} for file in sent["input"]["artifactFiles"]]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, sent: dict[str, Any]) -> Any:
        artifact = next(artifact for artifact in self.artifacts if artifact.id == sent["artifactID"])
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.input["digest"]}}}

    def _on_UseArtifact(self, sent: dict[str, Any]) -> Any:
        return {"useArtifact": {"artifact": {"id": sent["input"]["artifactID"]}}}

    def _on_ArtifactType(self, _: dict[str, Any]) -> Any:
        return {"project": {"artifact": None}}

    def _on_ClientIDMapping(self, sent: dict[str, Any]) -> Any:
        found = [artifact.id for artifact in self.artifacts if artifact.input.get("clientID") == sent["clientID"]]
        return {"clientIDMapping": {"serverID": found[0]} if found else None}

    def _on_UpsertView2(self, sent: dict[str, Any]) -> Any:
        inserted = sent["name"] not in self.view_ids
        self.views.append(sent)
        id_ = sent.get("id") or f"view-{len(self.views)}"
        self.view_ids[sent["name"]] = id_
        view = {"id": id_, "type": sent.get("type"), "name": sent.get("name")}
        return {"upsertView": {"view": view | {"displayName": sent.get("displayName")}, "inserted": inserted}}

    def _on_View(self, asked: dict[str, Any]) -> Any:
        found = [view for view in self.views if view["name"] == asked["viewName"]][-1:]
        nodes = [{"node": view | {"id": self.view_ids[view["name"]]}} for view in found]
        return {"project": {"allViews": {"edges": nodes}}}

    def _on_UpsertModel(self, sent: dict[str, Any]) -> Any:
        project = {"id": "project", "name": sent["name"], "entityName": sent.get("entity") or ENTITY}
        return {"upsertModel": {"model": project | {"description": None, "access": None, "views": None}}}


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a connection that was cut, by us or by a client that was killed."""


def _handler_of(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 120

        def setup(self) -> None:
            super().setup()
            with server._lock:
                server._connections.add(self.connection)

        def finish(self) -> None:
            with server._lock:
                server._connections.discard(self.connection)
            super().finish()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if not server._admits():
                self.close_connection = True
                return
            public = str(self.headers).replace(self.headers.get("Authorization") or "\0", "")
            with server._lock:
                server.received.append(public.encode() + body)
            if server.error:
                self._send(server.error, {"error": "the stub was told to fail"})
            elif urlsplit(self.path).path.startswith("/storage/") or self._is_let_in():
                self._send(*server._answer_or_note(self.command, self.path, body))
            else:
                self._send(401, {"errors": [{"message": "wrong key"}]})

        do_GET = do_PUT = do_POST

        def _is_let_in(self) -> bool:
            kind, _, value = (self.headers.get("Authorization") or "").partition(" ")
            return kind == "Basic" and base64.b64decode(value) == f"api:{server.api_key}".encode()

        def _send(self, status: int, answer: Any) -> None:
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler
