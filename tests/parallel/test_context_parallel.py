"""Ranks that share the tokens of sequences take the step of one process."""

from typing import Any, cast

import pytest
import torch

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import ModelConfig
from dist_lm.config.stage import LoraConfig, MuonConfig
from dist_lm.data.batch import Batch
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Block, Transformer
from dist_lm.parallel.context_axis import dealt_heads
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import arrange_model
from dist_lm.training.objective import next_token
from tests.model.option_rows import AFTER, ROWS, TOGETHER
from tests.parallel.on_a_mesh import MeshTrajectory, rank_steps
from tests.parallel.parity_cases import layout_of, model_of, parallel_of
from tests.parallel.ranks import RankGroups
from tests.parallel.test_lora_parity import adapted
from tests.parallel.test_parity import assert_is_that_of_one_process, assert_orthogonal_steps_are_those_of_one_process

LAYOUTS = ("1x1x1x2", "1x1x1x4", "1x1x2x2", "1x1x2x2+sp", "1x2x1x2", "2x1x1x2", "1x1x4x2")
"""dp_replicate x dp_shard x tp x cp."""


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 5])
def test_heads_are_dealt_out_evenly(n_ranks: int):
    dealt = dealt_heads(5, n_ranks)
    assert [head for heads in dealt for head in heads] == [0, 1, 2, 3, 4]
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def small(layout: str, heads: tuple[int, int]) -> bool:
    return (layout, heads) in (("1x1x1x2", (5, 5)), ("1x1x2x2+sp", (25, 5)))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("layout", "heads"),
    [
        pytest.param(layout, heads, marks=() if small(layout, heads) else pytest.mark.bars)
        for layout in LAYOUTS
        for heads in ((25, 25), (25, 5), (5, 5), (5, 1), (6, 3))
    ],
)
def test_a_step_is_that_of_one_process(ranks: RankGroups, layout: str, heads: tuple[int, int]):
    """Finds tokens, heads, positions, masks, dropout or loss counts of another rank, and gradients summed twice."""
    found: MeshTrajectory = ranks.run(
        layout_of(layout).world_size, rank_steps, model_of(heads), parallel_of(layout), range(1)
    )
    assert_is_that_of_one_process(found, model_of(heads))


VARIANTS: dict[str, dict[str, Any]] = {
    "value residuals": {"value_residual": True, "qk_norm": True},
    "scores": {"head": "scalar"},
    "one part of the logits at a time": {"logit_cap": 0.2, "ffn": "relu2", "norm": "rmsnorm"},
    **{name: row.changes_at(2) for name, row in ROWS.items() if name in (AFTER, "window", "window of some layers")},
    "others": TOGETHER.changes_at(2),
}


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["1x1x1x2", pytest.param("1x1x2x2+sp", marks=pytest.mark.bars)])
@pytest.mark.parametrize(
    ("variant", "heads"),
    [
        pytest.param(
            name, heads, marks=() if (name, heads) in (("window", (5, 5)), (AFTER, (6, 3))) else pytest.mark.bars
        )
        for name in VARIANTS
        for heads in ((5, 5), (6, 3))
    ],
)
def test_a_step_with_options_is_that_of_one_process(
    ranks: RankGroups, layout: str, variant: str, heads: tuple[int, int]
):
    model = model_of(heads, **VARIANTS[variant])
    chunk_bytes = 5 * 4 * model.vocab_size if model.head == "tokens" else 0
    found: MeshTrajectory = ranks.run(
        layout_of(layout).world_size, rank_steps, model, parallel_of(layout), range(1), chunk_bytes=chunk_bytes
    )
    assert_is_that_of_one_process(found, model)


