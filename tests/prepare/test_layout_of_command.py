"""The layout of a run: shards inside a node where that fits, and the recorded layout when a run goes on."""

import io
from dataclasses import replace
from typing import cast

import pytest

from dist_lm import launch
from dist_lm.cluster.ray_cluster import Node, RayCluster
from dist_lm.config.root import save_config
from dist_lm.dry_run.choose import USABLE, best, candidates, fits
from dist_lm.dry_run.estimate import estimate_memory
from dist_lm.dry_run.iterations import rlhf_memory
from dist_lm.errors import ConfigError
from dist_lm.launcher.stage_run import fitted
from dist_lm.parallel.layout import Layout, started_layout
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.layout import for_ranks, on_nodes_of, with_layout
from dist_lm.prepare.plan import ContinuedRun, Plan, PlannedStage, with_continued_runs
from dist_lm.stages.registry import stage_named
from dist_lm.stages.stage import Action, run_of
from dist_lm.tracking.console import Console
from tests.conftest import TINY
from tests.prepare.planned import make_run

RAY = ("cluster=ray", "cluster.address=h:1")
GPUS = 8
STAGES = ("language", "code", "tools", "reward", "rlhf")


def config(*overrides: str, stage: str = "language", model: str = "large", nodes: int = 8):
    return compose_config(
        [f"stage={stage}", f"model={model}", "hardware=h100", *RAY, f"cluster.nodes={nodes}", *overrides]
    )


def layout_of(config, before: ContinuedRun | None = None, ranks: int = GPUS) -> str:
    chosen = with_layout(config, ranks, before=before)
    assert not chosen.parallel.auto
    layout = Layout.recorded(chosen.parallel)
    assert layout.world_size == config.cluster.nodes * ranks
    return f"{layout.dp_replicate}x{layout.dp_shard}x{layout.tp}"


# --- open axes ---


@pytest.mark.parametrize(
    ("parallel", "nodes", "expected"),
    [
        *(("parallel=fsdp", nodes, f"{nodes}x8x1") for nodes in (1, 2, 8, 64)),
        *(("parallel=auto", nodes, f"{nodes}x8x1") for nodes in (1, 8)),
        *(pytest.param("parallel=auto", nodes, f"{nodes}x8x1", marks=pytest.mark.bars) for nodes in (2, 64)),
    ],
)
def test_a_model_that_a_node_holds_is_sharded_inside_it(parallel, nodes, expected):
    assert layout_of(config(parallel, nodes=nodes)) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("hardware.memory_gib=8", "parallel.activation_checkpointing=full"), "1x64x1"),  # a node is too small
        (("parallel.dp_replicate=4",), "4x16x1"),
        (("parallel=ddp",), "64x1x1"),
        (("parallel.tp=2",), "8x4x2"),
        (("parallel=fsdp_tp",), "1x8x8"),
        (("device=cpu",), "1x64x1"),  # the memory of its ranks is not what hardware describes
    ],
)
def test_what_is_given_or_does_not_fit_is_not_changed(overrides, expected):
    assert layout_of(config(*overrides)) == expected


def test_a_layout_across_nodes_is_taken_by_auto_only_where_it_is_clearly_faster():
    slow_inside = config("parallel=auto", "parallel.tp=1", "hardware.memory_gib=9", "stage.micro_batch=1")
    found = candidates(on_nodes_of(slow_inside, GPUS), 64)
    chosen = best(on_nodes_of(slow_inside, GPUS), found)
    fastest = min(one.seconds for one in found if fits(one.memory, 9))
    assert chosen.in_nodes(GPUS) or chosen.seconds == pytest.approx(fastest, rel=1e-3)
    assert chosen.seconds <= 1.03 * fastest


@pytest.mark.parametrize(
    ("overrides", "gathers_once"),
    [
        ((), True),
        (("hardware.memory_gib=30",), False),
        (("parallel.reshard_after_forward=true",), False),
        (("device=cpu",), False),
        (("parallel=ddp",), True),  # nothing is gathered, but every block is cast
        (("parallel=ddp", "parallel.compute_dtype=fp32"), False),
    ],
)
def test_parameters_stay_gathered_where_they_fit(overrides, gathers_once):
    chosen = with_layout(config(*overrides, nodes=1), GPUS)
    assert (chosen.parallel.reshard_after_forward is False) == gathers_once


