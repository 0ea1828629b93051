"""Scripts of launch/, with programs that only write down how they are called."""

import os
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

from tests.patience import patient

ROOT = Path(__file__).parents[2]


@pytest.fixture
def outside(tmp_path: Path) -> dict[str, str]:
    """An environment whose python, dist-lm and apt-get append their arguments to `calls`; the user is root."""
    programs = tmp_path / "env/bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
    for name in ("python", "dist-lm", "apt-get", "bwrap"):
        program(programs / name, f'echo {name} "$@" >>"{tmp_path}/calls"')
    program(programs / "id", "echo 0")
    return os.environ | {"DIST_LM_VENV": str(programs.parent)}


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def calls(tmp_path: Path, script: str, *arguments: str, env: dict[str, str]) -> list[str]:
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=patient(120),
    )
    assert done.returncode == 0, done.stderr
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize(("given", "run_id"), [([], "adapted"), (["run_id=longer"], "longer")])
def test_the_run_that_is_trained_is_the_one_that_is_exported_and_asked(tmp_path, outside, given, run_id):
    work = tmp_path / "work"
    base = work / "runs/import/smollm2"
    base.mkdir(parents=True)
    run = work / "runs/code" / run_id
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    called = calls(tmp_path, "smollm2.sh", "stage.steps=200", *given, f"work_dir={work}", env=outside)
    (trained,) = [call for call in called if call.startswith("python -m dist_lm.launch ")]
    assert [word for word in trained.split() if word.startswith("run_id=")] == [f"run_id={run_id}"]
    assert "stage.steps=200" in trained
    assert [call.split()[2] for call in called if call.startswith("dist-lm export ")] == [str(run)]
    assert [call.split()[2] for call in called if call.startswith("dist-lm generate ")] == [str(base), str(run)]


def test_slurm_is_installed_where_only_some_of_its_programs_are(tmp_path, outside):
    programs = Path(outside["DIST_LM_VENV"]) / "bin"
    names = ("slurmctld", "munged", "ip", "ss")
    for name in names:
        program(programs / name, "")
    assert not any(call.startswith("apt-get") for call in calls(tmp_path, "test.sh", "-m", "slurm", env=outside))
    (programs / "slurmctld").unlink()
    hidden = outside | {"PATH": without(outside["PATH"], "slurmctld", tmp_path)}
    called = calls(tmp_path, "test.sh", "-m", "slurm", env=hidden)
    assert [call.split()[1] for call in called if call.startswith("apt-get")] == ["update", "install"]
    assert called[-1] == "python -m pytest -m slurm"


def without(path: str, name: str, tmp_path: Path) -> str:
    """PATH where no folder has the program `name`: those with it are replaced by links to their other programs."""
    kept = []
    for number, folder in enumerate(map(Path, path.split(":"))):
        if (folder / name).exists():
            other = tmp_path / f"path{number}"
            other.mkdir()
            for one in folder.iterdir():
                if one.name != name:
                    (other / one.name).symlink_to(one)
            folder = other
        kept.append(str(folder))
    return ":".join(kept)


def selected(call: str, marks: set[str]) -> bool:
    """Whether this call of pytest runs a test with these marks."""
    if call.endswith(" tests/cuda"):
        return marks == {"cuda"}
    expression = call.partition(" pytest ")[2].partition("-m ")[2]
    return "cuda" not in marks and Expression.compile(expression).evaluate(lambda name, **_: name in marks)


def runs_of(marks: set[str], pytest_calls: list[str]) -> int:
    """Returns how often a test with these marks runs. Calls that name different files run it once together."""
    with_marks = [call for call in pytest_calls if selected(call, marks)]
    files = [word for call in with_marks for word in call.split() if word.endswith(".py")]
    names_files = [".py" in call for call in with_marks]
    if len(with_marks) > 1 and all(names_files) and len(files) == len(set(files)):
        return 1
    return len(with_marks)


def test_all_sizes_together_run_every_test_once_but_the_long_forms(tmp_path, outside):
    small = [call for call in calls(tmp_path, "test.sh", env=outside) if " pytest " in call]
    everything = [call for call in calls(tmp_path, "test.sh", "--all", env=outside) if " pytest " in call][len(small) :]
    for marks in ({"cuda"}, *(set(marks) for n in range(4) for marks in combinations(("cluster", "heavy", "bars"), n))):
        runs = 0 if "bars" in marks else 1
        assert runs_of(marks, everything) == runs, marks
        assert runs_of(marks, small) == (runs if marks <= {"cluster"} else 0), marks
    for marks in ({"slurm", "heavy"}, {"slurm", "heavy", "cluster"}):
        assert runs_of(marks, everything) == 1