@pytest.mark.heavy
@pytest.mark.parametrize("mode", ["selective", pytest.param("full", marks=pytest.mark.bars)])
def test_what_is_computed_again_is_the_same(ranks: RankGroups, mode: str):
    """Finds an exchange that the backward pass repeats on some ranks only, or of other heads."""
    model = model_of((5, 5))
    parallel = parallel_of("1x1x1x2", activation_checkpointing=mode, reduce_every_micro_batch=True)
    assert_is_that_of_one_process(ranks.run(2, rank_steps, model, parallel, range(1)), model)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["1x1x1x2", pytest.param("1x1x2x2+sp", marks=pytest.mark.bars)])
def test_adapters_with_dropout_are_trained_as_in_one_process(ranks: RankGroups, layout: str):
    """Finds masks of adapters' inputs that begin anew on each rank."""
    model = adapted((5, 5), LoraConfig(rank=3, alpha=5.0, dropout=0.2), ffn="swiglu")
    found: MeshTrajectory = ranks.run(layout_of(layout).world_size, rank_steps, model, parallel_of(layout), range(1))
    assert_is_that_of_one_process(found, model)


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["1x1x1x2", pytest.param("1x2x1x2", marks=pytest.mark.bars)])
def test_orthogonal_steps_are_those_of_one_process(ranks: RankGroups, layout: str):
    muon = MuonConfig(lr=0.02, variance_beta=0.9)
    assert_orthogonal_steps_are_those_of_one_process(ranks, layout, model_of((5, 5)), muon, 2)


LENGTHS = (137, 2041, 89)
"""Tokens of the documents of a sequence, of which no border is one of a rank's tokens; then one of 5 tokens."""
LONG = 4 * 568


def long_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 515, (1, LONG + 1), generator=generator)
    ends = torch.tensor(LENGTHS).cumsum(0)
    document_T = (torch.arange(LONG)[:, None] >= ends[None]).sum(1)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    return Batch(
        tokens_BT=tokens[:, :-1],
        targets_BT=tokens[:, 1:],
        loss_mask_BT=(torch.rand(1, LONG, generator=generator) < 0.9).float(),
        document_BT=document_T[None],
        position_BT=(torch.arange(LONG) - starts[document_T])[None],
        sequence_B=torch.zeros(1, dtype=torch.int64),
    )


def loss_and_gradients(model: Transformer) -> tuple[float, dict[str, torch.Tensor]]:
    loss = next_token()(model, long_batch())
    loss.total.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad
    return float(loss.total.detach() / loss.count), gradients


def in_float64(world: World, model_config: ModelConfig, parallel: ParallelConfig) -> tuple[float, dict[str, Any]]:
    """Loss and whole gradients of the long batch (collective)."""
    layout = resolve_layout(parallel, model_config, world.size)
    mesh = build_mesh(layout, world.device)
    model = Transformer(model_config).double()
    initialise(model, 0)
    arranged = arrange_model(model_config, parallel, mesh, world.device, exchange=False)
    model.token_axis = arranged.token_axis
    for block, other in zip(model.blocks, arranged.blocks, strict=True):
        cast(Block, block).attention.attend = cast(Block, other).attention.attend
    loss, gradients = loss_and_gradients(model)
    for gradient in gradients.values():
        torch.distributed.all_reduce(gradient)
    return loss, {name: gradient.numpy() for name, gradient in gradients.items()}


@pytest.mark.heavy
@pytest.mark.parametrize("cp", [4, pytest.param(2, marks=pytest.mark.bars)])
@pytest.mark.parametrize("heads", [(25, 5), pytest.param((25, 25), marks=pytest.mark.bars)])
def test_long_documents_in_float64(ranks: RankGroups, cp: int, heads: tuple[int, int]):
    """Finds any error but rounding, over documents whose borders are on no rank's border."""
    model_config = model_of(heads)
    loss, gradients = ranks.run(cp, in_float64, model_config, parallel_of(f"1x1x1x{cp}"))
    reference = Transformer(model_config).double()
    initialise(reference, 0)
    expected_loss, expected = loss_and_gradients(reference)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert float((torch.from_numpy(gradients[name]) - gradient).abs().max()) < 1e-9 * scale, name
