"""`dist-lm gpu check`: every check runs, whatever the others do, and what they found is written as they end."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dist_lm.errors import ConfigError
from dist_lm.gpu_check import run
from dist_lm.gpu_check.checks import CHECKS, Check, chosen
from dist_lm.gpu_check.results import BEGIN, END, Result
from dist_lm.storage import process
from tests.cluster.waiting import eventually
from tests.patience import patient

pytestmark = pytest.mark.cluster


def stand_in(name: str) -> Check:
    return Check(name, "a stand-in", f"tests.gpu_check.stand_ins:{name}", 30, runs="launcher")


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """A function that runs stand-ins, by name: (whether all passed, results of the file, what was said)."""

    def check(*names: str):
        known = {name: stand_in(name) for name in names}
        monkeypatch.setattr(run, "chosen", lambda only, gpus: list(known.values()))
        monkeypatch.setattr(run, "command_of", command_of)
        said: list[str] = []
        passed = run.check_gpus((), 1, tmp_path, None, rehearse=True, say=said.append)
        return passed, json.loads((tmp_path / run.RESULTS).read_text())["checks"], said

    return check


PROGRAM = """
import sys
from dist_lm.gpu_check import probe
from tests.gpu_check.test_check_runs import stand_in
probe.named = stand_in
probe.main()
"""


COMMAND = """
import sys
from pathlib import Path
from dist_lm.gpu_check import run
from tests.gpu_check.test_check_runs import command_of, stand_in
run.chosen = lambda only, gpus: [stand_in("launches")]
run.command_of = command_of
run.check_gpus((), 1, Path(sys.argv[1]), None, rehearse=True, say=print)
"""


def command_of(check: Check, gpus: int, folder: Path, *, rehearse: bool) -> list[str]:
    """The program of a check, which knows the stand-ins."""
    return [sys.executable, "-c", PROGRAM, check.name, str(folder), str(gpus), "rehearsal"]


@pytest.mark.heavy
def test_a_failing_check_does_not_stop_the_others(checked):
    passed, found, said = checked("finds_something", "breaks", "dies", "passes")
    assert not passed
    assert {name: result["status"] for name, result in found.items()} == {
        "finds_something": "failed",
        "breaks": "failed",
        "dies": "failed",
        "passes": "passed",
    }
    assert found["finds_something"]["reason"] == "the sums differ"
    assert found["finds_something"]["facts"] == {"before MiB": 3.0}
    assert found["breaks"]["reason"] == "RuntimeError: CUDA error: an illegal memory access"
    assert found["dies"]["reason"] == "killed by SIGKILL; last line of its log: the last words"
    assert found["passes"]["facts"] == {"speed tokens/s": 12346.0}
    assert "| `passes` | a stand-in |" in said[-1]
    assert "speed: 12,346 tokens/s" in said[-1]


@pytest.mark.heavy
def test_all_passed(checked):
    assert checked("passes")[0]


@pytest.mark.heavy
def test_an_overrun_is_reported_and_leaves_no_process(checked, monkeypatch, tmp_path):
    mark, wait = str(tmp_path), subprocess.Popen.wait
    monkeypatch.setattr(run, "secrets", SimpleNamespace(token_hex=lambda length: mark))

    def overrun(self, timeout=None):
        """Its budget is spent once it has started a process."""
        if timeout is None or "never_ends" not in self.args:
            return wait(self, timeout)
        eventually("it has started a process", lambda: len(process.marked(mark, run.probe.MARK)) == 2)
        raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", overrun)
    passed, found, _ = checked("never_ends", "passes")
    assert not passed
    assert found["never_ends"]["status"] == "over budget"
    assert found["never_ends"]["reason"] == f"not done after {run.REHEARSAL_S:g} s"
    assert found["never_ends"]["facts"] == {"half s": 0.5}
    assert found["passes"]["status"] == "passed"
    left = process.marked(mark, run.probe.MARK)
    for one in left:
        one.kill()
    assert not left


@pytest.mark.heavy
def test_the_file_is_written_after_each_check_and_keeps_earlier_ones(checked, monkeypatch, tmp_path):
    checked("passes")
    run_check, seen = run.run_check, []

    def watched(check: Check, *arguments, **options):
        seen.append(json.loads((tmp_path / run.RESULTS).read_text())["checks"].keys())
        return run_check(check, *arguments, **options)

    monkeypatch.setattr(run, "run_check", watched)
    checked("finds_something", "breaks")
    assert seen == [{"passes"}, {"passes", "finds_something"}]


@pytest.mark.heavy
def test_results_of_another_machine_are_dropped(checked, tmp_path):
    file = tmp_path / run.RESULTS
    checked("passes")
    file.write_text(file.read_text().replace('"device": "CPU"', '"device": "a card"'))
    assert checked("breaks")[1].keys() == {"breaks"}


def test_a_ctrl_c_ends_the_check_that_runs_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "chosen", lambda only, gpus: [stand_in("never_ends")])
    monkeypatch.setattr(run, "command_of", command_of)

    def interrupted(self, timeout=None):
        monkeypatch.undo()
        started.append(self.pid)
        raise KeyboardInterrupt

    started: list[int] = []
    said: list[str] = []
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run.check_gpus((), 1, tmp_path, None, rehearse=True, say=said.append)
    assert stopped.value.code == 130
    assert not psutil.pid_exists(started[0])
    (line,) = said
    assert line.startswith("never_ends")
    assert "SIGINT" in line


@pytest.mark.heavy
def test_what_a_killed_command_started_dies_with_it(tmp_path):
    pids = tmp_path / "out" / "launches" / "pids.json"
    gpu_check = subprocess.Popen([sys.executable, "-c", COMMAND, str(tmp_path / "out")], start_new_session=True)
    started: list[psutil.Process] = []
    try:
        eventually("the check has a launcher", lambda: pids.exists() and json.loads(pids.read_text()))
        started += [psutil.Process(pid) for pid in json.loads(pids.read_text())]
        gpu_check.kill()
        gpu_check.wait()
        eventually("everything is gone", lambda: not any(map(process.is_alive, started)))
    finally:
        gpu_check.kill()
        for one in started:
            process.send(one, signal.SIGKILL)


# --- only its own folders are replaced ---


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_others_made_is_refused_before_anything_runs(checked, tmp_path, kind):
    precious = tmp_path / "breaks" / "precious.txt"
    if kind == "file":
        precious = tmp_path / "breaks"
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "breaks").symlink_to(tmp_path / "elsewhere")
    else:
        precious.parent.mkdir()
    precious.write_text("mine")
    with pytest.raises(ConfigError, match=f"{tmp_path / 'breaks'}: not made by `gpu check`"):
        checked("passes", "breaks")
    assert precious.read_text() == "mine"
    assert not (tmp_path / "passes").exists()


@pytest.mark.heavy
def test_a_folder_of_an_earlier_command_is_replaced(checked, tmp_path):
    assert checked("passes")[0]
    (tmp_path / "passes" / "old.txt").touch()
    assert checked("passes")[0]
    assert not (tmp_path / "passes" / "old.txt").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_an_output_that_is_no_folder_is_refused_in_one_line(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--output=.*: expected a folder that can be written to"):
        run.check_gpus((), 1, tmp_path / place, None, rehearse=True, say=print)


# --- what is refused ---


@pytest.mark.heavy
def test_without_a_gpu_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "dist_lm", "gpu", "check", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patient(120))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no GPU" in line
    assert "--rehearse" in line
    assert not done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("only", "gpus", "words"),
    [(("varlen", "no_such"), 1, "--only=no_such: expected one of varlen"), (("nccl",), 1, "needs --gpus=2")],
)
def test_checks_that_cannot_run_are_refused_by_name(only, gpus, words):
    with pytest.raises(ConfigError, match=words):
        chosen(only, gpus)


def test_more_gpus_add_checks():
    one, two = chosen((), 1), chosen((), 2)
    assert {check.name for check in two} - {check.name for check in one} == {"nccl", "fsdp", "tp", "cp", "kill", "hang"}
    assert two == list(CHECKS)
    assert [check.name for check in chosen(("smoke", "varlen"), 1)] == ["varlen", "smoke"]


def test_more_gpus_than_there_are_and_a_table_of_a_rehearsal_are_refused(monkeypatch, tmp_path):
    looked = subprocess.CompletedProcess([], 0, '{"device": "a card", "gpus": 1, "torch": "2", "cuda": "13"}', "")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: looked)
    with pytest.raises(ConfigError, match="--gpus=2: expected at most 1"):
        run.machine_of(2, rehearse=False)
    assert run.machine_of(1, rehearse=False)["device"] == "a card"
    with pytest.raises(ConfigError, match="--table"):
        run.check_gpus((), 1, tmp_path, tmp_path / "page.md", rehearse=True, say=print)


def test_a_check_of_several_cards_keeps_the_results_of_one(monkeypatch, tmp_path):
    looked = subprocess.CompletedProcess([], 0, '{"device": "a card", "gpus": 8, "torch": "2", "cuda": "13"}', "")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: looked)
    monkeypatch.setattr(run, "run_check", lambda *arguments, **options: Result("passed", 1.0, "2026-12-01"))
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    run.check_gpus(("varlen",), 1, tmp_path, None, rehearse=False, say=print)
    run.check_gpus(("nccl",), 8, tmp_path, page, rehearse=False, say=print)
    assert json.loads((tmp_path / run.RESULTS).read_text())["checks"].keys() == {"varlen", "nccl"}
    assert page.read_text().count("passed |") == 2


@pytest.mark.bars
@pytest.mark.cluster
@pytest.mark.parametrize("name", ["fsdp", "tp", "cp"])
def test_checks_of_several_cards_pass_in_a_rehearsal(tmp_path, name):
    """Finds a check that fails on cards by itself, such as a whole model beside the split one that has no owners."""
    said: list[str] = []
    assert run.check_gpus((name,), 2, tmp_path, None, rehearse=True, say=said.append), said
