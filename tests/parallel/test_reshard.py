"""What one layout saved, another continues: the same bits after loading, the same steps after that, and no padding."""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from dist_lm.config.stage import MuonConfig
from dist_lm.model.size import is_matrix
from dist_lm.parallel.layout import placements
from dist_lm.parallel.owners import make_plan, matrix_cuts
from dist_lm.training import checkpoint_files
from dist_lm.training.muon import Arithmetic
from dist_lm.training.optimizer import VARIANCE
from tests.parallel.on_a_mesh import MeshTrajectory, rank_steps
from tests.parallel.one_process import entries_off, expected_of
from tests.parallel.parity_cases import layout_of, model_of, parallel_of
from tests.parallel.ranks import RankGroups

STEPS = 3
LOSS = 1e-5  # relative
AFTER_STEPS = 2e-5  # largest difference in a tensor after STEPS + 1 steps, relative to its own largest entry
MODELS = {
    "25 heads": model_of((25, 25)),
    "6 heads, 3 key heads": model_of(
        (6, 3), norm="rmsnorm", ffn="swiglu", bias=False, tie_embeddings=True, qk_norm=True, value_residual=True
    ),
}
SMALL_MOVES = [  # between them every axis is joined, cut and exchanged for another one
    ("25 heads", "1x1x2x2", "1x1x1"),
    ("25 heads", "1x4x1", "1x1x2+sp"),
    ("6 heads, 3 key heads", "1x1x4+sp", "2x2x1"),
]
MOVES = [
    *SMALL_MOVES,
    ("25 heads", "1x2x2", "1x1x1"),
    ("25 heads", "1x1x1x2", "1x1x1x4"),
    ("25 heads", "1x2x2", "1x4x1"),
    ("25 heads", "1x2x2", "1x1x4"),
    ("25 heads", "1x1x1", "1x1x8"),
    ("25 heads", "1x1x8", "2x1x2"),
    ("6 heads, 3 key heads", "1x2x2", "1x1x4"),
]
TENSOR_PARALLEL = sorted({(model, layout) for model, layout, _ in MOVES if layout_of(layout).tp > 1})


SMALL_TENSOR_PARALLEL = {(model, layout) for model, layout, _ in SMALL_MOVES}


def marked(rows: Iterable[tuple[str, ...]], small: Collection[tuple[str, ...]]) -> list:
    """Parameters for tests: those not in `small` are run at length."""
    return [pytest.param(*row, marks=() if row in small else pytest.mark.bars) for row in rows]


@dataclass(frozen=True)
class Saved:
    trajectory: MeshTrajectory
    checkpoint: Path


@pytest.fixture(scope="module")
def saved(ranks: RankGroups, tmp_path_factory: pytest.TempPathFactory):
    """(model, layout) -> STEPS steps and their checkpoint; each once."""
    done: dict[tuple[str, str], Saved] = {}

    def at(model: str, layout: str) -> Saved:
        if (model, layout) not in done:
            folder = tmp_path_factory.mktemp("checkpoints")
            trajectory = ranks.run(
                layout_of(layout).world_size, rank_steps, MODELS[model], parallel_of(layout), range(STEPS), save=folder
            )
            done[model, layout] = Saved(trajectory, folder / checkpoint_files.step_name(STEPS))
        return done[model, layout]

    return at


@pytest.mark.heavy
@pytest.mark.parametrize(("model", "source", "target"), marked(MOVES, SMALL_MOVES))
def test_another_layout_loads_the_same_bits_and_takes_the_same_step(ranks, saved, model, source, target):
    before: Saved = saved(model, source)
    after: MeshTrajectory = ranks.run(
        layout_of(target).world_size,
        rank_steps,
        MODELS[model],
        parallel_of(target),
        range(STEPS, STEPS + 1),
        load=before.checkpoint,
    )
    assert after.start.keys() == before.trajectory.end.keys()
    assert [name for name, value in after.start.items() if not np.array_equal(value, before.trajectory.end[name])] == []
    expected = expected_of(MODELS[model], STEPS + 1)
    assert [*before.trajectory.losses, *after.losses] == pytest.approx(expected.losses, rel=LOSS)
    assert entries_off(after.end, expected.end, AFTER_STEPS) == {}
    assert after.torn == after.dirty == set()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("source", "target"), [("1x1x2", "1x4x1"), pytest.param("1x2x2", "1x1x4", marks=pytest.mark.bars)]
)
def test_another_layout_continues_with_normalised_orthogonal_steps(ranks, tmp_path, source, target):
    model, muon = MODELS["6 heads, 3 key heads"], MuonConfig(lr=0.02, variance_beta=0.9)
    before: MeshTrajectory = ranks.run(
        layout_of(source).world_size, rank_steps, model, parallel_of(source), range(2), save=tmp_path, muon=muon
    )
    path = tmp_path / checkpoint_files.step_name(2)
    after: MeshTrajectory = ranks.run(
        layout_of(target).world_size, rank_steps, model, parallel_of(target), range(2, 3), load=path, muon=muon
    )
    assert {name for name in after.start if name.endswith(VARIANCE)} == {
        f"{name}.{VARIANCE}" for name in after.start if is_matrix(name)
    }
    assert [name for name, value in after.start.items() if not np.array_equal(value, before.end[name])] == []
    assert after.losses == pytest.approx(expected_of(model, 3, muon).losses[2:], rel=LOSS)


