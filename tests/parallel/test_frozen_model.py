"""A model that is never trained is stored in the compute dtype: it computes the bits of one with fp32 masters."""

from pathlib import Path

import pytest
import torch

from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model, reshard
from dist_lm.parallel.values import shard_of, stream_weights
from dist_lm.training import checkpoint, checkpoint_saver
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState
from tests.parallel.parity_cases import layout_of, model_of, parallel_of
from tests.parallel.ranks import RankGroups
from tests.parallel.training_task import SEED, STAGE, batch_of

MODEL = model_of((25, 25))


def outcomes(world: World, layout: str, dtype: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    """(Log-probabilities, whole weights, own bytes) with masters and frozen: as initialised, and from a checkpoint."""
    parallel = parallel_of(layout, compute_dtype=dtype)
    mesh = build_mesh(resolve_layout(parallel, MODEL, world.size), world.device)
    compute = torch.bfloat16 if dtype == "bf16" else torch.float32
    batch = batch_of(MODEL, 0)

    saved = build_model(MODEL, parallel, mesh, world.device, SEED + 1)
    tensors = checkpoint.tensors_of(saved, build_optimizer(saved, STAGE), MODEL)
    start = checkpoint_saver.write(folder, tensors, TrainState(step=1), MODEL, world)

    results = []
    for is_loaded in (False, True):
        for frozen in (False, True):
            model = build_model(MODEL, parallel, mesh, world.device, SEED, frozen=frozen)
            if is_loaded:
                checkpoint.load_weights(start, model, MODEL)
            with torch.no_grad():
                logprob_BT = model.logprobs(batch, 1.0).logprob_BT
            reshard(model)
            weights = {f"weight {name}": value for name, value in stream_weights(model, MODEL, compute, receives=True)}
            own_bytes = torch.tensor(sum(shard_of(parameter).nbytes for parameter in model.parameters()))
            results.append({"logprob": logprob_BT.clone(), "bytes": own_bytes, **weights})
    return results


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("1x1x1", "bf16"),
        pytest.param("1x2x1", "bf16", marks=pytest.mark.heavy),
        pytest.param("1x2x2", "bf16", marks=pytest.mark.heavy),
        pytest.param("1x2x1", "fp32", marks=pytest.mark.heavy),
    ],
)
def test_a_frozen_model_computes_what_one_with_masters_does(ranks: RankGroups, tmp_path: Path, layout: str, dtype: str):
    """Finds a weight of the reference that is rounded twice, or stays in fp32."""
    results = ranks.run(layout_of(layout).world_size, outcomes, layout, dtype, tmp_path / "start")
    for with_masters, frozen in (results[:2], results[2:]):
        assert int(with_masters["bytes"]) == int(frozen["bytes"]) * (2 if dtype == "bf16" else 1)
        names = [name for name in with_masters if name != "bytes"]
        assert [name for name in names if not torch.equal(with_masters[name], frozen[name])] == []
    assert not torch.equal(results[1]["logprob"], results[3]["logprob"])
