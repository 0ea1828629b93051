"""The estimate of a step: arithmetic that can be checked by hand, and that agrees with the played step."""

import pytest
import torch

from dist_lm.config.cluster import HardwareConfig
from dist_lm.config.root import Config
from dist_lm.dry_run.estimate import estimate_memory, estimate_work, shapes_of
from dist_lm.dry_run.play import play_ranks, ranks_to_play
from dist_lm.dry_run.work import WORLD, Work, message_seconds, step_seconds
from dist_lm.model.quantised import quantised_matrices
from dist_lm.model.size import is_trained
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import Layout, resolve_layout
from dist_lm.parallel.owners import message_costs, plan_of_model
from dist_lm.prepare.compose import compose_config
from dist_lm.training.optimizer import build_optimizer

LARGE = compose_config(["stage=language", "model=large", "hardware=h100"])
LLAMA_SHAPE = ("model.norm=rmsnorm", "model.ffn=swiglu", "model.bias=false", "model.n_kv_heads=2")
SMALL = ("stage=language", "model=medium", "model.n_layers=2", "stage.seq_len=256", "stage.micro_batch=4")


def test_the_defaults_of_hardware_are_its_cpu_file():
    assert compose_config(["hardware=cpu"]).hardware == HardwareConfig()


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_what_is_sharded_falls_with_the_ranks(ranks):
    memory = estimate_memory(LARGE, Layout(1, ranks, 1))
    assert memory.parameters == pytest.approx(4 * 1_086_108_800 / ranks, rel=0.01)
    assert memory.optimizer == 2 * memory.parameters


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("stage.muon.lr=0.02",),
        ("stage.muon.lr=0.02", "stage.muon.variance_beta=0.9"),
        ("stage.muon.lr=0.02", "stage.ema_decay=0.9", "stage.lora.rank=2", "stage.init_from=base"),
        ("stage.muon.lr=null", "stage.muon.variance_beta=0.9", "stage.ema_decay=0.9"),
    ],
    ids=["adamw", "muon", "normuon", "adapters", "averages"],
)
def test_the_state_of_the_optimizer_is_counted_as_it_is_built(overrides):
    config = compose_config(["stage=language", "model=medium", *overrides])
    shape = config.trained_shape
    with torch.device("meta"):
        model = Transformer(shape)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, shape))
    state = build_optimizer(model, config.stage, config.stage.muon).state.values()
    kept = sum(value.nbytes for values in state for name, value in values.items() if name != "step")
    assert estimate_memory(config, Layout(1, 1, 1)).optimizer == kept


@pytest.mark.parametrize("hardware", ["cpu", "h100"])
def test_a_base_in_four_bits_is_counted_as_it_is_held(hardware: str):
    """Finds a count of fp32 copies of the base, and of matrices at half a byte without their scales."""
    pytest.importorskip("bitsandbytes")
    adapters = ("stage.lora.rank=2", "stage.lora.load_in_4bit=true", "stage.init_from=base")
    config = compose_config(["stage=language", "model=medium", f"hardware={hardware}", *adapters])
    shape = config.trained_shape
    with torch.device("meta"):
        model = Transformer(shape)
    expected = sum(matrix.nbytes for matrix in quantised_matrices(model).values())
    for name, parameter in model.named_parameters():
        expected += parameter.numel() * (4 if is_trained(name, shape) or hardware == "cpu" else 2)
    assert estimate_memory(config, Layout(1, 1, 1)).parameters == expected

    plain = compose_config(["stage=language", "model=medium", f"hardware={hardware}", *adapters[::2]])
    work, work_of_lora = (estimate_work(each, Layout(1, 1, 1)) for each in (config, plain))
    assert work.flops == work_of_lora.flops
    assert work.device_s > work_of_lora.device_s


def test_gradients_are_whole_while_micro_batches_add_up():
    one = compose_config(["stage=language", "model=large", "stage.micro_batch=4", "stage.global_batch=32"])
    assert estimate_memory(one, Layout(1, 8, 1)).gradients == estimate_memory(one, Layout(1, 8, 1)).parameters
    assert estimate_memory(LARGE, Layout(1, 8, 1)).gradients == 4 * 1_086_108_800


