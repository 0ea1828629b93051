"""Samples from the model at the end of a stage, kept in the run's `samples/` folder."""

import json
from dataclasses import asdict, dataclass

import torch.distributed as dist

from dist_lm import durable
from dist_lm.generation.generate import SamplingParams, generate
from dist_lm.stages.training_stage import Closing


@dataclass(frozen=True)
class Sample:
    """One generated text."""

    index: int  # among all samples of this step: the seed of its random numbers
    language: str
    prompt: str
    completion: str
    finished: bool  # ended by itself, not by max_new_tokens


def sample_prompts(closing: Closing) -> list[Sample]:
    """Every prompt of stage.sampling, several times; ranks share the work and all get the whole list (collective)."""
    config = closing.config.stage.sampling
    wanted = [
        (language, prompt)
        for language, prompts in sorted(config.prompts.items())
        for prompt in prompts
        for _ in range(config.samples_per_prompt)
    ]
    if not wanted:
        return []
    mine = range(closing.world.rank, len(wanted), closing.world.size)
    tokenizer = closing.tokenizer
    completions = generate(
        closing.model(),
        [[tokenizer.eot_id, *tokenizer.encode(wanted[index][1])] for index in mine],
        SamplingParams(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        ),
        eot_id=tokenizer.eot_id,
        seeds=list(mine),
    )
    own = [
        Sample(index, *wanted[index], completion=tokenizer.decode(done.tokens), finished=done.finished)
        for index, done in zip(mine, completions, strict=True)
    ]
    gathered: list = [None] * closing.world.size
    dist.all_gather_object(gathered, own)
    return sorted((sample for part in gathered for sample in part), key=lambda sample: sample.index)


def keep_samples(closing: Closing, samples: list[Sample], verdicts: list[dict]) -> None:
    """Write `samples/step_N.jsonl`: one object a sample, with what was found of it (first rank only)."""
    if closing.world.is_first and samples:
        lines = [
            json.dumps(asdict(sample) | verdict, ensure_ascii=False)
            for sample, verdict in zip(samples, verdicts, strict=True)
        ]
        path = closing.run.samples / f"step_{closing.step:08d}.jsonl"
        durable.write_text(path, "\n".join(lines) + "\n")
