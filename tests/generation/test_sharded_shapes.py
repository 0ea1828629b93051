"""Models of other shapes and numbers of processes, each in an engine of its own, one after the other."""

import itertools
from dataclasses import replace

import pytest

from dist_lm.generation.followers import RankLostError
from tests.generation.test_engine import CONFIG, GROUPED, model_of, requests_of_all_kinds
from tests.generation.test_sharded import FOREVER, check_schedule, sharded

ODD = replace(
    GROUPED,
    name="unequal",
    n_heads=10,
    n_kv_heads=2,
    ffn="gelu",
    tie_embeddings=False,
    qk_norm=True,
    vocab_size=64,
    value_residual=True,
    qk_norm_span="all",
    norm_place="after",
    rope_free_layers=[0],
    residual_scale=0.7,
    logit_divisor=1.5,
)
LARGE = replace(CONFIG, name="large", d_model=50, n_heads=25, value_residual=True)  # in number of heads

SHAPES = [*itertools.product((CONFIG, GROUPED, ODD), (2, 3, 4)), (LARGE, 8)]  # of 8 ranks, one has no head
CHEAPEST = (GROUPED, 2)


@pytest.mark.parametrize(
    ("config", "tp"),
    [pytest.param(*shape, marks=pytest.mark.heavy if shape == CHEAPEST else pytest.mark.bars) for shape in SHAPES],
    ids=lambda value: getattr(value, "name", value),
)
def test_schedules_on_any_number_of_ranks(config, tp):
    """Finds a part of a model that a rank cuts or sums wrongly: padded heads, grouped keys, norms over all heads."""
    model = model_of(config).double()
    with sharded(model, tp) as engine:
        check_schedule(engine, model, requests_of_all_kinds(8), seed=0)


@pytest.mark.heavy
def test_a_rank_that_fails_shows_what_it_wrote():
    """Finds an error of another process that the caller does not get to read."""
    with sharded(model_of(CONFIG), 3) as engine:
        engine._decoder._followers.tell(["nonsense"])
        engine.submit(FOREVER)
        words = r"Traceback[\s\S]*\nrank [12] \(.*exit code 1: AssertionError: nonsense"
        with pytest.raises(RankLostError, match=words):
            engine.run()
