"""Measures an engine whose batch mixes adapters over one base: new tokens per CPU second, and memory.

Requests are divided evenly among four adapters (LoRA of rank 16 on all weights, untrained, with B not 0). The peers are
what a server does without a shared base: five models with their adapters merged (the base is the fifth), each in an
engine of its own, which take turns. The ceiling is one merged model that gets all requests. One thread.
"""

import gc
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import psutil
import torch

from dist_lm.bench.case import AS_USED, Case, Comparison, GroupSize, configurations
from dist_lm.bench.generate import LARGER, PROMPT, SAMPLING, SMALLER, engine_options, made_up_tokens
from dist_lm.bench.models import initial_model
from dist_lm.bench.rank import MIB, Trial
from dist_lm.config.model import AdaptedModelConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import LoraConfig
from dist_lm.generation.adapters import AdapterWeights
from dist_lm.generation.engine import Engine
from dist_lm.generation.request import Answer, Request
from dist_lm.model.lora import adapter_of, change
from dist_lm.model.size import ADAPTERS, parameter_shapes
from dist_lm.parallel.mesh import World

SHARED, APART, ALONE = "4 adapters over one base", "5 merged models", "one merged model"
NAMES = ("first", "second", "third", "fourth")
LORA = LoraConfig(rank=16, alpha=32)
MEMORY = "memory MiB"
SHAPE = (
    *(AS_USED, "model=nano", "model.vocab_size=4096", "model.max_seq_len=256", "device=cpu"),
    *("stage.global_batch=8", "stage.seq_len=64"),
)
ROUNDS = 7


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns cases for three widths, or for that of `overrides`; `quick`: for the first alone. stage.global_batch is
    the number of requests, stage.seq_len that of new tokens.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    shapes = [SHAPE, (*SHAPE, *SMALLER), (*SHAPE, *LARGER)]
    return [_case(config) for config in configurations(shapes, [*SHAPE, *overrides] if overrides else (), quick)]


def _case(config: Config) -> Case:
    batch, new = config.stage.global_batch, config.stage.seq_len
    return Case(
        name=f"{config.model.d_model} x {config.model.n_layers} layers, batch {batch}, {PROMPT} + {new} tokens",
        config=config,
        variants=dict.fromkeys((SHARED, APART, ALONE), GroupSize(1)),
        comparisons=(
            Comparison(SHARED, peer=APART, ceiling=ALONE),
            Comparison(SHARED, peer=APART, fact=MEMORY),
        ),
        rounds=ROUNDS,
    )


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant, in one process.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    gc.collect()
    before = _private_bytes()
    engines = _engines(variant, config, world)
    gc.collect()
    memory = (_private_bytes() - before) / MIB

    batch, new = config.stage.global_batch, config.stage.seq_len
    prompts = made_up_tokens(config, batch, PROMPT).tolist()
    params = replace(SAMPLING, max_new_tokens=new)

    def step() -> float:
        for number, prompt in enumerate(prompts):
            name = NAMES[number % len(NAMES)]
            engine = engines.get(name) or engines[""]
            adapter = name if variant == SHARED else ""
            engine.submit(Request(str(number), prompt, params, seed=number, adapter=adapter))

        # Engines of a server take turns on the core that they share.
        answers: list[Answer] = []
        while any(engine.busy for engine in engines.values()):
            for engine in engines.values():
                if engine.busy:
                    answers += [answer for answer in engine.step() if isinstance(answer, Answer)]
        # A request that was cut short would count as speed.
        assert sum(len(answer.tokens) for answer in answers) == batch * new
        return 0.0

    return Trial(step, facts=lambda: {MEMORY: memory}, losses=list, clock=time.process_time)


def _engines(variant: str, config: Config, world: World) -> dict[str, Engine]:
    """Returns the engines of a variant by the adapter they hold merged; an empty name: the base, or all adapters. ALONE
    has the first adapter alone merged, under an empty name.
    """
    model = initial_model(config).requires_grad_(requires_grad=False)
    base = dict(model.named_parameters())
    adapters = {name: _adapter(config, name, seed) for seed, name in enumerate(NAMES)}

    def engine_of(weights: Mapping[str, torch.Tensor], n_requests: int) -> Engine:
        lengths = [PROMPT + config.stage.seq_len] * n_requests
        options, dtype = engine_options(config, world.device, lengths)
        return Engine(model.config, weights, eot_id=0, options=options, dtype=dtype, device=world.device)

    batch = config.stage.global_batch
    if variant == ALONE:
        return {"": engine_of(_merged(base, adapters[NAMES[0]]), batch)}
    if variant == APART:
        n_each = -(-batch // len(NAMES))
        return {"": engine_of(base, n_each)} | {
            name: engine_of(_merged(base, adapter), n_each) for name, adapter in adapters.items()
        }
    engine = engine_of(base, batch)
    for adapter in adapters.values():
        engine.add_adapter(adapter)
    return {"": engine}


def _adapter(config: Config, name: str, seed: int) -> AdapterWeights:
    adapted = AdaptedModelConfig.of(config.model, LORA)
    generator = torch.Generator().manual_seed(seed)
    shapes = {factor: shape for factor, shape in parameter_shapes(adapted).items() if ADAPTERS in factor}
    factors = {factor: 0.02 * torch.randn(shape, generator=generator) for factor, shape in shapes.items()}
    return AdapterWeights(name, adapted, factors, version=0)


def _merged(base: Mapping[str, torch.Tensor], adapter: AdapterWeights) -> dict[str, torch.Tensor]:
    """Returns the weights of an adapter's model."""
    merged = dict(base)
    for name, weight in base.items():
        prefix = adapter_of(name)
        if f"{prefix}a" in adapter.factors:
            a, b = (adapter.factors[f"{prefix}{factor}"] for factor in "ab")
            merged[name] = weight + change(name, a, b, adapter.config.scale)
    return merged


def _private_bytes() -> int:
    return psutil.Process(os.getpid()).memory_full_info().uss
