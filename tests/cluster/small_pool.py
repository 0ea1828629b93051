"""A tiny model for pools, and requests to it."""

from collections.abc import Iterable, Iterator

import numpy as np

from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.config.model import ModelConfig
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.request import Answer, Refusal, Request, SamplingParams
from dist_lm.model.keyed_random import initial_value
from dist_lm.model.size import parameter_shapes

MODEL = ModelConfig(
    name="small", d_model=40, n_layers=2, n_heads=5, d_ff=72, max_seq_len=160, vocab_size=64, init_std=0.15
)
SPEC = EngineSpec(MODEL, EngineOptions(cache_tokens=1024, page_tokens=32, max_sequences=6), eot_id=0)


def weights_of(seed: int, model: ModelConfig = MODEL) -> dict[str, np.ndarray]:
    return {name: initial_value(name, shape, model, seed).numpy() for name, shape in parameter_shapes(model).items()}


def requests(count: int) -> Iterator[Request]:
    for i in range(count):
        params = SamplingParams(max_new_tokens=20 + i % 40, temperature=0.9, ignore_eot=i % 3 > 0)
        yield Request(f"r{i}", [0, *range(1, 2 + i % 9)], params, seed=i, n=1 + (i % 5 == 0))


def sorted_results(results: Iterable[Answer | Refusal], asked: Iterable[Request]) -> list[Answer | Refusal]:
    """Results in the order of the requests, then of their index."""
    place = {request.id: number for number, request in enumerate(asked)}
    return sorted(results, key=lambda one: (place[one.request], one.index if isinstance(one, Answer) else 0))
