"""wandb gets every metric once, under its name and without secrets; a failure of wandb does not touch the run."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_lm.config.root import TrackingConfig
from dist_lm.errors import ConfigError
from dist_lm.storage.process import is_alive
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.alerts import Alert
from dist_lm.tracking.console import Console
from dist_lm.tracking.wandb_login import base_url, wandb_environment, wandb_mode
from dist_lm.tracking.wandb_process import CHARACTERS, ENDED, RECORDED, ROWS, last_step, logs_of, rows_of, table_of
from dist_lm.tracking.wandb_run import WandbRun
from tests.patience import patient
from tests.tracking.wandb_server import WandbServer

DEADLINE_S = patient(240.0)  # a machine may be busy


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "work" / "runs" / "code" / "first")
    run.create()
    return run


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
    assert server.unforeseen == []


def start(
    run: RunDirectory,
    errors: io.StringIO,
    server: WandbServer | None = None,
    project: str = "p",
    finish_s: float = DEADLINE_S,
) -> WandbRun:
    home = run.path / "home"
    home.mkdir(exist_ok=True)
    wandb_run = WandbRun.start(
        {"seed": 7, "hub": {"token": "sesame"}},
        run,
        TrackingConfig(name="wandb", project=project, mode="online" if server else "offline", finish_s=finish_s),
        job_type="code",
        group="first",
        git_commit="0123abc-dirty",
        command=["launch", "stage=code", "+hub.token=sesame"],
        environ=os.environ | (server.environ(home) if server else {"HOME": str(home)}),
        console=Console(output=io.StringIO(), errors=errors),
    )
    assert wandb_run is not None
    return wandb_run


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def sync(run: RunDirectory, server: WandbServer) -> None:
    """What a user does in the end."""
    environ = os.environ | server.environ(run.path / "home")
    command = [Path(sys.executable).with_name("wandb"), "sync", str(run.wandb)]
    # it leaves a log in a folder `wandb` where it is started
    subprocess.run(command, env=environ, cwd=run.path, check=True, capture_output=True, timeout=DEADLINE_S)


def records(run: RunDirectory) -> list[dict[str, Any]]:
    """What wandb's own tool reads in the offline runs of a run directory, oldest first."""
    found = []
    for log in sorted(run.wandb.glob("offline-run-*/*.wandb")):
        wandb = Path(sys.executable).with_name("wandb")
        output = subprocess.run(
            [wandb, "leet", "inspect", "--json", log], cwd=run.path, check=True, capture_output=True, text=True
        ).stdout
        found += [json.loads(line) for line in output.splitlines()]
    return found


def history(run: RunDirectory) -> list[tuple[int, dict[str, float]]]:
    items = [record["history"]["item"] for record in records(run) if record["type"] == "history"]
    return [
        (item["_step"], {name: value for name, value in item.items() if not name.startswith("_")}) for item in items
    ]


def losses(server: WandbServer, wandb_run: WandbRun) -> dict[int, float]:
    steps = server.run(wandb_run.id).steps() if wandb_run.id in server.runs else {}
    return {step: row["train/loss"] for step, row in steps.items() if "train/loss" in row}


@pytest.mark.heavy
def test_an_offline_run_has_the_metrics_once_and_no_secret(run: RunDirectory) -> None:
    errors = io.StringIO()
    first = start(run, errors)
    first.log(1, {"step": 1, "time": 1.0, "train/loss": 3.0, "train/grad_norm": None})
    first.log(2, {"step": 2, "time": 2.0, "train/loss": 2.0})
    first.log(2, {"step": 2, "time": 2.5, "checkpoint/stall_s": 0.5})
    first.log(1, {"step": 1, "time": 2.5, "eval/own_sql/pass@1": 0.5})  # answers come later
    first.finish("stopped", DEADLINE_S)
    second = start(run, errors)  # resumed from a checkpoint at step 1
    for step in (2, 3):
        second.log(step, {"step": step, "train/loss": 6.0 / step})
        second.log(1, {"step": 1, "eval/own_sql/pass@1": 0.5})  # read again, once
    second.log(2, {"step": 2, "eval/own_sql/pass@1": 0.25})
    second.finish("failed", DEADLINE_S)

    assert errors.getvalue() == ""
    assert second.id == first.id
    assert history(run) == [
        (1, {"train/loss": 3}),
        (2, {"train/loss": 2, "checkpoint/stall_s": 0.5, "eval/own_sql/pass@1": 0.5, "eval/step": 1}),
        (3, {"train/loss": 2, "eval/own_sql/pass@1": 0.25, "eval/step": 2}),
    ]
    found = records(run)
    started = next(record["run"] for record in found if record["type"] == "run")
    assert (started["project"], started["job_type"], started["run_group"]) == ("p", "code", "first")
    config = started["config"]["update"]
    assert (config["git_commit"], config["git_dirty"], config["seed"]) == ("0123abc", True, 7)
    assert [record["exit"].get("exit_code", 0) for record in found if record["type"] == "exit"] == [1, 1]
    assert [record["type"] for record in found].count("preempting") == 1
    for path in run.wandb.rglob("*"):
        assert not path.is_file() or b"sesame" not in path.read_bytes(), path


