"""A whole pipeline as a user launches it, with wandb's server there: every metric arrives, and no secret anywhere.

The server is a stub on this machine. Ten kinds of secrets are planted where people have them; then everything that was
written, printed or sent is searched.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_lm.report.page import write_report
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tracking.metrics import read_metrics
from dist_lm.tracking.registry import MEASURED_STAGES
from tests.conftest import TINY_MODEL
from tests.patience import patient
from tests.tracking.wandb_files import assert_every_metric, history_names
from tests.tracking.wandb_server import WandbServer

pytestmark = [pytest.mark.cluster, pytest.mark.bars, pytest.mark.timeout(1800)]
DEADLINE_S = patient(1200)
STEPS = 4
SAMPLED = ("language", "code")
SETTINGS = (
    *(one for one in TINY_MODEL if one != "tracking=none"),
    "tracking.mode=online",
    "cluster.connect_timeout_s=180",
    "tracking.finish_s=240",
    *(f"stages.{stage}.{key}" for stage in SAMPLED for key in ("seq_len=32", "sampling.max_new_tokens=4")),
    *(
        f"stages.{stage}.{key}"
        for stage in (*SAMPLED, "tools", "reward")
        for key in (f"steps={STEPS}", "global_batch=4", "micro_batch=2", "warmup_steps=1", "eval_sequences=4")
    ),
    *(f"stages.{stage}.eval_every=2" for stage in (*SAMPLED, "tools", "reward")),
    *(f"stages.{stage}.seq_len=256" for stage in ("tools", "reward")),
    "stages.tools.questions.per_kind=2",
    "stages.rankings.samples.most=4",
    "stages.rankings.samples.max_new_tokens=8",
    "stages.reward.reward.normaliser_prompts=4",
    "stages.reward.reward.normaliser_new_tokens=4",
)
RLHF = (
    "stage=rlhf",
    "stage.steps=2",
    "stage.eval_every=1",
    "rlhf.prompts=8",
    "rlhf.max_new_tokens=8",
    "rlhf.held_out_prompts=4",
    "rlhf.pool.cache_tokens=4096",
    "rlhf.pool.max_sequences=4",
)
GENERATE = (
    *(one for one in TINY_MODEL if one != "tracking=none"),
    "tracking.mode=online",
    "cluster.connect_timeout_s=180",
    "tracking.finish_s=240",
    "stage=generate",
    "stage.max_new_tokens=8",
)
PASSWORD_URL = "https://me:{}@hub.example.org/data"


@dataclass(frozen=True)
class Launched:
    """What there is after both commands."""

    work: WorkDirectory
    home: Path  # everything is below it
    server: WandbServer
    secrets: dict[str, str]  # by where they were
    said: str


def planted(server: WandbServer) -> dict[str, str]:
    """Secrets by where they are: environment variables by their names, and what is typed or lies in a file."""
    names = (
        *("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GITHUB_TOKEN", "PGPASSWORD"),
        *("OPENAI_API_KEY", "DATABASE_URL", "HTTPS_PROXY", "netrc", "override"),
    )
    return {name: f"sesame{number}opensesame" for number, name in enumerate(names)} | {"WANDB_API_KEY": server.api_key}


def environment(server: WandbServer, home: Path, secrets: dict[str, str]) -> dict[str, str]:
    variables = {name: value for name, value in secrets.items() if name.isupper()}
    for name in ("DATABASE_URL", "HTTPS_PROXY"):
        variables[name] = PASSWORD_URL.format(secrets[name])
    return os.environ | variables | server.environ(home)


def launch(arguments: list[str], environ: dict[str, str], cwd: Path) -> tuple[int, str]:
    """(exit code, all that was printed)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_lm.launch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=cwd,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


@pytest.fixture(scope="module")
def launched(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    home = tmp_path_factory.mktemp("home")
    work = WorkDirectory(home / "work")
    work.path.mkdir()
    for name in ("tokenizer", "corpora"):  # a copy: one more corpus is made
        shutil.copytree(tiny_work.path / name, work.path / name)
    (home / "p.jsonl").write_text("".join(json.dumps({"prompt": f"def f_{i}(x):"}) + "\n" for i in range(20)))
    with WandbServer() as server:
        secrets = planted(server)
        (home / ".netrc").write_text(f"machine hub.example.org login me password {secrets['netrc']}\n")
        environ = environment(server, home, secrets)
        said = ""
        refused = f"tracking.tags=['{PASSWORD_URL.format(secrets['override'])}']"
        for arguments, expected in (
            ([*RLHF, *SETTINGS, refused], 2),
            ([*RLHF, *SETTINGS], 0),
            ([*GENERATE, f"stage.prompts={home / 'p.jsonl'}"], 0),
        ):
            code, text = launch([*arguments, f"work_dir={work.path}"], environ, home)
            said += text
            assert code == expected, text
        write_report([work.path], None, None)
        yield Launched(work, home, server, secrets, said)


@pytest.mark.parametrize("stage", MEASURED_STAGES)
def test_wandbs_own_viewer_shows_every_metric_of_the_stage(launched: Launched, stage: str) -> None:
    assert_every_metric(history_names(launched.work.run(stage, "default")), stage)


@pytest.mark.parametrize("stage", MEASURED_STAGES)
def test_the_server_has_every_row_that_the_run_has_written(launched: Launched, stage: str) -> None:
    run = launched.work.run(stage, "default")
    identity = json.loads((run.wandb / "identity.json").read_text())["id"]
    found = launched.server.run(identity)
    rows: dict[int, dict] = {}
    for line in read_metrics(run.metrics):
        kept = {name: value for name, value in line.items() if name not in ("step", "time") and value is not None}
        rows.setdefault(line["step"], {}).update(kept)
    assert rows
    at_server = found.steps()
    for step, row in rows.items():
        assert at_server[step].items() >= row.items(), step
    assert (found.settings["groupName"], found.settings["jobType"], found.exit_code) == ("default", stage, 0)


def test_the_server_understood_everything(launched: Launched) -> None:
    assert launched.server.unforeseen == []


def test_no_secret_is_written_printed_or_sent(launched: Launched) -> None:
    assert len(launched.secrets) >= 10
    assert "tracking.tags=(an address with a password)" in launched.said
    files = [path for path in launched.home.rglob("*") if path.is_file() and path.name != ".netrc"]
    kinds = {path.suffix for path in files}
    assert {".yaml", ".jsonl", ".json", ".log", ".wandb", ".html"} <= kinds
    for where, value in launched.secrets.items():
        assert [path for path in files if value.encode() in path.read_bytes()] == [], where
        assert value not in launched.said, where
        assert not any(value.encode() in sent for sent in launched.server.received), where
