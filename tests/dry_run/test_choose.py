"""parallel=auto: it fits, it is the fastest of what fits, and what cannot be is refused in one line."""

import io
from dataclasses import replace

import pytest

from dist_lm.dry_run.choose import USABLE, best, candidates, describe, fits, table
from dist_lm.dry_run.iterations import rlhf_memory
from dist_lm.errors import ConfigError
from dist_lm.parallel.layout import resolve_layout
from dist_lm.prepare.compose import compose_config
from dist_lm.prepare.layout import check_hardware, on_nodes_of, with_layout
from dist_lm.stages.rlhf.config import rlhf_config
from dist_lm.tracking.console import Console


def auto(*overrides: str):
    return compose_config(["stage=language", "model=large", "parallel=auto", "hardware=h100", *overrides])


@pytest.mark.heavy
def test_the_choice_is_concrete_fits_and_is_the_fastest_that_does():
    config = auto("hardware.memory_gib=20", "stage.micro_batch=2")
    found = candidates(config, 16)
    chosen = best(config, found).parallel
    layout = resolve_layout(chosen, config.model, 16)
    assert not chosen.auto
    assert -1 not in (chosen.dp_replicate, chosen.dp_shard, chosen.tp)
    [candidate] = [c for c in found if c.parallel == chosen]
    assert candidate.layout == layout
    assert candidate.memory <= USABLE * 20 * 2**30
    assert all(c.seconds >= 0.99 * candidate.seconds for c in found if fits(c.memory, 20))


@pytest.mark.parametrize(
    ("model", "n_ranks"),
    [
        pytest.param(model, n_ranks, marks=() if (model, n_ranks) == ("qwen3_8b", 8) else pytest.mark.bars)
        for model in ("llama_1b", "llama_3b", "llama_8b", "qwen3_0.6b", "qwen3_1.7b", "qwen3_4b", "qwen3_8b")
        for n_ranks in (8, 64, 512)
    ],
)
def test_there_is_a_layout_for_published_shapes_on_a_node_and_on_many(model, n_ranks):
    """Finds a published shape that no layout fits, with one sequence of 8,192 tokens a rank."""
    batch = (f"stage.global_batch={n_ranks}", "stage.micro_batch=1", "stage.seq_len=8192")
    config = auto(f"model={model}", *batch)
    chosen = best(config, candidates(config, n_ranks))
    assert fits(chosen.memory, config.hardware.memory_gib)
    assert chosen.layout.world_size == n_ranks


def test_sequences_are_split_over_ranks_where_nothing_else_fits():
    """Finds a long context for which there is no layout, and ranks that share a sequence without need."""
    batch = ("stage.global_batch=8", "stage.micro_batch=1", "parallel.tp=1")
    longest = ("model.max_seq_len=262144", "stage.seq_len=262144")
    config = auto(*batch, *longest, "model.n_layers=4", "hardware.memory_gib=16")
    chosen = best(config, candidates(config, 8))
    assert chosen.layout.cp > 1
    assert chosen.layout.world_size == 8
    assert fits(chosen.memory, 16)
    roomy = auto(*batch, *longest, "model.n_layers=4", "hardware.memory_gib=2000")
    assert {candidate.layout.cp for candidate in candidates(roomy, 8)} == {1}


def test_sequences_are_split_in_a_node_rather_than_computed_twice():
    """Finds full checkpointing where ranks that share a sequence need none, and are faster."""
    batch = ("stage.global_batch=16", "stage.micro_batch=1", "parallel.tp=1", "cluster.nodes=2")
    config = auto(*batch, "model=llama_8b", "model.max_seq_len=32768", "stage.seq_len=32768", "model.n_layers=8")
    tight = replace(config, hardware=replace(config.hardware, memory_gib=40.0))
    alone = best(tight, [candidate for candidate in candidates(tight, 16) if candidate.layout.cp == 1])
    chosen = best(tight, candidates(tight, 16))
    assert alone.parallel.activation_checkpointing == "full"
    assert chosen.parallel.activation_checkpointing != "full"
    assert 1 < chosen.layout.cp <= config.hardware.devices_per_node
    assert chosen.seconds < alone.seconds


@pytest.mark.heavy
def test_little_memory_makes_it_shard_more():
    roomy = best(auto(), candidates(auto(), 8))
    tight = auto("hardware.memory_gib=9")
    assert best(tight, candidates(tight, 8)).memory < roomy.memory


def test_a_layout_that_is_given_stays_as_it_is():
    config = compose_config(
        [
            "stage=language",
            "stage.global_batch=16",
            "parallel=hsdp",
            "cluster.nodes=2",
            "cluster=ray",
            "cluster.address=h:1",
        ]
    )
    given = resolve_layout(config.parallel, config.model, 16)
    assert resolve_layout(with_layout(config, 8).parallel, config.model, 16) == given


