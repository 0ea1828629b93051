"""Samples of the model at the end of a stage, written to the `samples/` folder of the run."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dist_lm.generation.engine import Engine, EngineOptions
from dist_lm.generation.load import LoadedModel
from dist_lm.generation.request import Answer, Refusal, Request, SamplingParams, only_answers
from dist_lm.parallel.mesh import World
from dist_lm.parallel.sharding import generation_dtype
from dist_lm.stages.text import SampledConfig
from dist_lm.stages.training.stage import Closing
from dist_lm.storage import durable

CACHE_TOKENS = 8192  # enough for some dozens of samples at the same time


@dataclass(frozen=True)
class Sample:
    """One generated text."""

    index: int  # among all samples of this step; also the seed of its random numbers
    language: str
    prompt: str
    completion: str
    finished: bool  # ended with end-of-text, not at max_new_tokens


def sample_prompts(closing: Closing) -> list[Sample]:
    """Samples for every prompt of stage.sampling; ranks share the work and all get every sample (collective)."""
    assert isinstance(closing.config, SampledConfig)
    config = closing.config.stage.sampling
    wanted = [
        (language, prompt)
        for language, prompts in sorted(config.prompts.items())
        for prompt in prompts
        for _ in range(config.samples_per_prompt)
    ]
    if not wanted:
        return []
    tokenizer = closing.tokenizer
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    requests = [
        Request(str(index), tokenizer.encode_prompt(prompt), params, seed=index)
        for index, (_, prompt) in enumerate(wanted)
    ]
    return [
        # `decode` drops end-of-text
        Sample(index, *wanted[index], completion=tokenizer.decode(done.tokens), finished=done.finish == "eot")
        for index, done in enumerate(answer_all(closing, requests, "stage.sampling"))
    ]


def answer_all(
    closing: Closing, requests: list[Request], name: str, initial: LoadedModel | None = None
) -> list[Answer]:
    """The answer to each request. Ranks share the work, and every rank gets all answers (collective).

    Args:
        requests: the same on every rank; their ids are their numbers.
        name: name of the requests in messages.
        initial: the model that answers, the same on every rank; None: the trained model.
    """
    if not requests:
        return []
    model = initial or closing.model()
    weights = model.weights if isinstance(model, LoadedModel) else dict(model.named_parameters())
    device = closing.world.device
    engine = Engine(
        model.config,
        weights,
        eot_id=closing.tokenizer.eot_id,
        options=EngineOptions(cache_tokens=max(CACHE_TOKENS, model.config.max_seq_len)),
        dtype=generation_dtype(closing.config.parallel, device),
        device=device,
    )
    del model, weights  # the engine holds its own weights
    return list(only_answers(shared_answers(engine, requests, closing.world, closing.alive), name))


def shared_answers(
    engine: Engine,
    requests: Sequence[Request],
    world: World,
    alive: Callable[[], None],
    finished: Callable[[Answer | Refusal], None] | None = None,
) -> list[Answer | Refusal]:
    """The result of each request, for one answer each. Ranks share the work, and every rank gets all (collective).

    Args:
        engine: with the same weights on every rank.
        requests: the same on every rank.
        finished: gets the results of this rank as soon as they are there.
    """
    for request in requests[world.rank :: world.size]:
        engine.submit(request)
    own: list[Answer | Refusal] = []
    while engine.busy:
        for done in engine.step():
            own.append(done)
            if finished:
                finished(done)
        alive()
    gathered: list = [None] * world.size
    dist.all_gather_object(gathered, own)
    return sorted((result for part in gathered for result in part), key=lambda result: int(result.request))


def write_samples(closing: Closing, samples: Iterable[Mapping[str, Any]]) -> None:
    """Write `samples/step_N.jsonl` on the first rank: one object per sample."""
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples] if closing.world.is_first else []
    if lines:
        path = closing.run.samples / f"step_{closing.step:08d}.jsonl"
        durable.write_text(path, "\n".join(lines) + "\n")
