"""One answer on its way through an engine."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dist_lm.generation.request import Answer, FinishReason, OnText, Request
from dist_lm.generation.text import TextStream
from dist_lm.model.counter_hash import hash_words, signed


@dataclass(eq=False)
class Sequence:
    """Tokens of prompt and answer, and where their keys and values are."""

    request: Request
    index: int  # among the request's answers
    tokens: list[int]
    n_prompt: int
    stream: TextStream | None
    on_text: OnText | None = None
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are there
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    saved: Any = None  # content of its pages, while it had to give them up
    finish: FinishReason | None = None

    @cached_property
    def seed(self) -> int:
        """Of this answer."""
        return signed(hash_words(self.request.seed, self.index))

    @property
    def n_new(self) -> int:
        return len(self.tokens) - self.n_prompt

    def add(self, token: int, logprob: float, raw_logprob: float, eot_id: int, context: int) -> str:
        """Take in a token; sets `finish` if it is the last one. Returns the text that can be shown now."""
        params = self.request.params
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.raw_logprobs.append(raw_logprob)
        text = self.stream.add(token) if self.stream else ""
        if token == eot_id and not params.ignore_eot:
            self.finish = "eot"
        elif token in params.stop_tokens or (self.stream and self.stream.stopped):
            self.finish = "stop"
        elif self.n_new == params.max_new_tokens:
            self.finish = "length"
        elif len(self.tokens) == context:
            self.finish = "context"
        if self.finish and self.stream:
            text += self.stream.finish()
        return text

    def answer(self, version: int) -> Answer:
        """What came of it."""
        assert self.finish
        return Answer(
            request=self.request.id,
            index=self.index,
            prompt_tokens=self.n_prompt,
            tokens=tuple(self.tokens[self.n_prompt :]),
            text=self.stream.text if self.stream else "",
            logprobs=tuple(self.logprobs),
            raw_logprobs=tuple(self.raw_logprobs),
            finish=self.finish,
            seed=self.seed,
            version=version,
        )