def test_blocks_that_stay_gathered_take_the_bytes_of_their_dtype():
    """Finds gathered blocks that are counted in entries instead of bytes: half of their memory in bf16."""
    kept, freed = (
        compose_config(
            ["stage=language", "model=large", "hardware=h100", f"parallel.reshard_after_forward={resharded}"]
        )
        for resharded in ("false", "true")
    )
    layout = Layout(1, 8, 1)
    shapes = shapes_of(kept, layout)
    more = estimate_memory(kept, layout).activations - estimate_memory(freed, layout).activations
    # Of freed blocks two are there at a time.
    assert more == pytest.approx(2 * shapes.gathered_blocks * (1 - 2 / shapes.units))


def test_what_is_offloaded_is_not_held_by_the_device():
    kept, offloaded = (
        estimate_memory(
            compose_config(["stage=language", "model=large", "hardware=h100", f"parallel.cpu_offload={on}"]),
            Layout(1, 8, 1),
        )
        for on in (False, True)
    )
    assert kept.peak - offloaded.peak == offloaded.host == kept.parameters + kept.optimizer  # gradients add up


def test_a_ring_sends_what_it_has_to():
    work = Work()
    for kind in ("all_gather", "reduce_scatter", "all_reduce"):
        work.collective(kind, "tp", 4, 1000)
    work.collective("all_reduce", "tp", 1, 1000)
    assert (work.sent["tp"], work.messages["tp"]) == (750 + 750 + 1500, 3)


def test_messages_between_nodes_are_slower_than_inside_one():
    work = Work()
    work.collective("all_gather", "dp_shard", 8, 2**30)
    inside = message_seconds(work, "dp_shard", Layout(1, 8, 1), LARGE.hardware)
    between = message_seconds(work, "dp_shard", Layout(1, 8, 8), LARGE.hardware)
    assert between > 5 * inside


def test_data_messages_hide_behind_computation_and_tensor_parallel_ones_do_not():
    layout = Layout(1, 2, 2)
    work = Work(device_s=10.0)
    work.collective("all_gather", "dp_shard", 2, 2**30)
    assert step_seconds(work, layout, LARGE.hardware) == 10.0
    work.collective("all_reduce", "tp", 2, 2**30)
    assert step_seconds(work, layout, LARGE.hardware) > 10.0


def test_the_ranks_played_are_the_first_a_padded_one_and_the_last():
    assert ranks_to_play(LARGE, Layout(2, 64, 8)) == [0, 6, 1023]
    assert ranks_to_play(LARGE, Layout(1, 8, 1)) == [0, 7]
    assert ranks_to_play(LARGE, Layout(1, 1, 1)) == [0]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("overrides", "world"),
    [
        pytest.param(
            ("hardware=h100", "stage.global_batch=32", "parallel.activation_checkpointing=full"),
            8,
            id="fsdp",
            marks=pytest.mark.bars,
        ),
        pytest.param(
            ("hardware=cpu", "stage.global_batch=16", "parallel.tp=4", "parallel.sp=true"), 8, id="fsdp_tp_sp"
        ),
        pytest.param(
            ("hardware=h100", "stage.global_batch=16", "parallel.cp=2", "parallel.dp_replicate=1"), 8, id="cp"
        ),
        pytest.param(
            ("hardware=cpu", "stage.global_batch=16", "parallel.cp=2", "parallel.tp=2", "parallel.sp=true"),
            8,
            id="cp, tp, sp",
            marks=pytest.mark.bars,
        ),
        pytest.param(  # pads heads
            ("hardware=h100", "stage.global_batch=80", "parallel.dp_replicate=1", "model.n_heads=6"),
            20,
            id="fsdp_uneven",
            marks=pytest.mark.bars,
        ),
        pytest.param(
            ("hardware=h100", "stage.global_batch=32", *LLAMA_SHAPE), 8, id="as llama", marks=pytest.mark.bars
        ),
        pytest.param(
            ("hardware=h100", "stage.global_batch=32", *LLAMA_SHAPE, "model.qk_norm=true"),
            8,
            id="as qwen3",
            marks=pytest.mark.bars,
        ),
        pytest.param(
            ("stage.lora.rank=8", "stage.lora.load_in_4bit=true", "stage.init_from=base", "stage.global_batch=8"),
            2,
            id="four_bits",
            marks=pytest.mark.bars,
        ),
    ],
)
def test_the_estimate_agrees_with_the_played_step(overrides, world, monkeypatch):
    if "stage.lora.load_in_4bit=true" in overrides:
        pytest.importorskip("bitsandbytes")
    config = compose_config([*SMALL, *overrides])
    layout = resolve_layout(config.parallel, config.trained_shape, world)
    monkeypatch.setattr("dist_lm.dry_run.play.ranks_to_play", lambda config, layout: [0])
    [played] = play_ranks(config, layout)
    work = estimate_work(config, layout)
    assert estimate_memory(config, layout).peak == pytest.approx(played.memory.peak, rel=0.1)
    assert work.flops == pytest.approx(played.work.flops, rel=0.1)
    assert work.device_s == pytest.approx(played.work.device_s, rel=0.25)
    for axis in ("dp_shard", "tp", "cp"):
        assert work.sent[axis] == pytest.approx(played.work.sent[axis], rel=0.1)


