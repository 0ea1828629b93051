"""The layout is arithmetic: what fits the world and the model, what is refused, and what the message offers."""

import re
from dataclasses import replace

import pytest
import torch

from dist_lm.config.cluster import ParallelConfig
from dist_lm.errors import ConfigError
from dist_lm.parallel import sharding
from dist_lm.parallel.layout import Layout, check_batch, layouts_of, misfit, placements, resolve_layout, resolved
from dist_lm.prepare.compose import compose_config

NANO = replace(compose_config(["model=nano"]).model, n_heads=5)  # d_model 160
LARGE = compose_config(["model=large"]).model  # 25 heads, d_model 1600


def asked(dp_replicate: int, dp_shard: int, tp: int, sp: bool = False) -> ParallelConfig:
    return ParallelConfig(dp_replicate=dp_replicate, dp_shard=dp_shard, tp=tp, sp=sp)


@pytest.mark.parametrize(
    ("parallel", "world", "expected"),
    [
        (asked(1, -1, 1), 24, Layout(1, 24, 1)),
        (asked(-1, 1, 1), 24, Layout(24, 1, 1)),
        (asked(1, 1, -1), 4, Layout(1, 1, 4)),
        (asked(2, -1, 4), 64, Layout(2, 8, 4)),
        (asked(-1, 2, 4), 64, Layout(8, 2, 4)),
        (asked(-1, -1, 1), 3, Layout(1, 3, 1)),
        (asked(-1, -1, 1), 24, Layout(3, 8, 1)),
        (asked(-1, -1, 1), 1024, Layout(16, 64, 1)),
        (asked(-1, -1, 8), 1024, Layout(2, 64, 8)),
    ],
)
def test_minus_one_is_what_is_left(parallel, world, expected):
    assert resolve_layout(parallel, LARGE, world) == expected


@pytest.mark.parametrize("world", [3, 24, 25, 128, 1024])
def test_no_layout_that_is_filled_in_or_offered_gathers_much_more_than_there_is(world):
    offered = [*layouts_of(LARGE, world), resolve_layout(asked(-1, -1, 1), LARGE, world)]
    for layout in offered:
        where = placements(LARGE, layout).values()
        assert sum(p.gathered(layout) for p in where) < 1.25 * sum(p.whole(layout) for p in where), layout
    assert resolve_layout(asked(1, world, 1), LARGE, world) == Layout(1, world, 1)  # who asks for one gets it


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("replicas", [1, 2, 3, 64, 1024])
def test_open_dp_axes_become_the_widest_sharding_that_the_model_allows(tp, replicas):
    layout = resolve_layout(asked(-1, -1, tp), LARGE, replicas * tp)
    assert layout.world_size == replicas * tp
    wider = [other for other in layouts_of(LARGE, replicas * tp) if other.tp == tp and other.dp_shard > layout.dp_shard]
    assert misfit(layout, LARGE) is None
    assert wider == []


@pytest.mark.parametrize(
    ("parallel", "world"),
    [(asked(1, 3, 1), 4), (asked(3, -1, 1), 4), (asked(1, 1, 1), 2), (asked(2, 2, 2), 4), (asked(1, -1, 3), 8)],
)
def test_axes_that_do_not_make_the_world_list_those_that_do(parallel, world):
    with pytest.raises(ConfigError) as refused:
        resolve_layout(parallel, NANO, world)
    message = str(refused.value)
    assert f"parallel.dp_shard={parallel.dp_shard}" in message
    assert f"the product is not {world} ranks" in message
    for layout in layouts_of(NANO, world):
        assert f"({layout.dp_replicate}, {layout.dp_shard}, {layout.tp})" in message


def test_a_long_list_of_layouts_is_cut_and_counted():
    with pytest.raises(ConfigError) as refused:
        resolve_layout(asked(1, 1, 1), LARGE, 1024)
    hidden = len(layouts_of(LARGE, 1024)) - str(refused.value).count("(", str(refused.value).index("that fit:"))
    assert f"and {hidden} more" in str(refused.value)


