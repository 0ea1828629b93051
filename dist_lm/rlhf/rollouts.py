"""Completions that the policy drew, and where they come from.

Dimensions: B rollouts, N their tokens end to end, M the tokens of their completions end to end.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch

from dist_lm.generation.engine import Engine
from dist_lm.generation.params import SamplingParams
from dist_lm.generation.request import Answer, FinishReason, Refusal, Request, RequestError
from dist_lm.model.counter_hash import hash_words, signed

FINISHES: tuple[FinishReason, ...] = ("eot", "stop", "length", "context", "cancelled")
WHOLE = ("eot", "stop")
"""The reasons with which a completion has an end of its own."""

_SEED = 0x726F6C6C  # keeps these seeds apart from those of other things that are keyed by seed and position


class RolloutSource(Protocol):
    """Who draws completions. On the first rank; the others are told what it drew."""

    def load_weights(self, weights: Mapping[str, np.ndarray], version: int) -> None:
        """Go on with other weights, by the names of the policy's parameters, fp32.

        They may be read after this returns and are not changed by anybody.
        """
        ...

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """All answers, in the order of the requests, then of their index.

        Raises:
            RequestError: one of them cannot be answered.
        """
        ...

    def close(self) -> None:
        """End what it started."""
        ...


class EngineRollouts:
    """One engine in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def load_weights(self, weights: Mapping[str, np.ndarray], version: int) -> None:
        self.engine.load_weights({name: torch.from_numpy(value) for name, value in weights.items()}, version)

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        for request in requests:
            self.engine.submit(request)
        found: dict[tuple[str, int], Answer] = {}
        for result in self.engine.run():
            if isinstance(result, Refusal):
                raise RequestError(result.request, result.error)
            found[result.request, result.index] = result
        return [found[request.id, index] for request in requests for index in range(request.n)]

    def close(self) -> None:
        self.engine.close()


@dataclass(frozen=True)
class Rollout:
    """One completion."""

    prompt: np.ndarray  # int64 tokens
    completion: np.ndarray  # int64 tokens, with the one that ended it
    logprobs: np.ndarray  # fp32, nats: of each token of the completion, under the distribution it was drawn from
    finish: FinishReason
    version: int  # of the weights that drew it
    position: int  # of its prompt in the order of prompts
    sample: int  # among the completions of its prompt

    @property
    def whole(self) -> bool:
        """Whether it has an end of its own: it was not cut off."""
        return self.finish in WHOLE


@dataclass(frozen=True)
class Rollouts:
    """Many rollouts as a few arrays, as they are sent, kept in a checkpoint and computed with."""

    tokens_N: np.ndarray  # int64; a prompt, its completion, the next prompt, ...
    logprobs_M: np.ndarray  # fp32
    prompt_tokens_B: np.ndarray  # int64; how many of each
    new_tokens_B: np.ndarray  # int64; at least 1
    finish_B: np.ndarray  # int64; index in FINISHES
    version_B: np.ndarray  # int64
    position_B: np.ndarray  # int64
    sample_B: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.new_tokens_B)

    def __iter__(self) -> Iterator[Rollout]:
        end, new_end = 0, 0
        columns = (self.prompt_tokens_B, self.new_tokens_B, self.finish_B, self.version_B)
        rows = zip(*columns, self.position_B, self.sample_B, strict=True)
        for prompt_tokens, new_tokens, finish, version, position, sample in rows:
            begin, middle, new_begin = end, end + prompt_tokens, new_end
            end, new_end = middle + new_tokens, new_end + new_tokens
            yield Rollout(
                self.tokens_N[begin:middle],
                self.tokens_N[middle:end],
                self.logprobs_M[new_begin:new_end],
                FINISHES[finish],
                int(version),
                int(position),
                int(sample),
            )

    @property
    def whole(self) -> np.ndarray:
        """(B,) bool: which have an end of their own."""
        return np.isin(self.finish_B, [FINISHES.index(reason) for reason in WHOLE])

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it by name; `Rollouts(**arrays)` is the way back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def requests_of(
    prompts: Sequence[Sequence[int]], first_position: int, samples: int, params: SamplingParams, seed: int
) -> list[Request]:
    """What is asked of a source: answers hang on (seed, position of the prompt, sample) and the weights alone.

    Args:
        first_position: of `prompts[0]` in the order of prompts.
        params: without filters: under a truncated distribution the divergence from the reference may be negative.
    """
    assert params.top_k == 0, params
    assert params.top_p == 1, params
    assert params.min_p == 0, params
    return [
        Request(str(position), prompt, params, signed(hash_words(seed, _SEED, position)), samples)
        for position, prompt in enumerate(prompts, first_position)
    ]


def rollouts_of(requests: Sequence[Request], answers: Sequence[Answer]) -> Rollouts:
    """What was answered to `requests_of`."""
    prompts = {request.id: request.prompt for request in requests}
    assert [answer.request for answer in answers] == [r.id for r in requests for _ in range(r.n)], "order of answers"

    def column(values: list[int]) -> np.ndarray:
        return np.array(values, np.int64)

    return Rollouts(
        tokens_N=column([token for answer in answers for token in (*prompts[answer.request], *answer.tokens)]),
        logprobs_M=np.array([value for answer in answers for value in answer.logprobs], np.float32),
        prompt_tokens_B=column([len(prompts[answer.request]) for answer in answers]),
        new_tokens_B=column([len(answer.tokens) for answer in answers]),
        finish_B=column([FINISHES.index(answer.finish) for answer in answers]),
        version_B=column([answer.version for answer in answers]),
        position_B=column([int(answer.request) for answer in answers]),
        sample_B=column([answer.index for answer in answers]),
    )
