"""The memory that a dry run shows for stage `rlhf`."""

import pytest

from dist_lm.dry_run.iterations import memory_rows, rlhf_memory
from dist_lm.model.size import parameter_count
from dist_lm.parallel.layout import Layout
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.rlhf.config import rlhf_config

LARGE = ("stage=rlhf", "model=large", "hardware=h100")
LAYOUT = Layout(1, 8, 1)
KV_BYTES = 2 * 32 * 25 * 64 * 2  # keys and values of a token of `large` in bf16


def memory_of(*overrides: str):
    return rlhf_memory(rlhf_config(compose_config([*LARGE, *overrides])), LAYOUT)


def test_a_cache_beside_a_rank_counts_only_while_it_generates():
    freed = memory_of("rlhf.pool.cache_tokens=131072")
    kept = memory_of("rlhf.pool.cache_tokens=131072", "rlhf.pool.actors=0", "rlhf.max_staleness=1")
    apart = memory_of("rlhf.pool.cache_tokens=131072", "rlhf.pool.actors=1", "rlhf.pool.placement=disjoint")
    assert freed.cache == kept.cache == apart.cache == 131072 * KV_BYTES
    # On a GPU the weights of an engine that takes turns wait on the host, as does the optimizer while it generates.
    assert kept.training - freed.training == freed.cache + freed.engine
    assert freed.training == apart.training
    assert freed.generating - apart.generating == freed.models
    assert kept.generating - freed.generating == freed.optimizer
    assert (freed.waiting, kept.waiting, apart.waiting) == (freed.engine + freed.optimizer, 0, 0)


def test_on_a_cpu_nothing_leaves_the_memory_of_the_rank():
    """Finds an estimate that takes host memory for another place than the device's."""
    memory = memory_of("hardware=cpu", "rlhf.pool.actors=0", "rlhf.pool.cache_tokens=4096")
    assert memory.waiting == 0
    assert memory.training >= memory.engine + memory.models + memory.optimizer
    assert memory.generating >= memory.engine + memory.models + memory.optimizer


def test_all_models_and_two_optimizers_are_counted():
    memory, without = (
        memory_of(),
        memory_of("rlhf.rewards={size: {kind: length, target: 9}}", "rlhf.rewards.preference.weight=0"),
    )
    masters = 4 * parameter_count(compose_config([*LARGE]).model) / 8
    frozen = masters / 2  # bf16: the reference and the reward model
    assert memory.models == pytest.approx(2 * masters + 2 * frozen, rel=0.01)
    assert without.models == pytest.approx(2 * masters + frozen, rel=0.01)
    assert memory.optimizer == pytest.approx(4 * masters, rel=0.01)


@pytest.mark.parametrize("gib", [40, 80, 400])
def test_an_automatic_cache_takes_what_fits_beside_the_models(gib):
    memory = memory_of(f"hardware.memory_gib={gib}")
    assert memory.generating < gib * 2**30
    assert memory.cache_tokens * KV_BYTES == memory.cache
    most = 128 * compose_config([*LARGE]).model.max_seq_len
    assert memory.cache_tokens == most if gib == 400 else memory.cache_tokens < most


def test_a_cache_that_does_not_fit_is_said_so():
    config = compose_config([*LARGE, "rlhf.pool.cache_tokens=1000000"])
    rows = dict(memory_rows(config, LAYOUT))
    assert "does not fit" in rows["peak of the device that generates"]
    assert "does not fit" not in rows["peak of the rank that trains"]


@pytest.mark.parametrize(("staleness", "copies"), [(0, 2), (2, 4)])
def test_weights_for_a_restart_of_the_controller_are_counted(staleness, copies):
    """Finds a node whose memory is full of weights that no estimate has named."""
    overrides = ("rlhf.pool.actors=1", "rlhf.pool.tp=1", f"rlhf.max_staleness={staleness}")
    apart = memory_of(*overrides, "rlhf.controller=process")
    assert apart.restart == copies * apart.engine
    assert memory_of(*overrides).restart == 0
