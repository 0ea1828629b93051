"""The program of a rank, before it starts its stage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm.storage.run_directory import RunDirectory
from tests.patience import patient


@pytest.mark.heavy
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.bars)])
def test_a_closed_terminal_hides_no_failure(tmp_path: Path, rank: int):
    run = RunDirectory(tmp_path)
    run.config.write_text("")
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "dist_lm.train", str(tmp_path)],
        env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},  # and no address at which ranks could meet
        stderr=writes,
        timeout=patient(120),
        check=False,
    )
    os.close(writes)
    assert done.returncode == 1
    failure = json.loads(run.rank_failure(rank).read_text())
    assert (failure["rank"], failure["type"]) == (rank, "ValueError")
    log = run.rank_log(rank).read_text()
    assert f"it missed: rank {rank}: ValueError" in log
    assert "could not be written" not in log
