"""Ranks on this machine, under a private Ray: success, failure, interruption, and nothing left behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dist_lm.cluster import flight_recorder
from dist_lm.cluster import gang as gang_module
from dist_lm.cluster.gang import Gang
from dist_lm.cluster.node_facts import host_name
from dist_lm.cluster.ray_cluster import RayCluster, connect
from dist_lm.config.cluster import ClusterConfig
from dist_lm.storage.run_directory import RunDirectory
from tests.cluster.waiting import eventually, living, ready_ranks, recruited, wait_for_end
from tests.patience import patient

pytestmark = pytest.mark.cluster
PYTHONPATH = {"PYTHONPATH": str(Path(__file__).parent)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", "sesame")
        patch.setenv("HF_TOKEN", "sesame")
        with connect(ClusterConfig(name="local", connect_timeout_s=patient(30))) as cluster:
            yield cluster


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "code" / "test")
    run.create()
    return run


def start(cluster: RayCluster, run: RunDirectory, behaviour: str) -> Gang:
    return Gang.start(
        recruited(cluster, run, nodes=1),
        run,
        ranks_per_node=2,
        module="dummy_rank",
        arguments=(str(run.path), behaviour),
        env=PYTHONPATH,
    )


def pids_of(run: RunDirectory) -> list[int]:
    ranks = ready_ranks(run.path, 2)
    return [rank["pid"] for rank in ranks] + [ranks[0]["torchrun"]]


def test_ranks_finish_and_see_no_secret(cluster: RayCluster, run: RunDirectory) -> None:
    run.rank_failure(1).write_text("of an earlier attempt")
    with start(cluster, run, "succeed") as gang:
        status = wait_for_end(gang)
    assert status.state == "finished"
    assert status.failure is None
    assert "rank 1 says hello" in run.node_log(0).read_text()
    for rank in ready_ranks(run.path, 2):
        assert "sesame" not in rank["environ"].values()
        assert not any(name.startswith("RAY_AUTH") for name in rank["environ"])
        assert int(rank["environ"]["OMP_NUM_THREADS"]) >= 1
        assert "MALLOC_TOP_PAD_" in rank["environ"]
        assert not Path(rank["environ"][flight_recorder.VARIABLE]).exists()
    assert living(pids_of(run)) == []


@pytest.mark.heavy
def test_the_exception_of_a_rank_is_the_failure(cluster: RayCluster, run: RunDirectory) -> None:
    with start(cluster, run, "raise") as gang:
        status = wait_for_end(gang)
    failure = status.failure
    assert status.state == "failed"
    assert failure is not None
    assert (failure.rank, failure.node, failure.type) == (1, 0, "ValueError"), failure.traceback
    assert "record_failure" not in failure.traceback
    assert "loss went\nthrough the roof" in failure.traceback
    assert str(failure) == (
        f"rank 1 on node 0 ({host_name()}): ValueError: loss went through the roof (log: {run.rank_log(1)})"
    )
    assert living(pids_of(run)) == []


def test_a_killed_rank_is_named_with_its_signal(cluster: RayCluster, run: RunDirectory) -> None:
    with start(cluster, run, "wait") as gang:
        os.kill(ready_ranks(run.path, 2)[1]["pid"], signal.SIGKILL)
        failure = wait_for_end(gang).failure
    assert failure is not None
    assert failure.rank == 1
    assert "SIGKILL" in str(failure)
    assert failure.log.exists()
    assert living(pids_of(run)) == []


def test_interrupted_ranks_save_and_leave(cluster: RayCluster, run: RunDirectory) -> None:
    with start(cluster, run, "wait") as gang:
        gang.interrupt()  # before there are ranks: it must not be lost, nor kill one that has no handler yet
        status = wait_for_end(gang)
    assert status.state == "finished"
    assert all((run.path / f"saved_{rank}").exists() for rank in range(2))


def test_stop_ends_ranks_that_do_not_listen(
    cluster: RayCluster, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang_module, "STOP_GRACE_S", 0.2)
    monkeypatch.setattr(gang_module, "STOP_S", 120.0)
    with start(cluster, run, "deaf") as gang:
        pids = pids_of(run)
        assert len(living(pids)) == 3
    assert living(pids) == []
    assert gang.poll().state == "stopped"


DRIVER = """
import sys
from pathlib import Path
from dist_lm.cluster.gang import Gang
from dist_lm.cluster.ray_cluster import connect
from dist_lm.config.cluster import ClusterConfig
from dist_lm.storage.run_directory import RunDirectory
from tests.cluster.waiting import recruited, wait_for_end
run = RunDirectory(Path(sys.argv[1]))
with connect(ClusterConfig(name="local")) as cluster:
    gang = Gang.start(recruited(cluster, run, nodes=1), run, ranks_per_node=2, module="dummy_rank",
                      arguments=(sys.argv[1], "deaf"), env={"PYTHONPATH": sys.argv[2]})
    wait_for_end(gang)
"""


@pytest.mark.heavy
def test_a_killed_driver_leaves_nothing_running(run: RunDirectory, tmp_path: Path) -> None:
    environ = os.environ | {"TMPDIR": str(tmp_path)}  # too long for Ray's sockets: /tmp is used instead
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(run.path), PYTHONPATH["PYTHONPATH"]], env=environ)
    try:
        ranks = pids_of(run)
        started = [child.pid for child in psutil.Process(driver.pid).children(recursive=True)]
        assert set(ranks) <= set(started)
        assert len(living(started)) > 5  # Ray's own processes are among them
    finally:
        driver.kill()
        driver.wait()
    eventually("everything is gone", lambda: living(started) == [])