# --- recipes of large ---


@pytest.mark.parametrize("nodes", [1, 8, 64])
@pytest.mark.parametrize("stage", STAGES)
def test_large_trains_on_one_to_64_nodes_of_eight(stage, nodes):
    planned = on_nodes_of(with_layout(config(stage=stage, nodes=nodes), GPUS), GPUS)
    layout = Layout.recorded(planned.parallel)
    usable = USABLE * planned.hardware.memory_gib * 2**30
    if planned.takes_sequences:
        assert estimate_memory(planned, layout).peak <= usable
        assert planned.stage.seq_len == planned.model.max_seq_len == 4096
    else:
        assert rlhf_memory(planned, layout).training <= usable
        assert planned.rlhf.prompts * planned.rlhf.samples >= planned.rlhf.minibatches * layout.dp
        with_pretraining = config("rlhf.pretrain_coefficient=0.1", stage=stage, nodes=nodes)
        with_layout(with_pretraining, GPUS)


# --- runs that go on ---


def begun(*asked: str, recorded=()) -> ContinuedRun:
    return ContinuedRun(with_layout(config(*recorded, f"cluster.ranks_per_node={GPUS}"), GPUS), frozenset(asked))


@pytest.mark.heavy
def test_a_run_that_goes_on_keeps_its_layout():
    wide = begun(recorded=("parallel.dp_replicate=1", "parallel.dp_shard=64"))
    assert layout_of(config(), wide) == "1x64x1"
    assert layout_of(config("parallel=auto"), wide) == "1x64x1"
    cut = begun(recorded=("parallel.tp=2", "parallel.sp=true"))
    assert layout_of(config(), cut) == "8x4x2"
    assert with_layout(config(), GPUS, before=cut).parallel.sp


@pytest.mark.heavy
def test_what_auto_has_chosen_is_kept_with_the_layout():
    auto = config("parallel=auto", "hardware.memory_gib=9")
    recorded = with_layout(auto, GPUS)
    assert recorded.parallel.activation_checkpointing != "none"
    before = ContinuedRun(recorded, frozenset(("dp_replicate", "dp_shard", "tp")))
    assert with_layout(config("parallel=auto"), GPUS, before=before).parallel == recorded.parallel


@pytest.mark.parametrize(
    ("override", "asked", "expected"),
    [
        ("parallel.tp=1", ("tp",), "8x8x1"),
        ("parallel=hsdp", ("dp_replicate", "dp_shard", "tp"), "8x8x1"),
        ("parallel.tp=4", ("tp",), "8x2x4"),
        ("parallel.tp=2", ("tp",), "4x8x2"),  # as recorded
        ("parallel.dp_shard=4", ("dp_shard",), "16x4x1"),
    ],
)
def test_another_layout_that_the_command_asks_for_is_taken(override, asked, expected):
    before = begun(*asked, recorded=("parallel.tp=2", "parallel.dp_replicate=4"))
    assert layout_of(config(override), before) == expected


@pytest.mark.heavy
def test_another_number_of_ranks_gets_a_layout_of_its_own():
    before = begun(recorded=("parallel.dp_replicate=1", "parallel.dp_shard=64"))
    assert layout_of(config(nodes=4), before) == "4x8x1"
    assert layout_of(config(nodes=8), before, ranks=4) == "8x4x1"
    assert layout_of(config(nodes=16), before, ranks=4) == "1x64x1"  # as many ranks


@pytest.mark.heavy
def test_the_kept_layout_is_shown_with_the_way_to_another():
    output = io.StringIO()
    with_layout(config(), GPUS, Console(output, live=False), begun(recorded=("parallel.dp_shard=64",)))
    assert "dp_shard=64 tp=1: as this run recorded it" in " ".join(output.getvalue().split())


