"""Who orthogonalises which matrix: every entry once, by a rank that holds a part of it, evenly, with few messages."""

from collections import Counter

import numpy as np
import pytest

from dist_lm.config.model import ModelConfig
from dist_lm.model.size import is_matrix
from dist_lm.parallel.layout import Layout, placements
from dist_lm.parallel.owners import Cut, Plan, cut_of, make_plan, pieces, plan_of_model, size_of
from dist_lm.prepare.compose import compose_config
from tests.parallel.parity_cases import model_of

LAYOUTS = [Layout(1, 4, 1), Layout(4, 1, 1), Layout(2, 2, 1), Layout(1, 1, 4), Layout(2, 1, 2), Layout(1, 2, 2)]
LARGEST_LOAD = 1.15  # of the mean, or of the costliest matrix
MOST_SENT = 3  # bytes that a rank sends, for each byte of its fp32 shards


def plan_of(model: ModelConfig, layout: Layout, flops_per_entry: float, bucket_entries: int = 200) -> Plan:
    cuts = [cut_of(placement) for name, placement in placements(model, layout).items() if is_matrix(name)]
    return make_plan(cuts, layout, bucket_entries, flops_per_entry)


@pytest.mark.parametrize("flops_per_entry", [0.0, 1e12], ids=["shared", "apart"])
@pytest.mark.parametrize("heads", [(5, 5), (6, 3)], ids=["padded heads", "groups"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_entry_goes_once_to_a_holder_and_comes_back_to_every_holder(layout, heads, flops_per_entry):
    plan = plan_of(model_of(heads), layout, flops_per_entry)
    assert plan.shares_replicas == (layout.dp_replicate > 1 and not flops_per_entry)
    units_of: dict[int, list] = {}
    for unit in plan.units:
        units_of.setdefault(unit.parameter, []).append((unit.first, unit.end))
        cut = plan.cuts[unit.parameter]
        found = Counter(dict(pieces(plan, unit)))
        assert unit.owner in found
        assert (unit.replica is None) == (not plan.shares_replicas)

        shape = (cut.n_matrices, *cut.shape[-2:]) if len(cut.shape) == 3 else cut.shape
        gathered, held = np.zeros(shape, int), np.zeros(shape, int)
        for place, box in pieces(plan, unit):
            entries = tuple(slice(*extent) for extent in box)
            held[entries] += 1
            gathered[entries] += plan.is_source(unit, place)
        rows = slice(unit.first, unit.end) if len(shape) == 3 else slice(None)
        assert (gathered[rows] == 1).all()
        assert (held[rows] >= 1).all()
        assert held.sum() == held[rows].sum()
    for number, cut in enumerate(plan.cuts):
        ends = sorted(units_of[number])
        assert [first for first, _ in ends] == [0, *(end for _, end in ends[:-1])]
        assert ends[-1][1] == cut.n_matrices


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("large", Layout(1, 8, 1)),
        ("large", Layout(8, 8, 1)),
        ("large", Layout(64, 8, 1)),
        ("large", Layout(8, 64, 1)),
        ("large", Layout(8, 8, 8)),
        ("xlarge", Layout(64, 8, 1)),
        ("xlarge", Layout(8, 64, 1)),
        ("llama_8b", Layout(8, 8, 1)),
        ("llama_8b", Layout(1, 64, 1)),
        ("llama_8b", Layout(64, 8, 1)),
        ("llama_8b", Layout(8, 64, 1)),
    ],
    ids=str,
)
def test_owners_have_equal_work_and_send_little(model, layout):
    plan = plan_of_model(compose_config([f"model={model}", "stage=language"]).model, layout, "cuda")
    flops = plan.flops()
    costliest = max(cut.matrix_flops for cut in plan.cuts)
    assert max(flops) <= LARGEST_LOAD * max(sum(flops) / len(flops), costliest)
    shards = (
        sum(size_of(plan.piece(unit, place)) for unit in plan.units for place in range(plan.n_places)) / plan.n_places
    )
    ranks = {0, flops.index(max(flops)), flops.index(min(flops)), len(flops) - 1}
    assert max(plan.sent(rank) for rank in ranks) * 2 <= MOST_SENT * shards * 4  # bf16 beside fp32


