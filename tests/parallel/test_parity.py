"""One training step on any layout is the step of one process: loss, every gradient, every parameter and moment.

The reference computes in float64, so all differences are rounding. fp32 in one process is off by up to 2e-6 of a
tensor's largest entry itself (key biases, whose parts cancel); a wrong factor or a forgotten sum by more than 1e-3.
"""

from dataclasses import replace
from itertools import combinations, product

import pytest

from dist_lm.config.model import ModelConfig
from dist_lm.config.stage import MuonConfig
from dist_lm.parallel.owners import make_plan, matrix_cuts
from dist_lm.training.muon import Arithmetic
from tests.model.option_rows import AFTER, ROWS, TOGETHER, OptionRow
from tests.parallel.on_a_mesh import MeshTrajectory, rank_steps
from tests.parallel.one_process import entries_off, error, expected_of
from tests.parallel.parity_cases import (
    CHOICES,
    DATA_LAYOUTS,
    HEADS,
    MIXED_LAYOUTS,
    SMALL,
    TENSOR_LAYOUTS,
    VOCAB_SIZE,
    Case,
    cases,
    layout_of,
    layouts,
    model_of,
    parallel_of,
    small_cases,
)
from tests.parallel.ranks import RankGroups

LOSS = 1e-5  # relative
GRADIENT = 1e-6  # of all parameters as one vector, relative
ENTRY = 5e-6  # of a tensor's gradient, relative to its largest entry
UPDATED_ENTRY = 1e-5  # the same after a step, where second moments are squares of gradients
ORTHOGONAL_ENTRY = 1e-3  # after two steps of Muon, which takes small singular values, rounding with them, to 1
CASES = cases()
SMALL_CASES = small_cases()


def assert_is_that_of_one_process(found: MeshTrajectory, model: ModelConfig) -> None:
    expected = expected_of(model)
    assert found.losses == pytest.approx(expected.losses, rel=LOSS)
    assert found.norms == pytest.approx(expected.norms, rel=GRADIENT)
    assert entries_off(found.gradients, expected.gradients, ENTRY) == {}
    assert error(found.gradients, expected.gradients) < GRADIENT
    assert entries_off(found.end, expected.end, UPDATED_ENTRY) == {}
    assert found.torn == found.dirty == set()


@pytest.mark.heavy
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=() if case in SMALL_CASES else pytest.mark.bars) for case in CASES],
)
def test_a_step_is_that_of_one_process(ranks: RankGroups, case: Case):
    found: MeshTrajectory = ranks.run(
        case.world_size, rank_steps, case.model, case.parallel, range(1), chunk_bytes=case.chunk_bytes
    )
    assert_is_that_of_one_process(found, case.model)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", layouts("1x1x1", "1x4x1", "1x1x2", "1x1x4+sp", "2x1x2", "1x2x2+sp"))
def test_a_step_of_a_scalar_head_is_that_of_one_process(ranks: RankGroups, layout: str):
    model = model_of((5, 5), head="scalar")
    found: MeshTrajectory = ranks.run(layout_of(layout).world_size, rank_steps, model, parallel_of(layout), range(1))
    assert_is_that_of_one_process(found, model)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", layouts("1x1x1", "1x4x1", "2x1x1", "1x1x2", "1x1x4+sp", "2x1x2", "1x2x2+sp"))
@pytest.mark.parametrize(
    "heads", [pytest.param((5, 5), id="padded heads", marks=pytest.mark.bars), pytest.param((6, 3), id="groups")]
)
def test_a_step_with_normalised_queries_and_keys_is_that_of_one_process(
    ranks: RankGroups, layout: str, heads: tuple[int, int]
):
    model = model_of(heads, qk_norm=True)
    found: MeshTrajectory = ranks.run(layout_of(layout).world_size, rank_steps, model, parallel_of(layout), range(1))
    assert_is_that_of_one_process(found, model)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", layouts("1x1x1", "1x4x1", "1x1x2", "1x1x4+sp", "2x1x2", "1x2x2+sp"))
