"""The benchmark of generation: that its variants do what their names say, on a tiny model."""

import pytest
import torch

from dist_lm.bench import generate
from dist_lm.bench.case import configurations
from dist_lm.parallel.mesh import World

TINY = (
    "model=nano",
    "model.qk_norm=false",
    "model.d_model=32",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.d_ff=64",
    "model.vocab_size=512",
    "model.max_seq_len=640",
)
WORLD = World(0, 1, 0, torch.device("cpu"))


def config(*overrides: str):
    return configurations((), [*TINY, *overrides], quick=True)[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_our_engine_and_transformers_draw_from_the_same_model(batch):
    pytest.importorskip("transformers")
    own = config(f"stage.global_batch={batch}", "stage.seq_len=5")
    trials = [generate.build(variant, own, WORLD) for variant in (generate.OURS, generate.Transformers.package)]
    ours, theirs = (trial.losses() for trial in trials if trial.losses)
    assert ours == pytest.approx(theirs, abs=1e-4)
    for trial in trials:
        trial.step()


@pytest.mark.parametrize("variant", [generate.CEILING, generate.ONE, generate.EIGHT])
def test_the_other_ways_run(variant):
    generate.build(variant, config("stage.global_batch=2", "stage.seq_len=5"), WORLD).step()


@pytest.mark.parametrize(
    ("device", "overrides", "page", "dtype"),
    [
        ("cuda", (), 256, torch.bfloat16),
        ("cpu", (), 64, torch.float32),
        ("cuda", ("parallel.compute_dtype=fp32",), 64, torch.float32),
    ],
)
def test_the_engine_is_the_one_that_a_user_gets_on_that_device(device, overrides, page, dtype):
    (case,) = generate.cases([*TINY, *overrides], quick=True)
    options, arithmetic = generate.engine_options(case.config, torch.device(device), [100, 300])
    assert (options.page_tokens, arithmetic) == (page, dtype)
    assert options.n_pages >= 2 + sum(-(-length // page) for length in (100, 300))


@pytest.mark.heavy
def test_mixed_lengths_add_up_to_what_the_case_counts():
    mixed = generate.cases((), quick=False)[-2]
    lengths = generate.new_tokens(mixed.config)
    assert (min(lengths), max(lengths), len(lengths)) == (16, 512, 64)
    assert sum(lengths) == mixed.a_step


def test_a_peer_that_is_not_installed_is_named_without_a_figure(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (case,) = generate.cases(TINY, quick=True)
    assert [one.peer_name for one in case.comparisons] == [f"{name}: not installed" for name in generate.PEERS]
    assert set(case.variants) == {generate.OURS, generate.CEILING}
