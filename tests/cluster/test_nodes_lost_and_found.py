"""Nodes that are unfit, lost, and back again, on a Ray cluster of several nodes on this machine."""

import sys
from pathlib import Path

import pytest

from dist_lm.cluster.events import read_events
from dist_lm.cluster.ray_cluster import ClusterError, connect
from dist_lm.storage.run_directory import RunDirectory
from tests.cluster.launched import CODE_STEPS, finish, follow_on, ranks_on, start, wait_until
from tests.cluster.loopback_ray import loopback_ray
from tests.cluster.waiting import eventually, recruited
from tests.training_run import numbers

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="other loopback addresses exist on Linux only"),
]
STEPS = (CODE_STEPS, "stage.checkpoint_every=5", "cluster.ranks_per_node=1")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs" / "code" / "test")
    run.create()
    return run


def old_numpy(directory: Path) -> Path:
    """A folder for PYTHONPATH that makes a node say it has a very old numpy."""
    metadata = directory / "numpy-0.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    return directory


@pytest.mark.bars
def test_an_unfit_node_is_named_and_left_out_for_a_spare(tmp_path, run):
    with loopback_ray(tmp_path, nodes=1) as ray, connect(ray.config()) as cluster:
        ray.start(1, PYTHONPATH=str(old_numpy(tmp_path / "old")))
        eventually("the second node is there", lambda: len(cluster.nodes()) == 2)
        with pytest.raises(ClusterError, match=r"127\.0\.0\.3\): numpy 0\.1 instead of "):
            recruited(cluster, run, nodes=2)
        ray.start(2)
        eventually("a spare is there", lambda: len(cluster.nodes()) == 3)
        said: list[str] = []
        # under suspicion, the first one is taken only where there is no other: the bad one is tried before it
        crew = recruited(cluster, run, nodes=2, warn=said.append, avoid=["127.0.0.2"])
        assert [node.address for node in crew.placement.nodes] == ["127.0.0.2", "127.0.0.4"]
        assert len(crew.link_rates) == 2
        crew.placement.release()
        assert any("127.0.0.3) is left out: numpy 0.1 instead of " in text for text in said)
        crew = recruited(cluster, run, nodes=1, avoid=["127.0.0.2"])
        assert [node.address for node in crew.placement.nodes] == ["127.0.0.4"]
        crew.placement.release()


def test_a_run_shrinks_when_a_node_is_lost_and_grows_when_it_is_back(undisturbed, tmp_path):
    work = follow_on(undisturbed, tmp_path / "disturbed")
    run = work.run("code", "default")
    with loopback_ray(tmp_path, nodes=2) as ray:
        process = start(
            work,
            *STEPS,
            *ray.overrides(),
            *("cluster.nodes=2", "cluster.min_nodes=1", "cluster.node_wait_s=1", "cluster.grow_after_s=0"),
        )

        def sizes() -> list[int]:
            return [len(event["nodes"]) for event in read_events(run.events) if event["event"] == "started"]

        wait_until((run.checkpoints / "LATEST").exists, process, "a checkpoint on two nodes")
        ray.lose(1)
        wait_until(lambda: sizes() == [2, 1] and ranks_on(run), process, "going on with one node")
        (rank,) = ranks_on(run)
        rank.suspend()  # or it would be done before the node is back
        ray.start(1)
        wait_until(lambda: any(event["event"] == "growing" for event in read_events(run.events)), process, "growth")
        rank.resume()
        code, _, err = finish(process)
    assert code == 0, err
    assert sizes() == [2, 1, 2], err
    assert "node 1" in err
    assert "continuing with 1" in err
    expected, found = numbers(undisturbed.run("code", "default")), numbers(run)
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        for key in ("train/loss", "train/tokens", "val/loss"):
            if key in values:
                assert found[step][key] == pytest.approx(values[key], rel=1e-5), (step, key)
