"""How often a run starts again, and on how many nodes."""

from dist_lm.launcher.compose import compose_config
from dist_lm.launcher.layout_choice import largest, on_nodes, sizes
from dist_lm.launcher.stage_run import Restarts
from tests.conftest import TINY


def test_failures_count_until_there_is_a_new_checkpoint():
    restarts = Restarts(limit=2, step=0)
    for left in (1, 0, -1):
        restarts = restarts.after_failure(step=0, address="10.0.0.1")
        assert restarts.left == left
    restarts = restarts.after_failure(step=5, address="10.0.0.1")
    assert restarts.left == 1
    assert restarts.after_failure(step=5, address="10.0.0.1").left == 0
    restarts = restarts.after_failure(step=3, address="10.0.0.1")  # the checkpoint of step 5 was damaged
    assert restarts.after_failure(step=4, address="10.0.0.1").left == 1


def test_a_node_that_fails_again_and_again_is_suspect_until_there_is_progress():
    restarts = Restarts(limit=9, step=0)
    for address in ("10.0.0.1", "10.0.0.2", "10.0.0.1"):
        restarts = restarts.after_failure(0, address)
    assert restarts.suspects == {"10.0.0.1"}
    assert restarts.after_failure(5, "10.0.0.1").suspects == frozenset()


def config(*overrides: str):
    cluster = ("cluster=ray", "cluster.address=127.0.0.2:6400", "cluster.nodes=4")
    return compose_config(
        ["stage=language", *TINY, *cluster, "stage.global_batch=8", "stage.micro_batch=1", *overrides]
    )


def test_a_run_shrinks_to_what_its_layout_and_batch_fit():
    assert sizes(config(), 1) == [4]
    assert sizes(config("cluster.min_nodes=1"), 1) == [4, 2, 1]  # a batch of 8 is not cut in three
    assert sizes(config("cluster.min_nodes=2"), 1) == [4, 2]
    assert sizes(config("cluster.min_nodes=1", "parallel.tp=2", "model.n_heads=4"), 1) == [4, 2]
    assert sizes(config("cluster.min_nodes=1", "parallel.dp_shard=4"), 1) == [4]


def test_the_largest_number_that_there_are_nodes_for():
    assert [largest([8, 4, 2], nodes) for nodes in (9, 8, 7, 3, 1)] == [8, 8, 4, 2, None]


def test_a_smaller_run_is_a_valid_configuration():
    smaller = on_nodes(config("cluster.min_nodes=3"), 2).cluster
    assert (smaller.nodes, smaller.min_nodes) == (2, 2)
