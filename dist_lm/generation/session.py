"""A session with one model: one request at a time, its text passed on while it is generated.

It is one caller of an engine among others; how an engine draws tokens is in `engine.py`.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dist_lm.config.model import ModelConfig
from dist_lm.data.infill import InfillMarks
from dist_lm.errors import UserError, utf8
from dist_lm.generation.constraint import Constraint
from dist_lm.generation.decoder import best_page_tokens
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.grammar import Grammars
from dist_lm.generation.load import LoadedModel
from dist_lm.generation.paged_cache import pages_for
from dist_lm.generation.request import Answer, FinishReason, Refusal, Request, SamplingParams
from dist_lm.parallel.mesh import lacks_bf16

CACHE_TOKENS = 16384  # largest cache of a session, unless one context is longer; answers that do not fit wait
ENDINGS: dict[FinishReason, str] = {
    "eot": "end of text",
    "stop": "stop text",
    "length": "max_new_tokens reached",
    "context": "context full",
    "cancelled": "stopped",
}


@dataclass(frozen=True)
class Settings:
    """Settings of the next answer."""

    params: SamplingParams
    seed: int
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Outcome:
    """The answers to a request."""

    answers: tuple[Answer, ...]  # in the order in which they ended
    seconds: float
    seed: int

    @property
    def stopped(self) -> bool:
        return any(answer.finish == "cancelled" for answer in self.answers)

    def __str__(self) -> str:
        """Says `16 tokens, 210 tokens/s, end of text, seed 7`; with several answers, the number of each ending."""
        facts = []
        endings = Counter(ENDINGS[answer.finish] for answer in self.answers)
        if len(self.answers) > 1:
            facts.append(f"{len(self.answers)} answers")
            ending = ", ".join(f"{count} {words}" for words, count in endings.items())
        else:
            ending = ", ".join(endings)

        n_tokens = sum(len(answer.tokens) for answer in self.answers)
        if n_tokens:
            facts += [f"{n_tokens:,} token{'s' * (n_tokens != 1)}", f"{n_tokens / self.seconds:,.0f} tokens/s"]
        else:  # Ctrl-C while the prompt was computed
            ending = "stopped before the first token"
        return ", ".join([*facts, ending, f"seed {self.seed}"])


def build_engine(
    loaded: LoadedModel,
    device: torch.device,
    answers: int,
    cache_tokens: int = CACHE_TOKENS,
    tp: int = 1,
    dtype: torch.dtype | None = None,
    grammars: Grammars | None = None,
    version: int = 0,
) -> Engine:
    """Returns an engine whose cache holds up to `answers` full contexts at a time, and the prompts of earlier requests
    while there is space.

    Args:
        cache_tokens: upper bound of the cache in tokens, unless a single context is longer.
        tp: devices that share the model.
        dtype: None: bf16 on a GPU that has it and fp32 elsewhere, as in training.
        grammars: None: new ones, for constraints of the user's own.
        version: of the weights.

    Raises:
        ArtefactError: the weights do not fit the model.
        ConfigError: the model cannot be cut into `tp` parts, or there are fewer devices.
        RankLostError: another process of the model has ended.
        RuntimeError: with tp > 1, this process is a rank already.
    """
    if dtype is None:
        has_bf16 = device.type == "cuda" and not lacks_bf16(device)
        dtype = torch.bfloat16 if has_bf16 else torch.float32

    page_tokens = best_page_tokens(loaded.config, dtype, device)
    return Engine(
        loaded.config,
        loaded.weights,
        eot_id=loaded.tokenizer.eot_id,
        vocabulary=loaded.tokenizer.vocabulary(),
        options=cache_options(loaded.config, answers, cache_tokens, page_tokens),
        version=version,
        dtype=dtype,
        device=device,
        tp=tp,
        grammars=grammars or Grammars(lambda: loaded.tokenizer),
    )


def cache_options(config: ModelConfig, answers: int, cache_tokens: int, page_tokens: int) -> EngineOptions:
    """Returns the sizes of an engine as `build_engine` describes them.

    Args:
        page_tokens: tokens of a page.
    """
    # One page more than the context: each answer to a shared prompt copies its last page, which is partly filled.
    context_tokens = (pages_for(config.max_seq_len, page_tokens) + 1) * page_tokens
    size = max(context_tokens, min(cache_tokens, answers * context_tokens))
    return EngineOptions(size, page_tokens, prefix_cache=True)


class Session:
    """An engine with its tokenizer."""

    def __init__(
        self, loaded: LoadedModel, device: torch.device, answers: int = 1, tp: int = 1, opening: bool = True
    ) -> None:
        """Builds an engine for the model, see `build_engine`.

        Args:
            answers: maximum number of answers to one request.
            tp: devices that share the model.
            opening: whether texts begin with the token that opens a document.

        Raises:
            ConfigError, ArtefactError: as `build_engine`.
        """
        self.name = loaded.name
        self.tokenizer = loaded.tokenizer
        self.config = loaded.config
        self._opening = opening
        self._engine = build_engine(loaded, device, answers, tp=tp)
        self._n_requests = 0

    def close(self) -> None:
        """Ends the other processes of the model, if any."""
        self._engine.close()

    def tokens(self, text: str, name: str = "the prompt", suffix: str | None = None) -> list[int]:
        """Returns the token ids of a text as the beginning of a document (without `opening` of the text alone), or of a
        fill-in-the-middle prompt; they leave at least one position of the context.

        Args:
            name: the name of the text in errors.
            suffix: text that follows the answer (`--suffix`); the model fills in what lies between the two texts. None:
                the answer continues `text`.

        Raises:
            UserError: a text is not valid Unicode, the texts fill the context, the tokenizer lacks the marks, or there
                is no token.
        """
        utf8(text, name)
        tokens = self.tokenizer.encode_prompt(text)
        if not self._opening:
            tokens = self.tokenizer.encode(text)
            if not tokens:
                raise UserError(f"{name} is empty: with --no-opening it needs a token that the model continues")
        if suffix is not None:
            utf8(suffix, "--suffix")
            name = f"{name} with --suffix"
            tokens = InfillMarks.of(self.tokenizer).prompt(tokens, self.tokenizer.encode(suffix))

        # An answer needs at least one position behind the prompt.
        context = self.config.max_seq_len
        if len(tokens) >= context:
            raise UserError(
                f"{name} has {len(tokens):,} tokens and the model's context is {context:,} "
                "(model.max_seq_len), which leaves no space for an answer: shorten it"
            )
        return tokens

    def answer(
        self,
        prompt: list[int],
        settings: Settings,
        n: int,
        on_text: Callable[[int, str], None],
        interrupted: Callable[[], bool] = lambda: False,
        on_token: Callable[[int], None] = lambda token: None,
    ) -> Outcome:
        """Continues `prompt` `n` times, and returns after the last answer. Seconds of the outcome are wall-clock time.

        Args:
            on_text: called with (index of the answer, new text), never with an empty text.
            interrupted: called before every step; when it returns True, unfinished answers end as `cancelled`.
            on_token: called with each token of any answer, before its text.

        Raises:
            UserError: the engine refused the request (RequestError), or the model's logits are nan.
            RankLostError: with several devices, another process of the model has ended.
        """
        self._n_requests += 1
        request = Request(
            str(self._n_requests), prompt, settings.params, settings.seed, n, constraint=settings.constraint
        )
        n_passed_on = [0] * n  # characters of each answer

        def pass_on(index: int, text: str) -> None:
            n_passed_on[index] += len(text)
            if text:
                on_text(index, text)

        def receive(request: str, index: int, token: int, text: str) -> None:
            on_token(token)
            pass_on(index, text)

        answers, refusals = list[Answer](), list[Refusal]()
        started = time.perf_counter()
        self._engine.submit(request, receive)
        # One request at a time, so every answer that finishes belongs to it.
        while self._engine.busy:
            if interrupted():
                self._engine.cancel(request.id)
            for finished in self._engine.step():
                if isinstance(finished, Refusal):
                    refusals.append(finished)
                    continue
                # A cancelled answer may end with text that was held back as a possible stop text.
                pass_on(finished.index, finished.text[n_passed_on[finished.index] :])
                answers.append(finished)
        if refusals:
            raise UserError(f"{self.name}: {refusals[0].error}")
        return Outcome(tuple(answers), time.perf_counter() - started, settings.seed)
