"""The last collectives of ranks that hang: from any state of the rank, and what they say about the hang."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch

from dist_lm.cluster import flight_recorder
from dist_lm.cluster.agent import Assignment, NodeAgent
from dist_lm.cluster.flight_recorder import HANDLERS, VARIABLE, collectives_served, dump_collectives, waited_for
from dist_lm.storage.run_directory import RunDirectory

STUCK = """
import ctypes, os, torch, torch.distributed as dist
from dist_lm.cluster.flight_recorder import collectives_served
with collectives_served(os.environ):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(3))
    dist.broadcast(torch.ones(5, 2), 0)
    print("ready", flush=True)
    ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock: no Python code can run
"""


FIRST_RANK = 8


def agent_of(ranks: dict[int, psutil.Process], run: RunDirectory, sockets: tempfile.TemporaryDirectory) -> NodeAgent:
    """An agent whose ranks have started: the second node of two."""

    class Started(NodeAgent):
        def _ranks(self) -> dict[int, psutil.Process]:
            return ranks

    agent = Started()
    agent._assignment = Assignment(
        node=1,
        nodes=2,
        ranks_per_node=FIRST_RANK,
        module="",
        arguments=(),
        master_address="",
        master_port=0,
        address="",
        device="cpu",
        run=run,
        mark="",
        directory=run.path,
    )
    agent._sockets = sockets
    return agent


@pytest.mark.heavy
@pytest.mark.cluster
def test_a_rank_in_which_no_python_runs_hands_out_its_collectives(tmp_path, monkeypatch):
    sockets = tempfile.TemporaryDirectory()
    environ = os.environ | {VARIABLE: sockets.name, "LOCAL_RANK": "3"}
    process = subprocess.Popen([sys.executable, "-c", STUCK], env=environ, stdout=subprocess.PIPE)
    try:
        assert process.stdout
        process.stdout.readline()
        files = {3: tmp_path / "rank.json", 4: tmp_path / "absent.json"}
        dump_collectives(Path(sockets.name), files)
        entries = json.loads(files[3].read_text())["gloo"]["entries"]
        assert [entry["profiling_name"] for entry in entries] == ["gloo:all_reduce", "gloo:broadcast"]
        assert entries[1]["input_sizes"] == [[5, 2]]
        assert "does not answer: " in json.loads(files[4].read_text())["error"]
        run = RunDirectory(tmp_path)
        run.logs.mkdir()
        agent = agent_of({3: psutil.Process(process.pid)}, run, sockets)
        agent.dump_hang()
        assert json.loads(run.collectives(FIRST_RANK + 3).read_text())["gloo"]["entries"] == entries
        monkeypatch.setattr(flight_recorder, "ANSWER_S", 0.2)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)  # until then, its other threads answer
        dump_collectives(Path(sockets.name), files)
        assert "timed out" in json.loads(files[3].read_text())["error"]
    finally:
        process.kill()
        process.wait()


def test_the_handlers_are_those_that_torch_itself_asks():
    asked = (Path(torch.distributed.__file__).parent / "debug" / "_debug_handlers.py").read_text()
    assert all(f'"{handler}"' in asked for handler in HANDLERS.values())


def test_without_an_agent_nothing_is_served():
    with collectives_served({"LOCAL_RANK": "0"}):
        pass


def entry(number: int, group: str = "0", name: str = "nccl:all_reduce", is_p2p: bool = False) -> dict:
    return {
        "collective_seq_id": number,
        "process_group": [group, "default_pg" if group == "0" else "mesh_tp"],
        "profiling_name": name,
        "is_p2p": is_p2p,
    }


def written(directory: Path, *records: dict) -> dict[int, Path]:
    files = {rank: directory / f"{rank}.json" for rank in range(len(records))}
    for rank, record in enumerate(records):
        files[rank].write_text(json.dumps(record))
    return files


def nccl(*entries: dict) -> dict:
    return {"gloo": {}, "nccl": {"entries": entries}}


def test_the_rank_that_has_not_called_is_named_with_the_collective(tmp_path):
    here, last = nccl(entry(6), entry(7)), nccl(entry(6))
    files = written(tmp_path, here, last, here)
    assert waited_for(files) == "nccl:all_reduce number 7 of default_pg waits for rank 1"


def test_ranks_are_compared_within_their_groups(tmp_path):
    files = written(
        tmp_path,
        nccl(entry(9), entry(4, "1", "nccl:_all_gather_base")),
        nccl(entry(9), entry(5, "1", "nccl:_all_gather_base")),
        nccl(entry(9), entry(2, "2")),
        nccl(entry(9), entry(2, "2"), entry(99, "2", is_p2p=True)),
    )
    assert waited_for(files) == "nccl:_all_gather_base number 5 of mesh_tp waits for rank 0"


def test_a_rank_without_an_answer_says_nothing(tmp_path):
    files = written(tmp_path, nccl(entry(9)), {"error": "timed out"}, nccl(entry(9)))
    assert waited_for(files | {3: tmp_path / "absent.json"}) == ""


def test_many_ranks_are_counted(tmp_path):
    files = written(tmp_path, *[nccl(entry(1))] * 9, nccl(entry(2)))
    assert waited_for(files).endswith("waits for rank 0, 1, 2, 3, 4, 5, 6, 7, ...")
