"""The dry run is arithmetic: checked by hand on small shapes, and on the model it is for."""

import pytest

from dist_lm.launcher.compose import compose_config
from dist_lm.parallel.dry_run import estimate, largest_shard, readable_count
from dist_lm.parallel.layout import Layout, shard_dim

LARGE = compose_config(["stage=language", "model=large"])


def test_attention_is_cut_along_d_model_where_that_is_even():
    assert shard_dim((25, 64, 1600), 64) == 2
    assert shard_dim((25, 64, 1600), 128) == 0
    assert shard_dim((6400, 1600), 7) == 0


def test_the_largest_shard_is_the_rounded_up_one():
    assert largest_shard((25, 64, 1600), 64) == 25 * 64 * 25
    assert largest_shard((25, 64, 1600), 128) == 64 * 1600
    assert largest_shard((10, 3), 4) == 9


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_shards_of_the_large_model_are_even_to_one_percent(ranks):
    rank = estimate(LARGE, Layout(1, ranks, 1), compute_bytes=2)
    assert rank.parameters == pytest.approx(4 * 1_086_108_800 / ranks, rel=0.01)
    assert rank.optimizer == 2 * rank.parameters


def test_gradients_are_whole_while_micro_batches_add_up():
    one = compose_config(["stage=language", "model=large", "stage.micro_batch=4", "stage.global_batch=32"])
    assert estimate(one, Layout(1, 8, 1), 2).gradients == estimate(one, Layout(1, 8, 1), 2).parameters
    assert estimate(LARGE, Layout(1, 8, 1), 2).gradients == 4 * 1_086_108_800


def test_counts_are_readable():
    assert [readable_count(n) for n in (999, 2_548_160, 1_086_108_800)] == ["999", "2.55 M", "1.09 B"]
