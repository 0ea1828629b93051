"""25 heads over 2, 4 and 8 ranks, as a whole run: the curve of one rank, and the same from any layout to any other.

The model has nano's width for 25 heads, with few layers and pieces.
"""

import pytest

from dist_lm.model.size import GROUPS
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from tests.training_run import STEPS, copy_until, linked, numbers, prepare, tolerance, train

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]

MODEL = (
    "model.n_heads=25",
    "model.d_model=200",
    "model.d_ff=90",
    # at nano's own rates the loss of this model jumps, and differences of rounding grow with it
    "stage.lr=3e-3",
    "stage.muon.lr=0.02",
    "stage.schedule=cosine",
    "stage.min_lr_ratio=0.1",
    "stage.warmup_steps=20",
    "stage.z_loss=1e-4",
    "stage.micro_batch=4",
)
HALF = STEPS // 2
COMPARED = (
    *("train/loss", "train/grad_norm", "train/tokens", "train/update_ratio", "val/loss", "val/bits_per_byte"),
    *(f"train/grad_norm_{group}" for group in GROUPS),
)


def layout(dp_shard: int, tp: int) -> tuple[str, str]:
    return f"parallel.dp_shard={dp_shard}", f"parallel.tp={tp}"


@pytest.fixture(scope="module")
def two_by_two(tiny_work: WorkDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    work = linked(tiny_work, tmp_path_factory.mktemp("two_by_two"))
    run = prepare(work, "same", *MODEL, *layout(2, 2), "stage.keep_checkpoints=9")
    train(run, ranks=4)
    return run


def assert_same_curve(run: RunDirectory, reference: RunDirectory) -> None:
    expected, found = numbers(reference), numbers(run)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step, line in expected.items():
        for key in COMPARED:
            if key in line:
                assert found[step][key] == pytest.approx(line[key], rel=tolerance(key)), (step, key)


@pytest.mark.parametrize(
    ("tp", "switches"),
    [
        pytest.param(1, (), marks=pytest.mark.bars),
        pytest.param(2, ("parallel.activation_checkpointing=selective",), marks=pytest.mark.bars),
        (4, ("parallel.sp=true", "parallel.activation_checkpointing=full")),
        pytest.param(8, (), marks=pytest.mark.bars),
    ],
)
def test_the_curve_does_not_depend_on_tensor_parallelism(two_by_two, tiny_work, tmp_path, tp, switches):
    run = prepare(linked(tiny_work, tmp_path), "other", *MODEL, *layout(1, tp), *switches)
    train(run, tp)
    assert_same_curve(run, two_by_two)
    assert {path.name for path in run.samples.iterdir()} == {path.name for path in two_by_two.samples.iterdir()}


@pytest.mark.parametrize(
    ("dp_shard", "tp"), [pytest.param(1, 1, marks=pytest.mark.bars), (4, 1), pytest.param(1, 4, marks=pytest.mark.bars)]
)
def test_a_run_stopped_half_way_continues_on_another_layout(two_by_two, tiny_work, tmp_path, dp_shard, tp):
    run = linked(tiny_work, tmp_path).run("language", "same")
    copy_until(two_by_two, run, step=HALF)
    prepare(run.work, "same", *MODEL, *layout(dp_shard, tp))
    train(run, dp_shard * tp)
    before, after = numbers(two_by_two), numbers(run)
    assert all(after[step] == before[step] for step in range(1, HALF + 1)), "it started anew"
    assert_same_curve(run, two_by_two)