def test_more_tensor_parallel_ranks_than_heads_are_refused():
    assert resolve_layout(asked(1, 1, 5), NANO, 5) == Layout(1, 1, 5)
    with pytest.raises(ConfigError, match=r"tp=8 is more than model.n_heads=5.*\(1, 2, 4\)"):
        resolve_layout(asked(1, 1, 8), NANO, 8)


def test_a_rank_without_any_piece_of_the_vocabulary_is_refused():
    model = replace(LARGE, vocab_size=9)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=9"):
        resolve_layout(asked(1, 1, 8), model, 8)


def test_with_tensor_parallelism_shards_have_to_be_even():
    assert resolve_layout(asked(1, 3, 1), NANO, 3) == Layout(1, 3, 1)
    with pytest.raises(ConfigError, match=r"dp_shard=3 must divide model.d_model=160.*dp_replicate.*\(3, 1, 2\)"):
        resolve_layout(asked(1, 3, 2), NANO, 6)


def test_tp_and_a_dp_axis_cannot_both_be_open():
    with pytest.raises(ConfigError, match=r"parallel.dp_shard=-1 parallel.tp=-1.*-1 for tp alone"):
        resolve_layout(asked(1, -1, -1), NANO, 4)


def test_sequence_parallelism_needs_tensor_parallelism():
    with pytest.raises(ConfigError, match=r"parallel\.sp"):
        asked(1, -1, 1, sp=True)
    with pytest.raises(ConfigError, match=r"parallel\.sp=true"):
        resolve_layout(asked(1, 4, -1, sp=True), NANO, 4)
    assert resolve_layout(asked(1, 2, 2, sp=True), NANO, 4) == Layout(1, 2, 2)


@pytest.mark.parametrize(
    ("asked_for", "units", "device", "training", "answers"),
    [
        ("auto", True, "cpu", torch.float32, torch.float32),
        ("auto", False, "cuda", torch.bfloat16, torch.bfloat16),
        ("fastest", True, "cpu", torch.bfloat16, torch.float32),
        ("fastest", False, "cpu", torch.float32, torch.float32),
        ("fastest", False, "cuda", torch.bfloat16, torch.bfloat16),
        ("bf16", False, "cpu", torch.bfloat16, torch.bfloat16),
        ("fp32", True, "cuda", torch.float32, torch.float32),
    ],
)
def test_the_dtype_of_training_and_of_answers(asked_for, units, device, training, answers, monkeypatch):
    monkeypatch.setattr(sharding, "multiplies_bf16", lambda: units)
    parallel, where = ParallelConfig(compute_dtype=asked_for), torch.device(device)
    assert sharding.compute_dtype(parallel, where) == training
    assert sharding.generation_dtype(parallel, where) == answers


@pytest.mark.parametrize(
    ("capability", "shown", "trained"),
    [
        ((7, 0), True, torch.float32),
        ((7, 5), True, torch.float32),
        ((8, 0), True, torch.bfloat16),
        ((7, 5), False, torch.bfloat16),  # planned for another node
    ],
)
def test_a_gpu_without_bf16_computes_in_fp32(monkeypatch, capability, shown, trained):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: shown)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(sharding, "multiplies_bf16", lambda: True)
    card = torch.device("cuda", 0)
    for wanted in ("auto", "fastest"):
        assert sharding.compute_dtype(ParallelConfig(compute_dtype=wanted), card) == trained
        assert sharding.generation_dtype(ParallelConfig(compute_dtype=wanted), card) == trained
        assert sharding.compute_dtype(ParallelConfig(compute_dtype=wanted), torch.device("cuda")) == torch.bfloat16
    asked = ParallelConfig(compute_dtype="bf16")
    if trained == torch.bfloat16:
        assert sharding.compute_dtype(asked, card) == trained
    else:
        with pytest.raises(ConfigError, match=r"^parallel.compute_dtype=bf16: Tesla T4 has .* auto or fp32"):
            sharding.compute_dtype(asked, card)


