"""`dist-lm data attach`: the folder that it makes is a corpus, and a killed one leaves nothing for good."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_lm.__main__ import app
from dist_lm.data.attach import LOCK
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.storage.lock import locked
from dist_lm.storage.run_directory import WorkDirectory
from tests.data.file_server import Served
from tests.data.synthetic_corpus import documents, lengths, write
from tests.patience import patient


def arguments(served: Served, work: Path) -> list[str]:
    return ["data", "attach", f"{served.url}/remote", "far", "--work", str(work), "--cache", str(work / "cache")]


def attach(served: Served, work: Path) -> str:
    result = CliRunner().invoke(app, arguments(served, work), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def temporary_folders(work: Path) -> list[Path]:
    return list((work / "corpora").glob(".far.*.tmp"))


def test_attached_corpus_has_the_documents_of_the_remote_one(served: Served, tmp_path: Path) -> None:
    """Finds a verb that names another folder, or leaves files of its own in it."""
    near = write(served.folder / "remote", documents(lengths(20, 50)))
    work = tmp_path / "work"
    output = attach(served, work)
    far = WorkDirectory(work).corpus("far")
    corpora = [TokenCorpus.open(folder, "train") for folder in (near, far)]
    assert f"attached far: {corpora[0].n_tokens:,} training tokens" in output
    assert all(corpora[0].tokens(i, 0, 5).tolist() == corpora[1].tokens(i, 0, 5).tolist() for i in range(20))
    assert not temporary_folders(work)
    assert not (far / LOCK).exists()


def test_folders_of_living_commands_stay(served: Served, tmp_path: Path) -> None:
    """Finds an attach that removes the folder of another one under way, or of another corpus."""
    write(served.folder / "remote", documents(lengths(20, 50)))
    alive, dead, begun, other = (tmp_path / "corpora" / f".{name}.tmp" for name in (
        "far." + "a" * 16, "far." + "b" * 16, "far." + "c" * 16, "far.away." + "d" * 16,
    ))  # fmt: skip
    for folder in (alive, dead, begun, other):
        folder.mkdir(parents=True)
    for folder in (dead, other):
        (folder / "manifest.json").touch()
    with locked(alive / LOCK):
        attach(served, tmp_path)
        assert [folder.exists() for folder in (alive, dead, begun, other)] == [True, False, True, True]


@pytest.mark.heavy
def test_the_next_command_clears_what_a_killed_one_left(served: Served, tmp_path: Path) -> None:
    """Finds folders that pile up beside the corpora."""
    write(served.folder / "remote", documents(lengths(20, 50)))
    work = tmp_path / "work"

    def kill_attach(_: int) -> None:
        if len(served.sent) > 1:  # the manifest has arrived
            os.kill(process.pid, signal.SIGKILL)

    served.before_body = kill_attach
    process = subprocess.Popen([sys.executable, "-m", "dist_lm", *arguments(served, work)])
    assert process.wait(patient(60)) == -signal.SIGKILL
    assert len(temporary_folders(work)) == 1

    served.before_body = lambda _: None
    attach(served, work)
    assert not temporary_folders(work)
    assert WorkDirectory(work).corpus("far").is_dir()