@pytest.mark.heavy
@pytest.mark.parametrize("cpu_offload", [False, pytest.param(True, marks=pytest.mark.bars)])
@pytest.mark.parametrize("layout", ["1x4x1", pytest.param("2x2x1", marks=pytest.mark.bars)])
def test_a_run_whose_ranks_hand_matrices_on_goes_on_to_the_same_bits(ranks, tmp_path, layout, cpu_offload):
    """Finds variances that a checkpoint takes from the rank that starts a matrix, not from its owner, which keeps them.

    With `cpu_offload` FSDP has its policy for shards in host memory; on a CPU no shard moves to another device."""
    model = replace(MODELS["6 heads, 3 key heads"], n_layers=3)  # costly matrices that 4 ranks cannot share evenly
    cuts = matrix_cuts(model, layout_of(layout))
    assert any(unit.start for unit in make_plan(cuts, layout_of(layout), 2_000, 0.0, hands_on=True).units)
    arithmetic = Arithmetic(None, by_squares=False, flops_per_byte=1e-6, bucket_bytes=8_000)
    options = {"muon": MuonConfig(lr=0.02, variance_beta=0.9), "arithmetic": arithmetic}
    n_ranks, parallel = layout_of(layout).world_size, parallel_of(layout, cpu_offload=cpu_offload)

    whole: MeshTrajectory = ranks.run(n_ranks, rank_steps, model, parallel, range(4), **options)
    ranks.run(n_ranks, rank_steps, model, parallel, range(2), save=tmp_path, **options)
    path = tmp_path / checkpoint_files.step_name(2)
    resumed: MeshTrajectory = ranks.run(n_ranks, rank_steps, model, parallel, range(2, 4), load=path, **options)

    assert resumed.losses == whole.losses[2:]
    assert resumed.end.keys() == whole.end.keys()
    assert [name for name, value in whole.end.items() if not np.array_equal(value, resumed.end[name])] == []


@pytest.mark.parametrize(("model", "layout"), marked(TENSOR_PARALLEL, SMALL_TENSOR_PARALLEL))
def test_padding_is_still_zero_after_several_steps(saved, model, layout):
    trajectory: MeshTrajectory = saved(model, layout).trajectory
    where = placements(MODELS[model], layout_of(layout))
    padded = {name for name, place in where.items() if place.padded != place.logical}
    assert "embedding.weight" in padded
    assert ("blocks.0.attention.query" in padded) == (model == "25 heads" or layout_of(layout).tp == 4)
    assert trajectory.padded == {name + suffix for name in padded for suffix in ("", ".exp_avg", ".exp_avg_sq")}
    assert trajectory.dirty == set()


@pytest.mark.parametrize(("model", "layout"), marked(TENSOR_PARALLEL, SMALL_TENSOR_PARALLEL))
def test_no_file_of_a_checkpoint_holds_padding(saved, model, layout):
    logical = {name: place.logical for name, place in placements(MODELS[model], layout_of("1x1x1")).items()}
    entries = dict.fromkeys(logical, 0)
    for name, offsets, shape in parts_in(saved(model, layout).checkpoint):
        kind, _, name = name.partition(".")
        if kind != "model":
            continue
        assert all(start + size <= whole for start, size, whole in zip(offsets, shape, logical[name], strict=True))
        entries[name] += int(np.prod(shape))
    assert entries == {name: int(np.prod(shape)) for name, shape in logical.items()}


def parts_in(checkpoint: Path) -> set[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(tensor, offsets, shape) of everything in the headers of the files."""
    parts = set()
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        sharding = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
        for name, entry in header.items():
            parts.add((name, tuple(sharding[name]["saved_offsets"]), tuple(entry["shape"])))
    return parts
