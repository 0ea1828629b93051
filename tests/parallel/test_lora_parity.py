"""Training adapters on any layout is training them in one process, and the frozen base keeps its bits."""

from typing import cast

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import AdaptedModelConfig
from dist_lm.config.stage import LoraConfig
from dist_lm.model.lora import adapter_of, change
from dist_lm.model.size import is_trained, parameter_shapes
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.parallel.values import fill, stream_weights, unsharded_copy
from tests.parallel.on_a_mesh import MeshTrajectory, rank_steps
from tests.parallel.one_process import entries_off, error, expected_of
from tests.parallel.parity_cases import layout_of, model_of, parallel_of
from tests.parallel.ranks import RankGroups
from tests.parallel.test_parity import ENTRY, GRADIENT, LOSS, UPDATED_ENTRY
from tests.parallel.training_task import BATCH, SEED, SEQ_LEN, batch_of, parameter_value

LORA = LoraConfig(rank=3, alpha=5.0)  # the rank divides by no number of ranks
STEPS = 3
CASES = [("1x1x1", (5, 5)), ("1x2x1", (5, 5)), ("1x1x2", (5, 5)), ("1x1x2+sp", (6, 3))]
MORE = [
    *(("1x4x1", (6, 3)), ("2x1x1", (4, 4)), ("2x2x1", (5, 5)), ("1x1x2", (4, 4)), ("1x1x4", (5, 1))),
    *(("1x1x4+sp", (6, 3)), ("1x2x2", (5, 5)), ("2x1x2", (4, 4)), ("1x2x2+sp", (6, 3))),
]


def adapted(heads: tuple[int, int], lora: LoraConfig = LORA, **changes) -> AdaptedModelConfig:
    return AdaptedModelConfig.of(model_of(heads, **changes), lora)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("layout", "heads"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.bars) for case in MORE)],
    ids=lambda value: str(value).replace(", ", "of"),
)
def test_steps_are_those_of_one_process(ranks: RankGroups, layout: str, heads: tuple[int, int]):
    ffn, mode = ("swiglu", "selective") if heads[0] != heads[1] else ("gelu", "none")
    model = adapted(heads, ffn=ffn)
    parallel = parallel_of(layout, activation_checkpointing=mode)
    found: MeshTrajectory = ranks.run(layout_of(layout).world_size, rank_steps, model, parallel, range(STEPS))
    expected = expected_of(model, STEPS)
    assert found.losses == pytest.approx(expected.losses, rel=LOSS)
    assert found.norms == pytest.approx(expected.norms, rel=LOSS)
    assert found.torn == found.dirty == set()
    once: MeshTrajectory = ranks.run(layout_of(layout).world_size, rank_steps, model, parallel, range(1))
    expected = expected_of(model, 1)
    assert entries_off(once.gradients, expected.gradients, ENTRY) == {}
    assert error(once.gradients, expected.gradients) < GRADIENT
    assert entries_off(once.end, expected.end, UPDATED_ENTRY) == {}
    assert all(is_trained(name, model) for name in once.gradients)


HEAVY = [
    pytest.param(layout, tied, marks=pytest.mark.bars) for layout in ("1x4x1", "1x2x2", "1x1x4") for tied in (0, 1)
]


@pytest.mark.heavy
@pytest.mark.parametrize(("layout", "tied"), [("1x2x1", 0), ("1x1x2+sp", 0), ("1x1x2", 1), *HEAVY])
def test_dropout_and_rows_of_tokens_do_not_depend_on_the_layout(ranks: RankGroups, layout: str, tied: bool):
    """Finds masks that follow the shard in place of the channel, and rows of tokens that are another rank's."""
    plain = model_of((5, 5), ffn="swiglu", tie_embeddings=bool(tied))
    ids = sorted(batch_of(plain, 0).tokens_BT.flatten().tolist())[:: BATCH * SEQ_LEN // 3][
        :3
    ]  # all over the vocabulary
    lora = LoraConfig(rank=3, alpha=5.0, rslora=True, dropout=0.2, tokens=list(map(str, ids)))
    model = AdaptedModelConfig.of(plain, lora)
    found: MeshTrajectory = ranks.run(layout_of(layout).world_size, rank_steps, model, parallel_of(layout), range(1))
    expected = expected_of(model)
    assert entries_off(found.gradients, expected.gradients, ENTRY) == {}
    assert entries_off(found.end, expected.end, UPDATED_ENTRY) == {}
    assert found.torn == found.dirty == set()
    for name in {"embedding.weight", "lm_head.weight"} & found.end.keys():
        shape = parameter_shapes(model)[name]
        changed = (found.end[name] != parameter_value(name, shape, model).numpy()).any(1).nonzero()[0]
        assert changed.tolist() == ids


@pytest.mark.parametrize("layout", ["1x1x1", "1x2x1", "1x1x2+sp"])
def test_a_scalar_head_is_trained_beside_adapters(ranks: RankGroups, layout: str):
    model = adapted((5, 5), LoraConfig(rank=2, targets=["query", "down"]), head="scalar")
    found: MeshTrajectory = ranks.run(layout_of(layout).world_size, rank_steps, model, parallel_of(layout), range(1))
    expected = expected_of(model)
    assert {"scalar_head.weight", "scalar_head.bias"} < found.gradients.keys()
    assert entries_off(found.gradients, expected.gradients, ENTRY) == {}
    assert entries_off(found.end, expected.end, UPDATED_ENTRY) == {}


def whole_and_streamed(world: World, model_config: AdaptedModelConfig, parallel: ParallelConfig) -> list[dict]:
    """The weights as sampling and as an engine get them (collective)."""
    mesh = build_mesh(resolve_layout(parallel, model_config, world.size), world.device)
    model = build_model(model_config, parallel, mesh, world.device, SEED)
    if parallel.cpu_offload:  # shards in host memory on the mesh of a GPU, to which no tensor can be moved here
        for parameter in model.parameters():
            cast(DTensor, parameter).device_mesh._device_type = "cuda"
    fill(model, model_config, lambda name, shape: parameter_value(name, shape, model_config))
    copy = unsharded_copy(model, model_config, torch.float32)
    streamed = dict(stream_weights(model, model_config, torch.float32, receives=world.is_first))
    return [{name: value.detach().numpy() for name, value in one.items()} for one in (copy.state_dict(), streamed)]


def merged_values(model: AdaptedModelConfig) -> dict[str, np.ndarray]:
    values = {name: parameter_value(name, shape, model) for name, shape in parameter_shapes(model).items()}
    for name in parameter_shapes(model.plain):
        factors = adapter_of(name)
        if f"{factors}a" in values:
            values[name] = values[name] + change(name, values[f"{factors}a"], values[f"{factors}b"], model.scale)
    return {name: values[name].numpy() for name in parameter_shapes(model.plain)}


@pytest.mark.heavy
@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
@pytest.mark.parametrize(
    ("layout", "heads"),
    [("1x1x1", (5, 5)), pytest.param("1x4x1", (6, 3), marks=pytest.mark.bars), ("1x2x2", (5, 1))],
)
def test_adapters_are_merged_into_the_weights_that_leave(
    ranks: RankGroups, layout: str, heads: tuple[int, int], offload: bool
):
    model = adapted(heads, ffn="swiglu")
    expected = merged_values(model)
    parallel = parallel_of(layout, cpu_offload=offload)
    found = ranks.run(layout_of(layout).world_size, whole_and_streamed, model, parallel)
    for weights in found:
        assert list(weights) == list(expected)
        assert entries_off(weights, expected, 1e-6) == {}
