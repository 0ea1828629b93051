"""No secret reaches what is written of a run, or what is sent to wandb: ten are planted and everything is searched."""

import io
import os
from pathlib import Path
from typing import Any

import pytest

from dist_lm.config.root import TrackingConfig
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.alerts import failed
from dist_lm.tracking.console import Console
from dist_lm.tracking.wandb_run import WandbRun
from tests.patience import patient
from tests.tracking.wandb_server import WandbServer

WAIT_S = patient(240.0)


def planted(server: WandbServer) -> dict[str, str]:
    """Ten secrets by where they are."""
    names = (
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "GITHUB_TOKEN",
        "PGPASSWORD",
        "url",
        "override",
        "option",
        "config",
        "netrc",
    )
    return {name: f"sesame{number}opensesame" for number, name in enumerate(names)} | {"WANDB_API_KEY": server.api_key}


@pytest.mark.heavy
def test_ten_planted_secrets_are_found_nowhere(tmp_path: Path) -> None:
    run, home = RunDirectory(tmp_path / "work" / "runs" / "code" / "first"), tmp_path / "home"
    run.create()
    home.mkdir()
    samples = run.samples / "step_00000001.jsonl"
    with WandbServer() as server:
        secret = planted(server)
        url = f"https://me:{secret['url']}@hub.example.org/data"
        (home / ".netrc").write_text(f"machine 127.0.0.1 login user password {secret['netrc']}\n")
        environ = {name: secret[name] for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "PGPASSWORD")}
        config: dict[str, Any] = {
            "corpus": {"from": url, "api_key": secret["config"]},
            "lists": [{"password": secret["config"]}],
        }
        online = WandbRun.start(
            config,
            run,
            TrackingConfig(name="wandb", mode="online", finish_s=WAIT_S),
            job_type="code",
            group="first",
            git_commit="0123abc",
            command=[
                "launch",
                f"corpus.password={secret['override']}",
                "--token",
                secret["option"],
                f"corpus.from={url}",
            ],
            environ=os.environ | server.environ(home) | environ,
            console=Console(output=io.StringIO(), errors=(errors := io.StringIO())),
        )
        assert online is not None
        online.log(1, {"train/loss": 1.0})
        online.link("corpus", "corpus", "dataset", [Path(__file__)], config)
        online.alert(failed("first", f"cannot read {url}", again=False))
        samples.write_text('{"text": "see the table"}\n')
        online.samples(samples, 1)
        online.finish("failed", WAIT_S)
        seen = server.run(online.id)
    assert errors.getvalue() == ""
    assert (seen.alerts[0]["text"], seen.config()["corpus"]["api_key"]) == (
        "cannot read https://***@hub.example.org/data",
        "***",
    )
    assert seen.steps()[1]["train/loss"] == 1
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".netrc"}
    assert any(path.suffix == ".wandb" for path in written)
    for where, value in secret.items():
        assert [path for path, content in written.items() if value.encode() in content] == [], where
        assert not any(value.encode() in sent for sent in server.received), where