def test_a_step_with_squared_relu_and_capped_logits_is_that_of_one_process(ranks: RankGroups, layout: str):
    model = model_of((5, 5), norm="rmsnorm", ffn="relu2", logit_cap=0.2)
    found: MeshTrajectory = ranks.run(
        layout_of(layout).world_size, rank_steps, model, parallel_of(layout), range(1), chunk_bytes=5 * 4 * VOCAB_SIZE
    )
    assert_is_that_of_one_process(found, model)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("row", "layout"),
    [
        *(pytest.param(ROWS[AFTER], layout, id=f"{AFTER}-{layout}") for layout in ("1x1x4+sp", "1x2x2+sp")),
        pytest.param(TOGETHER, "1x1x4+sp", id="all others together-1x1x4+sp"),
        *(
            pytest.param(row, layout, id=f"{name}-{layout}", marks=pytest.mark.bars)
            for name, row in ROWS.items()
            for layout in ("1x1x2", "1x1x4+sp", "1x2x2+sp")
        ),
    ],
)
@pytest.mark.parametrize("heads", [pytest.param((5, 5), id="padded heads"), pytest.param((6, 3), id="groups")])
def test_a_step_with_options_is_that_of_one_process(
    ranks: RankGroups, row: OptionRow, heads: tuple[int, int], layout: str
):
    model = model_of(heads, **row.changes_at(2))
    found: MeshTrajectory = ranks.run(layout_of(layout).world_size, rank_steps, model, parallel_of(layout), range(1))
    assert_is_that_of_one_process(found, model)


VALUE_RESIDUALS = [
    *(((5, 5), layout, "none") for layout in ("1x1x1", "1x4x1", "1x1x2", "2x1x2")),
    ((5, 5), "1x1x4+sp", "selective"),  # a rank that holds nothing but padding
    ((5, 5), "1x2x2+sp", "full"),
    ((6, 3), "1x1x4+sp", "full"),  # every rank holds all key heads
    ((6, 3), "1x2x2", "selective"),
]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("heads", "layout", "checkpointing"),
    [pytest.param(*row, marks=() if row[1] in SMALL else pytest.mark.bars) for row in VALUE_RESIDUALS],
)
def test_a_step_with_value_residuals_is_that_of_one_process(
    ranks: RankGroups, heads: tuple[int, int], layout: str, checkpointing: str
):
    model = model_of(heads, value_residual=True, qk_norm=True)
    parallel = parallel_of(layout, activation_checkpointing=checkpointing)
    found: MeshTrajectory = ranks.run(layout_of(layout).world_size, rank_steps, model, parallel, range(1))
    assert_is_that_of_one_process(found, model)


def assert_orthogonal_steps_are_those_of_one_process(
    ranks: RankGroups,
    layout: str,
    model: ModelConfig,
    muon: MuonConfig,
    steps: int,
    arithmetic: Arithmetic | None = None,
) -> None:
    found: MeshTrajectory = ranks.run(
        layout_of(layout).world_size,
        rank_steps,
        model,
        parallel_of(layout),
        range(steps),
        muon=muon,
        arithmetic=arithmetic,
    )
    expected = expected_of(model, steps, muon)
    assert found.losses == pytest.approx(expected.losses, rel=LOSS)
    assert entries_off(found.end, expected.end, ORTHOGONAL_ENTRY) == {}
    assert found.torn == found.dirty == set()


