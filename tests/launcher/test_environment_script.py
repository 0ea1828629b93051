"""launch/env.sh, which other scripts source and people run: whose environments it touches, and whose it does not."""

import os
import subprocess
import venv
from pathlib import Path

import pytest

from tests.patience import patient

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of nothing but the script."""
    checkout = tmp_path / "checkout"
    (checkout / "launch").mkdir(parents=True)
    (checkout / "launch/env.sh").write_text((ROOT / "launch/env.sh").read_text())
    (checkout / "pyproject.toml").write_text("")
    (checkout / "launch/constraints.txt").write_text("")
    return checkout


def program(path: Path, text: str) -> None:
    """Write a shell script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def outside() -> dict[str, str]:
    """The environment of a person: the scripts that run these tests have set variables that the script reads."""
    ours = ("DIST_LM_VENV", "DIST_LM_EXTRAS", "PYTHON")
    return {name: value for name, value in os.environ.items() if name not in ours}


def source(checkout: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", '. "$0/launch/env.sh" && command -v python && echo "$PYTHONPATH"', str(checkout)]
    return subprocess.run(
        command, env=outside() | {"PIP_NO_INDEX": "1"} | environ, capture_output=True, text=True, timeout=patient(240)
    )


def test_an_environment_of_ones_own_is_used_as_it_is(checkout, tmp_path):
    own = tmp_path / "own"
    venv.create(own, with_pip=False)
    before = sorted(own.rglob("*"))
    done = source(checkout, DIST_LM_VENV=str(own))
    assert done.returncode == 0, done.stderr
    python, path = done.stdout.splitlines()
    assert python == str(own / "bin/python")
    assert path.split(":")[0] == str(checkout)
    assert sorted(own.rglob("*")) == before


def test_an_environment_that_is_not_there_is_not_made(checkout, tmp_path):
    done = source(checkout, DIST_LM_VENV=str(tmp_path / "typo"))
    assert done.returncode == 2
    assert f"DIST_LM_VENV={tmp_path}/typo: no Python environment there" in done.stderr
    assert not (tmp_path / "typo").exists()


def test_it_can_be_run_by_itself(checkout, tmp_path):
    python = f'case "$*" in *" install "*) echo done >"{tmp_path}/installed";; *hashlib*) echo x;; esac'
    program(checkout / ".venv/bin/python", python)
    (checkout / ".venv/bin/activate").touch()
    command = ["bash", "launch/env.sh"]
    done = subprocess.run(command, cwd=checkout, env=outside(), capture_output=True, text=True, timeout=patient(240))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "installed").exists()
    assert (checkout / ".venv/.dist_lm").exists()


def test_a_venv_in_the_checkout_that_others_made_is_refused_and_kept(checkout):
    venv.create(checkout / ".venv", with_pip=False)
    (checkout / ".venv/precious").touch()
    done = source(checkout)
    assert done.returncode == 2
    assert "has no pip, so it was not made by this script" in done.stderr
    assert (checkout / ".venv/precious").exists()


def test_an_installation_that_fails_is_not_taken_for_done(checkout, tmp_path):
    python = checkout / ".venv/bin/python"
    program(
        python,
        f'case "$*" in *" install "*) echo tried >>"{tmp_path}/tries"; exit 7;; *--version*) exit 0;; esac\necho x',
    )
    for tries in (1, 2):
        done = source(checkout)
        assert done.returncode == 7, done.stderr
        assert len((tmp_path / "tries").read_text().split()) == tries
    assert not (checkout / ".venv/.dist_lm").exists()


def test_without_a_python_nothing_is_left_behind(checkout, tmp_path):
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        program(tmp_path / "bin" / name, "exit 1")
    done = source(checkout, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Python 3.11 or newer found")
    assert len(done.stderr.splitlines()) == 1
    assert not (checkout / ".venv").exists()


def test_a_venv_whose_making_fails_is_made_again(checkout, tmp_path):
    program(tmp_path / "python", f'case "$*" in *venv*) echo tried >>"{tmp_path}/tries"; exit 9;; esac')
    for tries in (1, 2):
        done = source(checkout, PYTHON=str(tmp_path / "python"))
        assert done.returncode == 9, done.stderr
        assert len((tmp_path / "tries").read_text().split()) == tries
