"""The stub of wandb's server takes what the real client sends, at the lines where it belongs, and fails on demand."""

import base64
import http.client
import json
import os
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.patience import patient
from tests.tracking.wandb_server import WandbServer

CLIENT = textwrap.dedent("""
    import sys, wandb
    first, last, code = map(int, sys.argv[1:])
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    run = wandb.init(id="one", project="p", group="g", resume="allow", settings=settings, config={"a": 1})
    for step in range(first, last):
        run.log({"loss": 1 / (1 + step)}, step=step)
    run.log({"words": wandb.Table(columns=["word"], data=[["blue"]])}, step=step)
    run.alert("look", "here")
    run.finish(exit_code=code)
""")


def ask(
    server: WandbServer, query: str, variables: dict, key: str | None = None, timeout_s: float = patient(30)
) -> dict:
    credentials = base64.b64encode(f"api:{key or server.api_key}".encode()).decode()
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{server.url}/graphql", body, {"Authorization": f"Basic {credentials}"})
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer)


@pytest.mark.heavy
def test_the_real_client_logs_and_resumes_a_run(tmp_path: Path) -> None:
    with WandbServer() as server:
        environ = os.environ | server.environ(tmp_path)
        for part in (("0", "3", "1"), ("3", "5", "0")):
            subprocess.run(
                [sys.executable, "-c", CLIENT, *part], env=environ, cwd=tmp_path, check=True, timeout=patient(240)
            )
        run = server.run("one")
    assert server.unforeseen == []
    assert [row["_step"] for row in run.history()] == [0, 1, 2, 3, 4]
    assert {step: row["loss"] for step, row in run.steps().items()} == {s: pytest.approx(1 / (1 + s)) for s in range(5)}
    assert (run.exit_code, run.complete, run.project, run.settings["groupName"]) == (0, True, "p", "g")
    assert run.config() == {"a": 1}
    assert [alert["title"] for alert in run.alerts] == ["look", "look"]
    table = next(content for name, content in run.files.items() if name.endswith("table.json"))
    assert json.loads(table)["data"] == [["blue"]]
    assert all(artifact.committed and artifact.manifest for artifact in server.artifacts)


def test_a_saved_workspace_is_kept() -> None:
    with WandbServer() as server:
        sent = {"entityName": "stub", "projectName": "p", "name": "nw-1-v", "displayName": "nano", "spec": "{}"}
        answer = ask(
            server, "mutation UpsertView2($spec: String) { upsertView(input: {spec: $spec}) { inserted } }", sent
        )
        assert answer["data"]["upsertView"]["view"]["name"] == "nw-1-v"
        assert server.views == server.named("UpsertView2") == [sent]


def test_it_fails_as_told() -> None:
    query = "query Viewer { viewer { id } }"
    with WandbServer() as server:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(server, query, {}, key="0" * 40)
        server.error = 503
        with pytest.raises(urllib.error.HTTPError, match="503"):
            ask(server, query, {})
        server.error, server.stall = None, True
        with pytest.raises(TimeoutError):
            ask(server, query, {}, timeout_s=0.5)
        server.stall, server.vanish = False, True
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            ask(server, query, {})
        server.vanish = False
        assert ask(server, query, {})["data"]["viewer"]["entity"] == "stub"
