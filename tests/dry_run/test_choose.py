"""parallel=auto: it fits, it is the fastest of what fits, and what cannot be is refused in one line."""

import pytest

from dist_lm.dry_run.choose import USABLE, best, candidates, choose_layout, table
from dist_lm.errors import ConfigError
from dist_lm.launcher.compose import compose_config
from dist_lm.parallel.layout import resolve_layout


def auto(*overrides: str):
    return compose_config(["stage=language", "model=large", "parallel=auto", "hardware=h100", *overrides])


def test_the_choice_is_concrete_fits_and_is_the_fastest_that_does():
    config = auto("hardware.memory_gib=20", "stage.micro_batch=2")
    chosen, found = choose_layout(config, 16), candidates(config, 16)
    layout = resolve_layout(chosen, config.model, 16)
    assert not chosen.auto
    assert -1 not in (chosen.dp_replicate, chosen.dp_shard, chosen.tp)
    [candidate] = [c for c in found if c.parallel == chosen]
    assert candidate.layout == layout
    assert candidate.memory <= USABLE * 20 * 2**30
    assert all(c.seconds >= 0.99 * candidate.seconds for c in found if c.fits(20))


def test_little_memory_makes_it_shard_more():
    roomy = best(auto(), candidates(auto(), 8))
    tight = auto("hardware.memory_gib=9")
    assert best(tight, candidates(tight, 8)).memory < roomy.memory


def test_a_layout_that_is_given_stays_as_it_is():
    config = compose_config(["stage=language", "parallel=hsdp"])
    assert choose_layout(config, 16) is config.parallel


def test_no_tensor_parallelism_between_nodes():
    found = candidates(auto("hardware.devices_per_node=2"), 8)
    assert {c.layout.tp for c in found} == {1, 2}


def test_the_table_names_the_chosen_one_and_what_rules_others_out():
    config = auto("hardware.memory_gib=20")
    verdicts = [row[-1] for row in table(config, candidates(config, 8))]
    assert verdicts.count("chosen") == 1
    assert "too much memory" in verdicts


@pytest.mark.parametrize(
    ("override", "world", "words"),
    [
        ("hardware.memory_gib=1", 8, ["hardware.memory_gib=1", "GiB", "stage.micro_batch"]),
        ("stage.global_batch=7", 16, ["stage.global_batch=7", "16"]),
    ],
)
def test_what_cannot_be_is_one_line(override, world, words):
    with pytest.raises(ConfigError) as refused:
        choose_layout(auto(override), world)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)