@pytest.mark.heavy
def test_the_recorded_configuration_is_that_of_the_run_and_what_is_asked_that_of_the_command(tmp_path):
    own = config(f"work_dir={tmp_path}", "parallel.dp_shard=64", "parallel.dp_replicate=1")
    run_of(own).create()
    save_config(own, run_of(own).config)
    stages = [PlannedStage(stage_named("language"), own, action, "") for action in (Action.BUILD, Action.RESUME)]
    fresh, going_on = with_continued_runs(Plan(tuple(stages)), ["stage=language", "parallel.tp=2", "seed=1"]).stages
    assert fresh.continued is None
    assert going_on.continued is not None
    assert going_on.continued.recorded.parallel.dp_shard == 64
    assert going_on.continued.asked == {"tp"}
    [with_group] = with_continued_runs(Plan((stages[1],)), ["parallel=hsdp"]).stages
    assert with_group.continued is not None
    assert with_group.continued.asked == {"dp_replicate", "dp_shard", "cp", "tp"}


# --- ranks that torchrun has started ---


def recorded_for(nodes: int, ranks: int, *overrides: str):
    fresh = config(*overrides, f"cluster.ranks_per_node={ranks}", nodes=nodes)
    return with_layout(fresh, ranks)


def test_a_configuration_recorded_for_as_many_ranks_stays_as_it_is():
    recorded = recorded_for(2, 4, "parallel.tp=2", "parallel.dp_replicate=1")
    assert started_layout(recorded) == Layout(1, 4, 2)
    assert for_ranks(recorded, nodes=2, ranks_per_node=4) == recorded
    assert for_ranks(recorded, nodes=1, ranks_per_node=8).parallel == recorded.parallel


def test_another_number_of_ranks_keeps_tp_and_opens_the_other_axes():
    recorded = recorded_for(2, 4, "parallel.tp=2", "parallel.dp_replicate=4", "parallel.dp_shard=1")
    other = for_ranks(recorded, nodes=1, ranks_per_node=4)
    assert (other.cluster.nodes, other.cluster.ranks_per_node) == (1, 4)
    assert Layout.recorded(other.parallel) == Layout(1, 2, 2)
    assert for_ranks(other, nodes=1, ranks_per_node=4) == other
    with pytest.raises(ConfigError, match=r"parallel\.tp=2: the product is not 3 ranks"):
        for_ranks(recorded, nodes=1, ranks_per_node=3)


def test_a_layout_that_was_only_asked_for_is_not_changed_to_fit_the_ranks():
    asked = config("parallel.dp_replicate=1", "parallel.dp_shard=3", nodes=1)
    with pytest.raises(ConfigError, match=r"parallel\.dp_shard=3 .*: the product is not 2 ranks"):
        for_ranks(asked, nodes=1, ranks_per_node=2)
    assert started_layout(asked) is None
    open_axes = for_ranks(config(nodes=1), nodes=1, ranks_per_node=2)
    assert Layout.recorded(open_axes.parallel) == Layout(1, 2, 1)


class OneNode:
    """A cluster of one node without GPUs."""

    @staticmethod
    def nodes() -> list[Node]:
        return [Node("id", "10.0.0.1", cpus=4, gpus=0)]


@pytest.mark.heavy
def test_the_launcher_continues_a_run_with_its_layout(work, monkeypatch):
    """On the default layout, four ranks cannot share two sequences; on the recorded one they do."""
    command = ["stage=language", *TINY, f"work_dir={work.path}", "stage.global_batch=2", "cluster.ranks_per_node=4"]
    plan: list[Plan] = []
    monkeypatch.setattr(launch, "carry_out", lambda made, console: plan.append(made) or 0)
    make_run(work, "language", *command[-2:], "parallel.tp=2", checkpoint=True)
    assert launch.run_command(command, Console(io.StringIO())) == 0
    going_on = plan[0].target
    fitted(going_on, cast(RayCluster, OneNode()))
    with pytest.raises(ConfigError, match=r"stage\.global_batch=2: .* 4 data-parallel ranks"):
        fitted(replace(going_on, continued=None), cast(RayCluster, OneNode()))


def test_a_recorded_layout_still_has_to_fit_the_batch():
    before = begun(recorded=("parallel.dp_replicate=1", "parallel.dp_shard=64"))
    with pytest.raises(ConfigError, match=r"stage\.global_batch=96: .* 64 data-parallel ranks"):
        layout_of(config("stage.global_batch=96"), before)