@pytest.mark.heavy
def test_key_heads_that_are_fewer_than_ranks_of_cp_are_counted_as_often_as_they_are_held(monkeypatch):
    """Finds activations that count one key head for eight ranks: 4 % too few."""
    config = compose_config(
        [
            *("stage=language", "model=large", "model.d_model=2048", "model.n_heads=16", "model.n_kv_heads=1"),
            *("model.n_layers=4", "model.max_seq_len=65536", "stage.seq_len=65536", "stage.micro_batch=1"),
            *("stage.global_batch=2", "parallel.cp=8", "parallel.dp_replicate=1", "hardware=h100"),
        ]
    )
    layout = resolve_layout(config.parallel, config.trained_shape, 8)
    monkeypatch.setattr("dist_lm.dry_run.play.ranks_to_play", lambda config, layout: [0])
    [played] = play_ranks(config, layout)
    assert estimate_memory(config, layout).activations == pytest.approx(played.memory.activations, rel=0.02)


@pytest.mark.heavy
def test_a_loss_that_needs_the_global_batch_is_played_with_its_passes_before_the_step(monkeypatch):
    # Without `Stage.prepare` the loss of KTO has no reference point, and the played step fails. Parameters that these
    # passes leave gathered are no gradients.
    config = compose_config(["stage=preference", "stage.preference.algorithm=kto", "model=nano", "hardware=cpu"])
    monkeypatch.setattr("dist_lm.dry_run.play.ranks_to_play", lambda config, layout: [0])
    [played] = play_ranks(config, Layout(1, 2, 1))
    assert played.memory.gradients == pytest.approx(played.memory.parameters, rel=0.01)


@pytest.mark.bars
@pytest.mark.parametrize(
    ("model", "layout", "most"),
    [
        pytest.param("large", Layout(1, 8, 1), 1.10, id="large on 8"),
        pytest.param("xlarge", Layout(64, 8, 1), 1.15, id="xlarge on 512"),
        pytest.param("llama_8b", Layout(8, 8, 1), 1.10, id="llama_8b on 64"),
        pytest.param("llama_8b", Layout(64, 8, 1), 1.10, id="llama_8b on 512"),
    ],
)
def test_muon_by_owners_costs_little_beside_adamw(model, layout, most):
    """By the dry run, of one sequence a rank; `bash launch/test.sh -m bars tests/dry_run -k owners`."""
    seq_len = 8192 if model == "llama_8b" else 4096
    seconds, peaks = [], []
    for overrides in ([], ["stage.muon.lr=0"]):
        config = compose_config(
            [
                *("stage=language", f"model={model}", "hardware=h100", "recipe=tuned"),
                *(f"stage.global_batch={layout.world_size}", "stage.micro_batch=1", f"stage.seq_len={seq_len}"),
                *(f"parallel.{axis}={getattr(layout, axis)}" for axis in ("dp_replicate", "dp_shard", "tp")),
                *overrides,
            ]
        )
        reports = play_ranks(config, layout)
        seconds.append(max(step_seconds(report.work, layout, config.hardware) for report in reports))
        peaks.append(max(report.memory.peak for report in reports))
    assert seconds[0] <= most * seconds[1]
    assert peaks[0] <= peaks[1] + (2 << 30)


