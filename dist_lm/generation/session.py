"""One model that goes on with texts, one request at a time, shown as they come."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dist_lm.errors import UserError
from dist_lm.generation.engine import Engine, EngineOptions
from dist_lm.generation.flash_pages import PAGE_TOKENS
from dist_lm.generation.load import LoadedModel
from dist_lm.generation.pages import pages_for
from dist_lm.generation.params import SamplingParams
from dist_lm.generation.request import Answer, FinishReason, Refusal, Request
from dist_lm.tokenizer.unicode import utf8

CACHE_TOKENS = 16384  # of all answers to a request; more of them take turns
ENDINGS: dict[FinishReason, str] = {
    "eot": "end of text",
    "stop": "stop text",
    "length": "max_new_tokens reached",
    "context": "context full",
    "cancelled": "stopped",
}


@dataclass(frozen=True)
class Settings:
    """How the next prompt is answered."""

    params: SamplingParams
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came of a request."""

    answers: tuple[Answer, ...]  # as they ended
    seconds: float
    seed: int

    @property
    def stopped(self) -> bool:
        return any(answer.finish == "cancelled" for answer in self.answers)

    def __str__(self) -> str:
        """`16 tokens, 210 tokens/s, end of text, seed 7`; of several answers, how many ended in which way."""
        tokens = sum(len(answer.tokens) for answer in self.answers)
        ways = Counter(ENDINGS[answer.finish] for answer in self.answers)
        several = len(self.answers) > 1
        ended = ", ".join(f"{count} {way}" if several else way for way, count in ways.items())
        facts = [f"{len(self.answers)} answers"] if several else []
        if tokens:
            facts += [f"{tokens:,} token{'' if tokens == 1 else 's'}", f"{tokens / self.seconds:,.0f} tokens/s"]
        else:  # Ctrl-C while the prompt was read
            ended = "stopped before the first token"
        return ", ".join([*facts, ended, f"seed {self.seed}"])


class Session:
    """An engine and the tokenizer of its model."""

    def __init__(
        self, loaded: LoadedModel, dtype: torch.dtype, device: torch.device, answers: int = 1, tp: int = 1
    ) -> None:
        """
        Args:
            answers: to one request, at most.
            tp: devices that share the model.
        """
        self.name, self.tokenizer, self.config = loaded.name, loaded.tokenizer, loaded.config
        page = PAGE_TOKENS if device.type == "cuda" else EngineOptions.page_tokens
        # whole pages, one of them an answer's own where it shares the others with the rest
        longest = (pages_for(self.config.max_seq_len, page) + 1) * page
        self._engine = Engine(
            loaded.config,
            loaded.weights,
            eot_id=loaded.tokenizer.eot_id,
            vocabulary=loaded.tokenizer.vocabulary(),
            options=EngineOptions(max(longest, min(CACHE_TOKENS, answers * longest)), page),
            dtype=dtype,
            device=device,
            tp=tp,
        )
        self._requests = 0

    def close(self) -> None:
        """End what shares the model."""
        self._engine.close()

    def tokens(self, text: str, name: str = "the prompt") -> list[int]:
        """A prompt as the beginning of a document.

        Args:
            name: what messages call it.

        Raises:
            UserError: it is no Unicode, or leaves no room in the context.
        """
        utf8(text, name)
        tokens = [self.tokenizer.eot_id, *self.tokenizer.encode(text)]
        context = self.config.max_seq_len
        if len(tokens) >= context:
            raise UserError(
                f"{name} has {len(tokens):,} tokens and the model's context is {context:,} "
                "(model.max_seq_len), which leaves no room for an answer: shorten it"
            )
        return tokens

    def answer(
        self,
        prompt: list[int],
        settings: Settings,
        n: int,
        on_text: Callable[[int, str], None],
        on_answer: Callable[[int], None] = lambda index: None,
        interrupted: Callable[[], bool] = lambda: False,
        on_token: Callable[[int], None] = lambda token: None,
    ) -> Outcome:
        """Go on with `prompt`, `n` times.

        Args:
            on_text: called with (index of the answer, new text of it) as it comes.
            on_answer: called with the index of an answer that is whole.
            interrupted: looked at before every token; once it says so, answers end.
            on_token: called with each token, before its text.

        Raises:
            UserError: the request came to nothing.
        """
        self._requests += 1
        request = Request(str(self._requests), prompt, settings.params, settings.seed, n)
        shown, answers, refusals = [0] * n, list[Answer](), list[Refusal]()

        def show(index: int, text: str) -> None:
            shown[index] += len(text)
            if text:
                on_text(index, text)

        def take(request: str, index: int, token: int, text: str) -> None:
            on_token(token)
            show(index, text)

        started = time.perf_counter()
        self._engine.submit(request, take)
        while self._engine.busy:
            if interrupted():
                self._engine.cancel(request.id)
            for done in self._engine.step():
                if isinstance(done, Refusal):
                    refusals.append(done)
                    continue
                show(done.index, done.text[shown[done.index] :])  # what waited for the rest of a stop text
                answers.append(done)
                on_answer(done.index)
        if refusals:
            raise UserError(f"{self.name}: {refusals[0].error}")
        return Outcome(tuple(answers), time.perf_counter() - started, settings.seed)
