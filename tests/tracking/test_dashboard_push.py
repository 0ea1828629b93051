"""Pushing boards with the real client, to the loopback stub of its server."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from dist_lm.errors import ConfigError
from dist_lm.tracking.dashboard import board_of, boards
from dist_lm.tracking.dashboard_push import push, slug_of, workspace_of
from tests.patience import patient
from tests.tracking.wandb_server import WandbServer

TWICE = """
import os, sys
from dist_lm.launcher.process import run_program
from dist_lm.tracking.dashboard import boards
from dist_lm.tracking.dashboard_push import push
for _ in range(2):
    run_program(lambda: push(boards(), None, "p", os.environ, print), lambda text: print(text, file=sys.stderr))
"""


def program(server: WandbServer, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | server.environ(home) | more
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environ, cwd=home, capture_output=True, text=True, timeout=patient(240))


@pytest.mark.heavy
def test_the_server_gets_a_view_a_board_and_the_same_one_again(tmp_path: Path) -> None:
    with WandbServer() as server:
        done = program(server, tmp_path, "-c", TWICE, PYTHONPATH=os.pathsep.join(sys.path))
    assert (done.returncode, done.stderr, server.unforeseen) == (0, "", [])
    assert done.stdout.splitlines()[0] == f"overview: {server.url}/stub/p?nw={slug_of(boards()[0])}"
    sent = server.views
    first, second = sent[: len(boards())], sent[len(boards()) :]
    assert [view["displayName"] for view in first] == [board.title for board in boards()]
    assert len({view["name"] for view in first}) == len(boards())
    assert all("id" not in view and (view["entityName"], view["projectName"]) == ("stub", "p") for view in first)
    assert [view["id"] for view in second] == [f"view-{place + 1}" for place in range(len(boards()))]
    assert [view["name"] for view in second] == [view["name"] for view in first]
    assert [view["spec"] for view in second] == [view["spec"] for view in first]
    for view, board in zip(first, boards(), strict=True):
        section = json.loads(view["spec"])["section"]
        saved = [[panel["config"] for panel in one["panels"]] for one in section["panelBankConfig"]["sections"]]
        assert [len(panels) for panels in saved] == [len(one.panels) for one in board.sections]
        for config, panel in zip(chain.from_iterable(saved), board.panels, strict=True):
            assert config["chartTitle"] == panel.title
            assert tuple(config["metrics"]) == panel.names
            assert config.get("metricRegex", "") == panel.pattern
            assert config.get("yLogScale", False) == panel.logarithmic
        filters = json.dumps(section["runSets"][0]["filters"])
        assert (f'"{board.stage}"' in filters and "jobType" in filters) == bool(board.stage)


@pytest.mark.heavy
def test_a_key_that_the_server_refuses_is_one_line(tmp_path: Path) -> None:
    with WandbServer() as server:
        done = program(server, tmp_path, "-m", "dist_lm", "dashboard", "push", "code", WANDB_API_KEY="0" * 40)
    assert done.returncode == 2
    assert done.stderr.startswith("error: dashboard push: ")
    assert done.stderr.count("\n") == 1
    assert server.views == []


def test_without_a_login_nothing_is_tried(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no wandb login here: set WANDB_API_KEY"):
        push([board_of("code")], None, "p", {"HOME": str(tmp_path)}, print)


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb_workspaces"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ConfigError, match=r"pip install 'dist_lm\[dashboards\]'"):
        workspace_of(board_of("code"), "e", "p")
