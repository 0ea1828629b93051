"""A step of training at the widths of `large` on fake CUDA tensors: devices, messages, copies and waits."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dist_lm.config.root import Config
from dist_lm.data.evaluation_batches import EvaluationBatch
from dist_lm.dry_run.watch import LiveMemory, Watch
from dist_lm.parallel.layout import placements, resolve_layout
from dist_lm.parallel.values import shard_of
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.layout import with_layout
from dist_lm.training.objective import summed_losses
from dist_lm.training.optimizer import VARIANCE
from tests.cuda.card import CARD, Played, Traffic, played, stand_in, text

pytestmark = pytest.mark.cuda

LAYERS = 4
UNITS = LAYERS + 2  # of FSDP: the blocks, the embedding, the head with the final norm
LAYOUTS = {
    "fsdp-8": (8, ("parallel=fsdp",)),
    "hsdp-64": (64, ("parallel=hsdp", "parallel.dp_shard=8")),
    "tp-2": (8, ("parallel=fsdp_tp", "parallel.tp=2")),
    "tp-2-sp": (8, ("parallel=fsdp_tp", "parallel.tp=2", "parallel.sp=true")),
    "cp-4": (8, ("parallel=fsdp", "parallel.cp=4")),
}


@pytest.fixture
def explicit(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of `torch.cuda` that wait for the card."""
    return stand_in(monkeypatch)


def config_of(*overrides: str, stage: str = "language", layers: int = LAYERS) -> Config:
    model = (f"stage={stage}", "model=large", f"model.n_layers={layers}", "hardware=h100", "device=cuda")
    batch = ("stage.seq_len=4096", "stage.micro_batch=4", "stage.global_batch=64", "parallel.compile=never")
    return compose_config([*model, *batch, *overrides])


def check_devices(run: Played, device: str = "cuda") -> None:
    state = [tensor for moments in run.trainer.optimizer.state.values() for tensor in moments.values()]
    held = [shard_of(tensor).device.type for tensor in [*run.trainer.model.parameters(), *state]]
    assert set(held) == {device}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "resharded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_messages_of_two_micro_batches(explicit, layout, kept):
    ranks, overrides = LAYOUTS[layout]
    config = config_of(*overrides, f"parallel.reshard_after_forward={not kept}")
    shape = resolve_layout(config.parallel, config.model, ranks)
    gathered = sum(place.gathered(shape) for place in placements(config.model, shape).values())
    with played(config, ranks) as run:
        traffic = run.watched_step(2)
        check_devices(run)
    messages, sent = traffic.messages, traffic.sent
    # blocks that are freed are gathered for both passes of both micro-batches
    assert messages["all_gather", "dp_shard"] == (UNITS if kept else UNITS + 3 * LAYERS)
    assert sent["all_gather", "dp_shard"] == 2 * gathered or not kept
    assert messages["reduce_scatter", "dp_shard"] == UNITS
    assert sent["reduce_scatter", "dp_shard"] == 4 * gathered
    assert messages["all_reduce", "dp_replicate"] == (UNITS if shape.dp_replicate > 1 else 0)
    one_axis = layout in ("fsdp-8", "cp-4")  # which has all ranks
    assert messages["all_reduce", "dp_shard" if one_axis else "world"] == 1  # what ranks must agree on
    # queries, keys, values and outputs of each block, forward and backward, in two micro-batches
    assert messages["all_to_all", "cp"] == (2 * LAYERS * 8 if shape.cp > 1 else 0)
    in_blocks = {"tp-2": {"all_reduce": 36}, "tp-2-sp": {"all_gather": 52, "reduce_scatter": 36}}.get(layout, {})
    for kind, count in in_blocks.items():
        assert messages[kind, "tp"] == count + (layout == "tp-2")  # one for partial gradients


@pytest.mark.parametrize(
    ("overrides", "waits", "uploads"),
    [
        ((), {}, {"pinned": 14}),
        (("stage.dropout=0.1",), {}, {"pinned": 14}),
        (("stage.muon.lr=0.02",), {}, {"pinned": 14}),
        (("parallel.activation_checkpointing=selective",), {}, {"pinned": 14}),
        (("parallel.activation_checkpointing=full", "stage.dropout=0.1"), {}, {"pinned": 14}),
        # every gradient goes to the host, every parameter comes from it for each of 5 gathers, and the norms come back;
        # the host, which computes the step, reads the factor of clipping and the decision
        (("parallel.cpu_offload=true",), {"device to host": 70}, {"pinned": 274, "pageable": 1}),
    ],
    ids=["plain", "dropout", "muon", "selective", "full", "offload"],
)
def test_copies_and_waits_of_a_step(explicit, overrides, waits, uploads):
    """The tensors of a micro-batch are copied beside the computation, and the host waits once: for the step's sums."""
    config = config_of(*overrides)
    with played(config, 8) as run:
        for _ in range(2):
            explicit.clear()
            traffic = run.watched_step(2)
            assert dict(traffic.waits) == waits
            assert dict(traffic.uploads) == uploads
            assert explicit["tolist"] == 1
            # gradients are waited for by events, the factor and the decision when they are copied
            blocking = 2 if config.parallel.cpu_offload else 0
            assert explicit.total() == 1 + waits.get("device to host", 0) - blocking
        check_devices(run, "cpu" if config.parallel.cpu_offload else "cuda")