def test_a_costly_matrix_does_not_keep_cheap_ones_together():
    cuts = [Cut((64, 256), (None, 0, None)), *[Cut((16, 8, 256), (None, 2, None))] * 4]
    plan = make_plan(cuts, Layout(1, 8, 1), 1 << 20, 0.0)
    assert max(plan.flops()) == cuts[0].matrix_flops
    assert sum(plan.flops()) == sum(cut.n_matrices * cut.matrix_flops for cut in cuts)


def test_a_bucket_has_at_most_the_entries_asked_for_or_one_unit():
    plan = plan_of(model_of((6, 3)), Layout(1, 2, 1), 0.0, bucket_entries=2_000)
    assert plan.n_buckets > 1
    sizes: Counter = Counter()
    largest = max(unit.n_matrices * plan.cuts[unit.parameter].matrix_size for unit in plan.units)
    for unit in plan.units:
        sizes[unit.owner, unit.bucket] += unit.n_matrices * plan.cuts[unit.parameter].matrix_size
    assert max(sizes.values()) < 2_000 + largest


def test_replicas_share_work_where_arithmetic_is_dearer_than_a_message():
    model = model_of((6, 3))
    assert plan_of(model, Layout(4, 2, 1), 0.0).shares_replicas
    assert not plan_of(model, Layout(4, 2, 1), 1e9).shares_replicas
    assert not plan_of(model, Layout(1, 2, 1), 0.0).shares_replicas


def uneven(n_matrices: int, layout: Layout, flops_per_entry: float = 0.0) -> Plan:
    """A plan for equal matrices, which ranks may hand on."""
    cuts = [Cut((16, 40), (None, 0, None))] * n_matrices
    return make_plan(cuts, layout, 1 << 20, flops_per_entry, hands_on=True)


@pytest.mark.parametrize(
    ("n_matrices", "layout", "iterations"),
    [(6, Layout(1, 4, 1), 8), (11, Layout(1, 8, 1), 7), (12, Layout(2, 4, 1), 8), (8, Layout(1, 4, 1), 10)],
    ids=str,
)
def test_a_rank_with_less_to_do_starts_a_matrix_of_its_replica(n_matrices, layout, iterations):
    """Finds owners with one matrix more than others, which wait for them."""
    plan = uneven(n_matrices, layout)
    cost = plan.cuts[0].matrix_flops
    assert max(plan.flops()) == iterations * cost // 5
    assert sum(plan.flops()) == n_matrices * cost
    started = [unit for unit in plan.units if unit.start]
    assert bool(started) == (n_matrices % layout.world_size > 0)
    for unit in plan.units:
        if unit.start:
            assert unit.start.place != unit.owner
        # Starts are sent with the steps of bucket 0, which come while bucket 1 is computed.
        assert unit.bucket >= (2 if unit.start else 1 if started else 0)

    sent = sum(plan.sent(rank) for rank in range(layout.dp_shard))
    if layout.dp_replicate == 1:
        # Shards to the rank that gathers them, but its own; the same for steps; a matrix for each start.
        assert sent == 2 * n_matrices * 640 * (layout.dp_shard - 1) // layout.dp_shard + len(started) * 640


def test_a_matrix_is_handed_on_only_where_that_saves_more_than_the_message_costs():
    cut = uneven(6, Layout(1, 4, 1)).cuts[0]
    saved_per_entry = 2 * cut.matrix_flops / 5 / cut.matrix_size
    assert any(unit.start for unit in uneven(6, Layout(1, 4, 1), 0.99 * saved_per_entry).units)
    assert not any(unit.start for unit in uneven(6, Layout(1, 4, 1), 1.01 * saved_per_entry).units)
