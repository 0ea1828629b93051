"""Samples of the model at the end of a stage, written to the `samples/` folder of the run."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.load import LoadedModel
from dist_lm.generation.request import Answer, Refusal, Request, SamplingParams, only_answers
from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import all_gather
from dist_lm.parallel.sharding import generation_dtype
from dist_lm.stages.training.arguments import EvaluationArguments
from dist_lm.storage import durable

if TYPE_CHECKING:
    from dist_lm.stages.text import SamplesConfig

CACHE_TOKENS = 8192  # enough for some dozens of samples at the same time


@dataclass(frozen=True)
class Sample:
    """One generated text."""

    index: int  # among all samples of this step; also the seed of its random numbers
    language: str
    prompt: str
    completion: str
    finished: bool  # ended with end-of-text, not at max_new_tokens


def sample_prompts(arguments: EvaluationArguments) -> list[Sample]:
    """Returns samples for every prompt of stage.sampling, in order of languages; empty if there are no prompts.

    Ranks share the work and all get every sample (collective). The seed of a sample is its index.

    Raises:
        RequestError: a prompt does not fit the context.
        ArtefactError: the model's logits are not numbers.
        ConfigError: bf16 is asked for on a GPU without it.
        UserError: a prompt is not Unicode.
    """
    stage: Any = arguments.config.stage  # callers are stages that end with samples
    config: SamplesConfig = stage.sampling
    prompts = [
        (language, prompt)
        for language, prompts_of_language in sorted(config.prompts.items())
        for prompt in prompts_of_language
        for _ in range(config.samples_per_prompt)
    ]
    if not prompts:
        return []

    tokenizer = arguments.tokenizer
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )
    requests = [
        Request(str(index), tokenizer.encode_prompt(prompt), params, seed=index)
        for index, (_, prompt) in enumerate(prompts)
    ]
    answers = answer_all(arguments, requests, "stage.sampling")

    samples = []
    for index, answer in enumerate(answers):
        language, prompt = prompts[index]
        completion = tokenizer.decode(answer.tokens)  # without end-of-text
        samples.append(Sample(index, language, prompt, completion, finished=answer.finish == "eot"))
    return samples


def answer_all(
    arguments: EvaluationArguments, requests: list[Request], name: str, initial: LoadedModel | None = None
) -> list[Answer]:
    """Returns the answer to each request, in order. Ranks share the work, and every rank gets all answers (collective).

    Each rank builds an engine with whole weights for the call.

    Args:
        requests: the same on every rank; their ids are their numbers.
        name: name of the requests in messages.
        initial: the model that answers, the same on every rank; None: the trained model.

    Raises:
        RequestError: a request does not fit the context.
        ArtefactError: the model's logits are not numbers.
        ConfigError: bf16 is asked for on a GPU without it.
        MessageError: another rank has sent something else.
    """
    # An engine would gather the whole model for nothing.
    if not requests:
        return []

    # A whole copy on each rank: engines do not know the layout of training.
    model = initial or arguments.model()
    weights = model.weights if isinstance(model, LoadedModel) else dict(model.named_parameters())
    device = arguments.world.device
    engine = Engine(
        model.config,
        weights,
        eot_id=arguments.tokenizer.eot_id,
        options=EngineOptions(cache_tokens=max(CACHE_TOKENS, model.config.max_seq_len)),
        dtype=generation_dtype(arguments.config.parallel, device),
        device=device,
    )
    # The engine holds its own weights.
    del model, weights
    return list(only_answers(shared_answers(engine, requests, arguments.world, arguments.alive), name))


def shared_answers(
    engine: Engine,
    requests: Sequence[Request],
    world: World,
    alive: Callable[[], None],
    finished: Callable[[Answer | Refusal], None] | None = None,
) -> list[Answer | Refusal]:
    """Returns the result of each request, for one answer each, ordered by id. Every rank gets all (collective).

    Ranks share the work: rank r of n answers the requests r, r + n, ...

    Args:
        engine: with the same weights on every rank.
        requests: the same on every rank; their ids are numbers.
        alive: called after each step of the engine.
        finished: gets the results of this rank as soon as they are there.

    Raises:
        RequestError: a request does not fit the context; on the rank that has it in its share.
        MessageError: another rank has sent something else.
    """
    # A share of every n-th request has about as many long answers as any other share.
    for request in requests[world.rank :: world.size]:
        engine.submit(request)

    answers_of_rank: list[Answer | Refusal] = []
    while engine.busy:
        for answer in engine.step():
            answers_of_rank.append(answer)
            if finished:
                finished(answer)
        alive()

    # All ranks need all answers, to compute the same figures.
    gathered = all_gather(answers_of_rank, list[Answer | Refusal])
    return sorted((answer for answers in gathered for answer in answers), key=lambda answer: int(answer.request))


def write_samples(arguments: EvaluationArguments, samples: Iterable[Mapping[str, Any]]) -> None:
    """Writes `samples/step_N.jsonl` on the first rank: one object per sample."""
    if not arguments.world.is_first:
        return
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
    if lines:
        path = arguments.run.samples / f"step_{arguments.step:08d}.jsonl"
        durable.write_text(path, "\n".join(lines) + "\n")