@pytest.mark.parametrize("ranks_per_node", [1, 2, pytest.param(8, marks=pytest.mark.bars)])
def test_no_tensor_parallelism_between_nodes(ranks_per_node):
    config = auto("cluster.nodes=4", "cluster=ray", "cluster.address=h:1")
    found = candidates(on_nodes_of(config, ranks_per_node), 4 * ranks_per_node)
    assert max(c.layout.tp for c in found) == ranks_per_node
    assert with_layout(config, ranks_per_node).parallel.tp <= ranks_per_node


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_before_ranks_start_the_choice_is_shown_with_what_it_was_compared_to(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    output = io.StringIO()
    config = auto("parallel.activation_checkpointing=selective", "hardware.memory_gib=9", "stage.micro_batch=1")
    chosen = with_layout(config, 8, Console(output, live=False))
    assert not chosen.parallel.auto
    shown = "".join(output.getvalue().split())  # however it is folded, nothing is cut off
    rows = table(on_nodes_of(config, 8), candidates(on_nodes_of(config, 8), 8))
    assert len(rows) > 1
    words = [word for row in rows for cell in row for word in cell.replace(",", " ").split()]
    assert [word for word in words if word not in shown] == []


@pytest.mark.heavy
def test_offered_layouts_do_not_gather_padding():
    """1,024 ranks that share everything would pad 25 heads to 1,024."""
    assert all(c.layout.dp_shard <= 64 for c in candidates(auto("stage.global_batch=1024"), 1024))


def test_gradients_that_add_up_are_sharded_where_nothing_else_fits():
    config = auto("hardware.memory_gib=8", "stage.micro_batch=1")
    assert best(config, candidates(config, 8)).parallel.reduce_every_micro_batch


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("parallel.tp=2", lambda c: c.layout.tp == 2),
        ("parallel.dp_replicate=2 parallel.tp=1", lambda c: (c.layout.dp_replicate, c.layout.tp) == (2, 1)),
        ("parallel.sp=true", lambda c: c.parallel.sp),
        ("parallel.activation_checkpointing=full", lambda c: c.parallel.activation_checkpointing == "full"),
        ("parallel.reshard_after_forward=true", lambda c: c.parallel.reshard_after_forward),
        ("stage.micro_batch=1 parallel.reduce_every_micro_batch=true", lambda c: c.parallel.reduce_every_micro_batch),
    ],
)
def test_what_is_given_is_kept_and_the_rest_is_chosen(given, kept):
    config = auto(*given.split())
    found = candidates(on_nodes_of(config, 8), 8)
    assert len(found) > 1
    assert all(kept(candidate) for candidate in found)


def test_the_hardware_has_to_be_that_of_the_ranks():
    check_hardware(replace(auto(), device="cuda"))
    with pytest.raises(ConfigError, match=r"hardware=h100: .*device=cpu.*hardware=NAME"):
        check_hardware(replace(auto(), device="cpu"))
    check_hardware(compose_config(["stage=language", "device=cpu", "hardware=h100"]))  # nothing is chosen


def test_the_table_names_the_chosen_one_and_what_rules_others_out():
    config = auto("hardware.memory_gib=20")
    verdicts = [row[-1] for row in table(config, candidates(config, 8))]
    assert verdicts.count("chosen") == 1
    assert "too much memory" in verdicts


@pytest.mark.parametrize(
    ("override", "ranks_per_node", "words"),
    [
        ("hardware.memory_gib=1", 8, ["hardware.memory_gib=1", "GiB", "stage.micro_batch"]),
        ("hardware.memory_gib=1 stage.micro_batch=1", 8, ["stage.seq_len"]),
        ("stage.global_batch=7 cluster.nodes=2 cluster=ray cluster.address=h:1", 8, ["stage.global_batch=7", "16"]),
        ("parallel.cpu_offload=true", 8, ["parallel.cpu_offload=false"]),
        ("parallel.dp_shard=3", 8, ["parallel.dp_shard=3", "leave the axes open"]),
    ],
)
def test_what_cannot_be_is_one_line(override, ranks_per_node, words):
    with pytest.raises(ConfigError) as refused:
        with_layout(auto(*override.split()), ranks_per_node)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.heavy
def test_rlhf_is_planned_by_the_keys_of_its_updates():
    def planned(*overrides: str):
        return auto("stage=rlhf", "parallel.activation_checkpointing=none", *overrides)

    usual = candidates(planned(), 8)
    assert usual
    with pytest.raises(ConfigError, match=r"stage\.seq_len=64: no such key of stage rlhf"):
        planned("stage.seq_len=64")

    def by_layout(*overrides: str):
        return {describe(one): one for one in candidates(planned(*overrides), 8)}

    larger, fewer = by_layout("rlhf.micro_batch_tokens=16384"), by_layout("rlhf.minibatches=8")
    for one in usual:
        assert one.memory < larger[describe(one)].memory
        assert fewer[describe(one)].seconds <= one.seconds
    one = usual[0]
    chosen = replace(rlhf_config(planned()), parallel=one.parallel)
    assert one.memory == rlhf_memory(chosen, one.layout).training  # all four models, two optimizers
    with pytest.raises(ConfigError, match=r"lower rlhf\.micro_batch_tokens"):
        best(planned("hardware.memory_gib=4"), usual)
