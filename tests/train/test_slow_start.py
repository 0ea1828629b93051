"""A rank whose start stands says where."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm.storage.process import MARK
from dist_lm.storage.run_directory import RunDirectory
from tests.patience import patient

SLOW = """
import threading, time
from dist_lm import train

def await_for_ever(store, rank, prepare):
    deadline = time.monotonic() + {deadline_s}
    while "await_for_ever" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)

log = train.RunDirectory(train.Path(train.sys.argv[1])).rank_log(1)
train.SLOW_START_S = 0.1
train.store_of_ranks = lambda patience_s: None
train.prepared_by_first_rank = await_for_ever
train.main()
"""


@pytest.mark.heavy  # imports the program of a rank
def test_the_log_of_a_rank_that_waits_for_the_others_has_its_stacks(tmp_path: Path) -> None:
    """Finds a start whose cause cannot be found: a launch stood 402 s in 'starting'."""
    run = RunDirectory(tmp_path / "runs" / "code" / "slow")
    run.create()
    run.config.write_text("")
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", MARK: "torchrun"}
    program = SLOW.format(deadline_s=patient(60))
    words = [sys.executable, "-c", program, str(run.path)]
    subprocess.run(words, env=os.environ | environment, capture_output=True, timeout=patient(120), check=False)
    assert "await_for_ever" in run.rank_log(1).read_text()