def test_ranks_of_a_sequence_are_part_of_the_layout_and_of_its_refusals():
    """Finds a layout whose product leaves cp out, shards of another number, and parts of sequences that are unequal."""
    config = compose_config(["stage=language", "model=nano", "model.n_heads=4", "stage.seq_len=126", "parallel.cp=4"])
    layout = resolve_layout(config.parallel, config.model, 8)
    assert (layout.cp, layout.dp, layout.shards, layout.world_size) == (4, 2, 8, 8)
    assert Layout.recorded(resolved(config.parallel, layout)) == layout
    assert str(layout) == "dp_replicate=1 dp_shard=2 tp=1 cp=4"
    with pytest.raises(ConfigError, match=r"stage.seq_len=126: with context parallelism .* cp=4, such as 124 or 128"):
        check_batch(config, layout)
    with pytest.raises(ConfigError, match=r"parallel.cp=4: the product is not 6 ranks"):
        resolve_layout(config.parallel, config.model, 6)
    with pytest.raises(
        ConfigError, match=r"cp=4 is more than the 2 heads of a rank; \(dp_replicate, .*, cp\) that fit"
    ):
        resolve_layout(replace(config.parallel, tp=2), config.model, 8)


@pytest.mark.parametrize(("cp", "world"), [(3, 2), (8, 8)])  # three do not divide two ranks; NANO has five heads
def test_a_cp_that_no_layout_has_is_answered_with_layouts_of_another_cp(cp, world):
    """Finds a refusal that lists no way out, and one that lists a layout without saying its cp."""
    with pytest.raises(ConfigError) as refused:
        resolve_layout(ParallelConfig(dp_replicate=-1, dp_shard=-1, cp=cp), NANO, world)
    message = str(refused.value)
    assert f"none with cp={cp}, but " in message

    listed = re.findall(r"\((\d+), (\d+), (\d+), (\d+)\)", message)
    assert listed
    for axes in listed:
        layout = Layout(*map(int, axes))
        assert layout.world_size == world
        assert misfit(layout, NANO) is None


def test_stage_rlhf_splits_no_sequences():
    """Finds a run that would take the parts of one sequence for whole rollouts, and parallel=auto that asks for it."""
    with pytest.raises(ConfigError, match=r"^parallel\.cp=2: expected 1 in stage rlhf"):
        compose_config(["stage=rlhf", "model=nano", "parallel.cp=2"])


def test_a_batch_that_ranks_cannot_share_names_the_nearest_that_they_can():
    config = compose_config(["stage=language", "stage.global_batch=10"])
    check_batch(config, Layout(1, 2, 4))
    with pytest.raises(ConfigError, match=r"stage.global_batch=10: .* 4 data-parallel ranks.* 8 or 12"):
        check_batch(config, Layout(1, 4, 1))


def test_sequences_that_ranks_cannot_share_name_the_nearest_that_they_can():
    model, parallel = ["model.n_heads=4"], ["parallel.tp=4", "parallel.sp=true"]
    config = compose_config(["stage=language", *model, *parallel, "stage.seq_len=30"])
    with pytest.raises(ConfigError, match=r"stage.seq_len=30: .* tp=4, such as 28 or 32"):
        check_batch(config, Layout(1, 1, 4))
    check_batch(config, Layout(1, 1, 2))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_layout_that_fits_cuts_every_parameter_evenly_over_tp_and_dp_shard(tp):
    for layout in layouts_of(LARGE, 64 * tp):
        for name, place in placements(LARGE, layout).items():
            shard = place.local(layout)
            uneven = place.fsdp_dim if place.padded[place.fsdp_dim] % layout.dp_shard else None
            assert uneven in (None, 0), (name, layout)  # FSDP cuts unevenly on dimension 0 only
            if place.tp_dim is not None:
                assert place.tp_dim != place.fsdp_dim
                assert shard[place.tp_dim] * layout.tp == place.padded[place.tp_dim]
                assert place.padded[place.tp_dim] - place.logical[place.tp_dim] < layout.tp