WITH_MUON = ("stage.muon.lr=0.02", "stage.muon.variance_beta=0.9")


def steps_of(layout: Layout, *overrides: str) -> list[Config]:
    """The configuration of a step with Muon, and of the same step without."""
    axes = [f"parallel.{axis}={getattr(layout, axis)}" for axis in ("dp_replicate", "dp_shard", "tp")]
    batch = f"stage.global_batch={4 * layout.dp}"
    return [compose_config([*SMALL, *axes, batch, *overrides, *muon]) for muon in (WITH_MUON, ())]


@pytest.mark.parametrize("hardware", ["cpu", "h100"])
@pytest.mark.parametrize(
    "layout",
    [Layout(1, 8, 1), Layout(64, 1, 1), Layout(4, 8, 1), Layout(8, 64, 1), Layout(2, 1, 4), Layout(2, 8, 2)],
    ids=str,
)
def test_the_estimate_of_muon_is_that_of_the_plan(hardware, layout):
    """Finds an estimate that shares the work of replicas where the plan does not, or forgets one of its messages."""
    with_muon, without = steps_of(layout, f"hardware={hardware}", "model.n_layers=8", "model.d_ff=2048")
    plan = plan_of_model(with_muon.trained_shape, layout, with_muon.hardware.device)
    flops = plan.flops()
    busiest = flops.index(max(flops))

    work, base = (estimate_work(config, layout) for config in (with_muon, without))
    if hardware == "h100":  # CPUs orthogonalise in another way
        assert work.flops - base.flops == pytest.approx(max(flops), rel=0.1)
    item_bytes = message_costs(with_muon.hardware.device).item_bytes
    assert work.sent.total() - base.sent.total() == pytest.approx(plan.sent(busiest) * item_bytes, rel=0.15)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("hardware", "layout"),
    [
        pytest.param("h100", Layout(1, 8, 1), id="one replica", marks=pytest.mark.bars),
        pytest.param("cpu", Layout(2, 2, 1), id="replicas share", marks=pytest.mark.bars),
        pytest.param("h100", Layout(4, 2, 1), id="replicas apart", marks=pytest.mark.bars),
        pytest.param("cpu", Layout(2, 1, 4), id="tensor parallel", marks=pytest.mark.bars),
        pytest.param("h100", Layout(2, 2, 2), id="all axes"),
    ],
)
def test_the_estimate_of_muon_agrees_with_what_the_busiest_owner_does(hardware, layout, monkeypatch):
    """Finds what neither plan nor estimate knows: messages, FLOPs and passes of the played step."""
    with_muon, without = steps_of(layout, f"hardware={hardware}")
    flops = plan_of_model(with_muon.trained_shape, layout, with_muon.hardware.device).flops()
    busiest = flops.index(max(flops))
    monkeypatch.setattr("dist_lm.dry_run.play.ranks_to_play", lambda config, layout: [busiest])

    played, played_base = (play_ranks(config, layout)[0].work for config in (with_muon, without))
    work, base = (estimate_work(config, layout) for config in (with_muon, without))
    for axis in ("dp_replicate", "dp_shard", "tp", WORLD):
        sent = played.sent[axis] - played_base.sent[axis]
        assert work.sent[axis] - base.sent[axis] == pytest.approx(sent, rel=0.1, abs=2_000)
        messages = played.messages[axis] - played_base.messages[axis]
        assert work.messages[axis] - base.messages[axis] == messages
    assert work.flops - base.flops == pytest.approx(played.flops - played_base.flops, rel=0.1)
    assert work.device_s - base.device_s == pytest.approx(played.device_s - played_base.device_s, rel=0.5)