@pytest.mark.parametrize("muon", ["stage.muon.lr=0", "stage.muon.lr=0.02"], ids=["adamw", "muon"])
@pytest.mark.parametrize("ranks", [1, 8])
def test_the_host_waits_for_nothing_before_the_optimizer_has_been_queued(explicit, ranks, muon):
    """A norm read on the host stops the card between backward pass and optimizer in every step."""
    config = config_of(muon, "stage.muon.variance_beta=0.9", "parallel=fsdp", layers=1)
    with played(config, ranks) as run:
        batches = run.batches(2)
        with Watch(), Traffic(run.axes) as traffic:
            waited: list[int] = []
            run.trainer.optimizer.register_step_post_hook(
                lambda *_: waited.append(explicit.total() + traffic.waits.total())
            )
            run.step(batches)
    assert waited == [0]
    assert explicit == {"tolist": 1}


class Casts(TorchDispatchMode):
    """Counts the copies of fp32 tensors of one size to bf16."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **kwargs or {})
        if func is torch.ops.aten._to_copy.default and args[0].numel() == self.numel:
            self.count += (args[0].dtype, result.dtype) == (torch.float32, torch.bfloat16)
        return result


@pytest.mark.parametrize(("memory_gib", "casts_a_step"), [(80, 1), (1, 6)], ids=["room", "no room"])
def test_one_gpu_casts_a_block_once_a_step(explicit, memory_gib, casts_a_step):
    """Three micro-batches: where memory is short, each casts every block for its forward and its backward pass."""
    config = with_layout(config_of(f"hardware.memory_gib={memory_gib}", layers=2), 1)
    with played(config, 1) as run:
        model = run.trainer.model
        batches = run.batches(3)
        with Watch(), Casts(model.blocks[0].attention.query.numel()) as casts:
            run.step(batches)
    projections = 4 * len(model.blocks)  # of one size
    assert casts.count == casts_a_step * projections


@pytest.mark.parametrize("layout", ["fsdp-8", "tp-2"])
def test_logits_in_fp32_take_no_memory_but_their_own(explicit, layout):
    """An fp32 copy of the head's weight would take 195 MiB, in the trainer all the time."""
    peaks = []
    for head_dtype in ("compute", "fp32"):
        ranks, overrides = LAYOUTS[layout]
        config = config_of(*overrides, f"model.head_dtype={head_dtype}", "parallel.loss_chunk_mib=64", layers=1)
        with played(config, ranks) as run:
            batches = run.batches(1)
            memory = LiveMemory(gloo=False)
            with Watch(memory):
                run.step(batches)
        peaks.append(memory.peak)
    assert peaks[1] <= peaks[0] + (64 << 20)


@pytest.mark.parametrize("layout", ["fsdp-8", "tp-2"])
def test_offloaded_matrices_are_stepped_on_the_card(explicit, layout):
    """Muon: directions go to the card in one copy, their steps come back, moments stay."""
    ranks, overrides = LAYOUTS[layout]
    muon = ("parallel.cpu_offload=true", "stage.muon.lr=0.02", "stage.muon.variance_beta=0.9")
    config = config_of(*muon, *overrides, layers=1)
    with played(config, ranks) as run:
        traffic = run.watched_step(1)
        state = run.trainer.optimizer.state
        neurons = {shard_of(kept.pop(VARIANCE)).device.type for kept in state.values() if VARIANCE in kept}
        check_devices(run, "cpu")
    assert neurons == {"cuda"}
    assert traffic.uploads["pageable"] == 1 + 1  # norms; directions


@pytest.mark.parametrize("stage", ["tools", pytest.param("preference", marks=pytest.mark.bars), "reward"])
def test_other_stages_wait_no_more(explicit, stage):
    with played(config_of(stage=stage), 8) as run:
        traffic = run.watched_step(2)
        assert dict(traffic.waits) == {}
        assert set(traffic.uploads) == {"pinned"}
        check_devices(run)
    assert explicit == {"tolist": 1}


def test_an_evaluation_waits_for_nothing(explicit):
    config = config_of()
    with unset_fake_temporarily():
        language = torch.zeros(4, 4096, dtype=torch.int64)
        held_out = [EvaluationBatch(text(config, pinned=False), language) for _ in range(2)]
    with played(config, 8) as run, Watch(), Traffic(run.axes) as traffic:
        sums = summed_losses(run.trainer.model, held_out, 1, CARD, None)
        assert (sums.device, tuple(sums.shape)) == (CARD, (1, 2))
    assert (dict(traffic.waits), set(traffic.uploads), dict(explicit)) == ({}, {"pinned"}, {})


@pytest.mark.bars  # blocks are alike
def test_large_with_all_its_layers(explicit):
    """4 x 4096 tokens, two micro-batches, where the parameters fit: gathered once, one wait."""
    config = config_of("parallel.reshard_after_forward=false", layers=32)
    with played(config, 8) as run:
        traffic = run.watched_step(2)
    assert traffic.messages["all_gather", "dp_shard"] == 34
    assert (dict(traffic.waits), dict(traffic.uploads), dict(explicit)) == ({}, {"pinned": 14}, {"tolist": 1})
