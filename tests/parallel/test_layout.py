"""The layout is arithmetic: what fits the world, what is refused, and what the message offers."""

import pytest

from dist_lm.config import ParallelConfig
from dist_lm.errors import ConfigError
from dist_lm.launcher.compose import compose_config
from dist_lm.parallel.layout import Layout, check_batch, resolve_layout

MODEL = compose_config(["model=nano"]).model


@pytest.mark.parametrize("world", [1, 2, 8, 24])
@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        (ParallelConfig(1, -1, 1), lambda n: Layout(1, n, 1)),
        (ParallelConfig(-1, 1, 1), lambda n: Layout(n, 1, 1)),
    ],
)
def test_minus_one_is_what_is_left(world, parallel, expected):
    assert resolve_layout(parallel, MODEL, world) == expected(world)


@pytest.mark.parametrize(
    ("parallel", "world"),
    [(ParallelConfig(1, 3, 1), 4), (ParallelConfig(3, -1, 1), 4), (ParallelConfig(1, 1, 1), 2)],
)
def test_axes_that_do_not_make_the_world_list_those_that_do(parallel, world):
    with pytest.raises(ConfigError) as refused:
        resolve_layout(parallel, MODEL, world)
    for replicate in (1, 2, world):
        if world % replicate == 0:
            assert f"({replicate}, {world // replicate}, 1)" in str(refused.value)


def test_two_open_axes_are_refused():
    with pytest.raises(ConfigError, match="one of them at most"):
        resolve_layout(ParallelConfig(-1, -1, 1), MODEL, 4)


def test_a_batch_that_ranks_cannot_share_names_the_nearest_that_they_can():
    config = compose_config(["stage=language", "stage.global_batch=10"])
    check_batch(config, Layout(1, 2, 1))
    with pytest.raises(ConfigError, match=r"stage.global_batch=10: .* 4 data-parallel ranks.* 8 or 12"):
        check_batch(config, Layout(1, 4, 1))