@pytest.mark.heavy
@pytest.mark.parametrize("layout", layouts("1x1x1", "1x4x1", "4x1x1", "1x1x2", "1x1x4+sp", "2x1x2", "1x2x2+sp"))
@pytest.mark.parametrize(
    "heads",
    [pytest.param((5, 5), id="padded heads"), pytest.param((4, 4), id="whole heads", marks=pytest.mark.bars)],
)
def test_orthogonal_steps_are_those_of_one_process(ranks: RankGroups, layout: str, heads: tuple[int, int]):
    assert_orthogonal_steps_are_those_of_one_process(ranks, layout, model_of(heads), MuonConfig(lr=0.02), 2)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", layouts("1x1x1", "1x4x1", "1x1x2", "1x1x4+sp", "2x1x2", "1x2x2+sp"))
def test_normalised_orthogonal_steps_at_the_rate_of_adamw_are_those_of_one_process(ranks: RankGroups, layout: str):
    options = {"norm": "rmsnorm", "ffn": "swiglu", "bias": False, "value_residual": True}
    model = model_of((5, 5), **options, base_width=20)
    muon = MuonConfig(lr=None, scale="adamw", variance_beta=0.9, weight_decay=0.2)
    assert_orthogonal_steps_are_those_of_one_process(ranks, layout, model, muon, 2)


@pytest.mark.heavy
@pytest.mark.parametrize("flops_per_byte", [0.0, 1e12], ids=["shared", "apart"])
@pytest.mark.parametrize("layout", layouts("2x2x1", "1x2x2+sp", "2x1x2", "4x1x1", "2x2x2+sp"))
def test_orthogonal_steps_in_many_messages_are_those_of_one_process(
    ranks: RankGroups, layout: str, flops_per_byte: float
):
    model, muon = model_of((6, 3)), MuonConfig(lr=0.02, variance_beta=0.9)
    arithmetic = Arithmetic(None, by_squares=True, flops_per_byte=flops_per_byte, bucket_bytes=8_000)
    assert_orthogonal_steps_are_those_of_one_process(ranks, layout, model, muon, 2, arithmetic)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", layouts("1x4x1", "2x2x1", "1x2x2+sp"))
def test_matrices_that_ranks_hand_on_take_the_steps_of_one_process(ranks: RankGroups, layout: str):
    """Finds a matrix that its owner normalises again, finishes with too few iterations, or takes for another."""
    model = replace(model_of((6, 3)), n_layers=3)  # 6 costly matrices for 4 ranks
    cuts = matrix_cuts(model, layout_of(layout))
    assert any(unit.start for unit in make_plan(cuts, layout_of(layout), 2_000, 0.0, hands_on=True).units)

    muon = MuonConfig(lr=0.02, variance_beta=0.9)
    arithmetic = Arithmetic(None, by_squares=False, flops_per_byte=1e-6, bucket_bytes=8_000)
    assert_orthogonal_steps_are_those_of_one_process(ranks, layout, model, muon, 2, arithmetic)


def test_any_two_values_of_two_choices_meet_in_the_small_size():
    met = set()
    for case in SMALL_CASES:
        met.update(combinations(case.choices.items(), 2))
    for first, second in combinations(CHOICES, 2):
        for pair in product(CHOICES[first], CHOICES[second]):
            assert ((first, pair[0]), (second, pair[1])) in met, (first, second, pair)
    assert {case.layout for case in SMALL_CASES} == {*DATA_LAYOUTS, *TENSOR_LAYOUTS, *MIXED_LAYOUTS}
    assert {case.heads for case in SMALL_CASES} == set(HEADS)


def test_any_two_values_of_two_choices_meet_in_the_matrix():
    met = set()
    for case in CASES:
        met.update(combinations((("layout", case.layout), ("heads", case.heads), *case.choices.items()), 2))
    wanted = {"layout": (*DATA_LAYOUTS, *TENSOR_LAYOUTS, *MIXED_LAYOUTS), "heads": HEADS} | CHOICES
    for first, second in combinations(wanted, 2):
        firsts = TENSOR_LAYOUTS if (first, second) == ("layout", "heads") else wanted[first]
        for pair in product(firsts, wanted[second]):
            assert ((first, pair[0]), (second, pair[1])) in met, (first, second, pair)