@pytest.mark.heavy
def test_a_failure_of_wandb_is_said_once_and_ends_nothing(run: RunDirectory) -> None:
    errors = io.StringIO()
    broken = start(run, errors, project="no/such:project")
    for step in range(3):
        broken.log(step, {"train/loss": 1.0})
    broken.finish("finished", DEADLINE_S)
    assert errors.getvalue().count("warning: wandb stopped") == 1
    assert errors.getvalue().count("\n") == 1


@pytest.mark.heavy
def test_an_online_run_grows_at_the_server_with_all_that_belongs_to_it(
    run: RunDirectory, server: WandbServer, tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{}")
    samples = run.samples / "step_00000002.jsonl"
    samples.write_text('{"prompt": "1+1", "text": "2", "parses": true}\n')
    errors = io.StringIO()
    online = start(run, errors, server)
    online.link("corpus", "corpus-code", "dataset", [manifest], {"tokens": 5, "hub": {"token": "sesame"}}, ["used"])
    online.log(1, {"train/loss": 3.0})
    online.log(2, {"train/loss": 2.0})
    until(lambda: losses(server, online))  # while it runs
    online.log_at_newest_step({"system/cpu_percent_n1": 50.0})
    online.samples(samples, 2)
    online.alert(Alert("first: NaN", "step 2, see http://me:sesame@host/", "WARN"))
    online.finish("finished", DEADLINE_S)

    assert errors.getvalue() == ""
    seen = server.run(online.id)
    assert losses(server, online) == {1: 3.0, 2: 2.0}
    assert seen.steps()[2]["system/cpu_percent_n1"] == 50
    assert (seen.exit_code, seen.settings["groupName"], seen.settings["jobType"]) == (0, "first", "code")
    assert [(alert["title"], alert["severity"]) for alert in seen.alerts] == [("first: NaN", "WARN")]
    table = json.loads(next(content for name, content in seen.files.items() if name.endswith(".table.json")))
    assert (table["columns"], table["data"]) == (["prompt", "text", "parses"], [["1+1", "2", True]])
    corpus = next(artifact for artifact in server.artifacts if artifact.name == "corpus-code")
    assert corpus.manifest is not None
    assert corpus.manifest["contents"]["manifest.json"]["ref"] == manifest.as_uri()
    assert {alias["alias"] for alias in corpus.input["aliases"]} == {"latest", "used"}
    assert not any("manifest.json" in path for path in server.storage if path.startswith("artifacts/"))
    assert not any(b"sesame" in sent for sent in server.received)
    assert list(run.wandb.glob("*/*.synced"))


@pytest.mark.heavy
def test_a_requeued_run_goes_on_and_what_was_not_sent_is_sent_first(run: RunDirectory, server: WandbServer) -> None:
    errors = io.StringIO()
    server.vanish = True
    first = start(run, errors, server)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": 1.0 / step})
    first.finish("stopped", DEADLINE_S)
    assert "has not got everything yet; to send the rest: wandb sync" in errors.getvalue()
    assert not list(run.wandb.glob("*/*.synced"))

    server.vanish = False
    second = start(run, errors, server)
    for step in (2, 3, 4, 5):
        second.log(step, {"train/loss": 1.0 / step})
    second.finish("finished", DEADLINE_S)
    seen = server.run(first.id)
    assert [row["_step"] for row in seen.history()] == [1, 2, 3, 4, 5]  # each once, in order
    assert (seen.exit_code, second.id) == (0, first.id)
    assert not [log for log in run.wandb.glob("*/*.wandb") if not log.with_name(f"{log.name}.synced").exists()]


@pytest.mark.heavy
def test_a_server_that_refuses_is_not_taken_for_one_that_has_everything(run: RunDirectory, server: WandbServer) -> None:
    errors = io.StringIO()
    refused = start(run, errors, server)
    refused.log(1, {"train/loss": 1.0})
    until(lambda: losses(server, refused) or refused.id in server.runs)
    server.error = 404
    for step in range(2, 40):
        refused.log(step, {"train/loss": 1.0 / step})
    refused.finish("finished", DEADLINE_S)
    server.error = None
    assert "wandb sync" in errors.getvalue()
    sync(run, server)
    assert losses(server, refused) == {step: pytest.approx(1.0 / step) for step in range(1, 40)}


@pytest.mark.heavy
def test_what_a_killed_process_had_not_written_is_written_by_the_next_one(run: RunDirectory) -> None:
    errors = io.StringIO()
    first = start(run, errors)
    manifest = run.path / "manifest.json"
    manifest.write_text("{}")
    for step in range(1, 100):
        first.log(step, {"train/loss": 1.0})
        if step in (10, 99):
            first.log(step, {"eval/own_python/pass@1": step / 100})
            first.link(f"corpus {step}", f"corpus-{step}", "dataset", [manifest], {})
    recorded = run.wandb / RECORDED
    until(lambda: recorded.exists() and "tasks 99 " in recorded.read_text())
    until(lambda: last_step(logs_of(run, first.id)) == 98)  # the row of step 99 is open
    started = psutil.Process(first._process.pid)
    tree = [started, *started.children(recursive=True)]
    for process in tree:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(tree, timeout=DEADLINE_S)
    second = start(run, errors)
    for step in range(1, 200):
        second.log(step, {"train/loss": 1.0})
        if step in (10, 99):
            second.log(step, {"eval/own_python/pass@1": step / 100})
            second.link(f"corpus {step}", f"corpus-{step}", "dataset", [manifest], {})
    second.finish("finished", DEADLINE_S)
    assert [step for step, _ in history(run)] == list(range(1, 200))
    artifacts = [record["artifact"]["name"] for record in records(run) if record["type"] == "artifact"]
    assert artifacts.count("corpus-10") == 1
    assert "corpus-99" in artifacts
    name = "eval/own_python/pass@1"
    assert [row[name] for _, row in history(run) if name in row] == [0.1, 0.99]


def test_a_run_of_an_earlier_version_keeps_what_it_has_recorded(tmp_path: Path) -> None:
    path = tmp_path / RECORDED
    assert rows_of(path) == {}
    path.write_text('["link tokenizer"]')
    assert rows_of(path) == {"link tokenizer": ENDED}
    path.write_text('{"link tokenizer": 7}')
    assert rows_of(path) == {"link tokenizer": 7}
    for damaged in (b"", b"7", b"\xff", b'{"link tokenizer"', b'{"link tokenizer": "7"}'):
        path.write_bytes(damaged)
        assert rows_of(path) == {}


@pytest.mark.heavy
def test_nothing_is_left_behind_by_a_launcher_that_is_killed(run: RunDirectory, server: WandbServer) -> None:
    online = start(run, io.StringIO(), server)
    online.log(1, {"train/loss": 1.0})
    until(lambda: losses(server, online) or online.id in server.runs)
    started = psutil.Process(online._process.pid)
    tree = [started, *started.children(recursive=True)]
    assert len(tree) > 2
    next(child for child in started.children() if "sync" in child.cmdline()).suspend()  # sees no pipe that is closed
    started.kill()
    _, alive = psutil.wait_procs(tree, timeout=DEADLINE_S)
    assert not [one for one in alive if is_alive(one)]


def test_the_mode_follows_the_login_and_never_asks(tmp_path: Path) -> None:
    auto, online = TrackingConfig(name="wandb"), TrackingConfig(name="wandb", mode="online")
    nobody = {"HOME": str(tmp_path)}
    assert wandb_mode(auto, nobody) == "offline"
    assert wandb_mode(auto, nobody | {"WANDB_API_KEY": "key"}) == "online"
    assert wandb_mode(auto, nobody | {"WANDB_API_KEY": "key", "WANDB_MODE": "offline"}) == "offline"
    assert wandb_mode(TrackingConfig(name="wandb", mode="offline"), {"WANDB_API_KEY": "key"}) == "offline"
    with pytest.raises(ConfigError, match=r"tracking\.mode=online: no wandb login"):
        wandb_mode(online, nobody)

    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode(auto, nobody) == wandb_mode(online, nobody) == "online"
    assert wandb_mode(auto, nobody | {"WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"


def test_the_login_at_a_server_of_ones_own_is_the_one_that_wandb_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.sdk.lib.settings_file import SettingsFiles
    from wandb.sdk.lib.wbauth.wbnetrc import write_netrc_auth

    address, nobody = "http://localhost:8080", {"HOME": str(tmp_path)}
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    write_netrc_auth(host=address, api_key="0" * 40)
    online = TrackingConfig(name="wandb", mode="online")
    assert wandb_mode(online, nobody | {"WANDB_BASE_URL": address}) == "online"
    with pytest.raises(ConfigError):  # it is no login at wandb's own server
        wandb_mode(online, nobody)

    # what `wandb login --host` writes besides
    global_settings = tmp_path / ".config" / "wandb" / "settings"
    settings = SettingsFiles(global_settings=global_settings, local_settings=tmp_path / "absent")
    settings.set("base_url", address, globally=True)
    settings.save()
    assert base_url(nobody) == address
    assert wandb_mode(online, nobody) == "online"
    assert base_url(nobody | {"WANDB_BASE_URL": "https://other.example.org"}) == "https://other.example.org"
    assert base_url({"HOME": "/absent", "WANDB_CONFIG_DIR": str(global_settings.parent)}) == address


def test_files_that_cannot_be_read_are_named_and_do_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, login = tmp_path / ".config" / "wandb" / "settings", tmp_path / ".netrc"
    settings.parent.mkdir(parents=True)
    settings.write_text("base_url = sesame\n")  # no section
    login.mkdir()
    assert wandb_mode(TrackingConfig(name="wandb"), {"HOME": str(tmp_path)}) == "offline"
    login.rmdir()
    login.write_text("machine api.wandb.ai sesame\n")
    assert wandb_mode(TrackingConfig(name="wandb"), {"HOME": str(tmp_path)}) == "offline"
    said = caplog.text
    assert f"{settings} cannot be read (MissingSectionHeaderError)" in said
    assert f"{login} cannot be read (IsADirectoryError)" in said
    assert f"{login} cannot be read (NetrcParseError)" in said
    assert "sesame" not in said


def test_the_process_gets_the_login_alone_and_only_to_send() -> None:
    environ = {"PATH": "/bin", "WANDB_API_KEY": "k", "HF_TOKEN": "t", "WANDB_RUN_ID": "other", "WANDB_MODE": "online"}
    assert wandb_environment(environ, online=False) == {"PATH": "/bin"}
    assert wandb_environment(environ, online=True) == {"PATH": "/bin", "WANDB_API_KEY": "k"}


def test_rows_have_the_columns_of_all() -> None:
    columns, rows = table_of([{"prompt": "a", "right": True}, {"prompt": "b", "parts": {"x": 1}}])
    assert columns == ["prompt", "right", "parts"]
    assert rows == [["a", True, None], ["b", None, '{"x": 1}']]


def test_size_is_bounded_and_urls_lose_their_passwords() -> None:
    columns, rows = table_of({"text": "x" * 2 * CHARACTERS} for _ in range(2 * ROWS))
    assert (columns, len(rows)) == (["text"], ROWS)
    assert len(rows[0][0]) < CHARACTERS + 50
    assert table_of([{"text": "https://me:sesame@host/"}])[1] == [["https://***@host/"]]
    assert table_of([]) == ([], [])
