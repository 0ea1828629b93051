"""The batching engine: requests come and go at any step, over one model and one cache of fixed size.

A step computes a few pieces of new prompts, then one token for every sequence that runs. A sequence holds the pages it
needs now; when there are none left the youngest one gives up its own, whose content waits in memory until there is room
again. So nothing runs out of memory, and what a request gets does not depend on the others (on CPU in fp32 to the last
bit: see `linear.py`, `plain_pages.py`, `sampling.py`).

    waiting -> prompt -> running -> answered
                            ^  |
                            |  v
                          set aside
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dist_lm.config.model import ModelConfig
from dist_lm.errors import require
from dist_lm.generation.cache_choice import build_cache
from dist_lm.generation.decoder import Decoder, check_weights
from dist_lm.generation.paged_cache import Piece, Plan
from dist_lm.generation.pages import PagePool, pages_for
from dist_lm.generation.plain_pages import ALIGNED
from dist_lm.generation.request import Answer, FinishReason, OnText, Refusal, Request, RequestError
from dist_lm.generation.runner import Runner
from dist_lm.generation.sampling import Choice, Group, adjust, group_rows, sample, uniform
from dist_lm.generation.sequence import Sequence as Running
from dist_lm.generation.text import TextStream


@dataclass(frozen=True)
class EngineOptions:
    """How large an engine is, and how it cuts up its work."""

    cache_tokens: int = 16384  # for which there is room, of all sequences together
    page_tokens: int = 64  # of a page; the flash kernel (CUDA, bf16) takes multiples of 256
    max_sequences: int = 64  # that run at a time
    piece_tokens: int = 256  # of a prompt that are computed at once
    step_tokens: int = 512  # of prompts in a step, at most (but one piece)

    def __post_init__(self) -> None:
        for key in ("page_tokens", "max_sequences", "piece_tokens", "step_tokens"):
            require(getattr(self, key) > 0, key, getattr(self, key), "a positive integer")
        # so that numbers of one page lie on whole vectors: otherwise rounding would depend on how many pages there are
        require(self.page_tokens % ALIGNED == 0, "page_tokens", self.page_tokens, f"a multiple of {ALIGNED}")
        require(
            self.cache_tokens >= self.page_tokens,
            "cache_tokens",
            self.cache_tokens,
            f"at least page_tokens={self.page_tokens}",
        )

    @property
    def n_pages(self) -> int:
        return self.cache_tokens // self.page_tokens


class Engine:
    """One model that answers many requests at a time. One of several devices is a context manager, or has `close`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        *,
        eot_id: int,
        vocabulary: Sequence[bytes] | None = None,
        options: EngineOptions | None = None,
        version: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        tp: int = 1,
    ) -> None:
        """
        Args:
            weights: by the names of the model's parameters.
            vocabulary: bytes of every token, for texts.
            tp: devices of this node that share the model; those of CUDA are this process's first ones.

        Raises:
            ArtefactError: not the weights of this model.
            ConfigError: the model cannot be cut into so many parts, or there are not so many devices.
            RankLostError: a process that would share the model has ended.
        """
        self.config = config
        self.options = options or EngineOptions()
        self._eot_id = eot_id
        self._vocabulary = vocabulary
        self._pool = PagePool(self.options.n_pages)
        self._device = device or torch.device("cpu")
        check_weights(config, {name: tuple(value.shape) for name, value in weights.items()})
        self._runner = _runner(config, self.options, dtype, self._device, tp)
        self._waiting: deque[list[Running]] = deque()
        self._prompts: list[list[Running]] = []  # all answers to a request, of which the first holds the prompt
        self._running: list[Running] = []  # oldest first
        self._aside: list[Running] = []  # oldest first
        self._done: list[Answer | Refusal] = []
        self._plan: tuple[tuple[object, ...], Plan] | None = None
        self._groups: tuple[list[Running], list[Group]] = ([], [])
        try:
            self.load_weights(weights, version)
        except BaseException:
            self.close()
            raise

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._waiting or self._prompts or self._running or self._aside or self._done)

    @property
    def tokens_in_flight(self) -> int:
        """Tokens of prompts and answers yet to come, at most: how much work it has."""
        groups = [*self._waiting, *self._prompts]
        sequences = [*self._running, *self._aside, *(one for group in groups for one in group)]
        prompts = sum(group[0].n_prompt - group[0].cached for group in groups)
        return prompts + sum(one.request.params.max_new_tokens - one.n_new for one in sequences)

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Go on with other weights.

        Raises:
            RuntimeError: requests are under way, which would be answered half by these and half by the old ones.
            ArtefactError: not the weights of this model.
        """
        if self.busy:
            raise RuntimeError("weights cannot change while requests are under way: finish or cancel them first")
        with torch.inference_mode():
            self._runner.load(weights)
        self.version = version

    def submit(self, request: Request, on_text: OnText | None = None) -> None:
        """Put a request into the queue.

        Args:
            on_text: called for every token, as it comes.

        Raises:
            RequestError: it cannot be answered; the message names the field.
        """
        self._waiting.append(self._sequences(self._checked(request), on_text))

    def cancel(self, request: str) -> None:
        """End a request now; its answers come with the reason `cancelled`."""
        for queue in (self._waiting, self._prompts):
            for group in [group for group in queue if group[0].request.id == request]:
                queue.remove(group)
                for sequence in group:
                    self._finish(sequence, "cancelled")
        for place in (self._running, self._aside):
            for sequence in [one for one in place if one.request.id == request]:
                place.remove(sequence)
                self._finish(sequence, "cancelled")

    @torch.inference_mode()
    def step(self) -> list[Answer | Refusal]:
        """Do one step of work. Returns what is done with it."""
        self._bring_back()
        self._admit()
        self._compute_prompts()
        self._decode()
        self._runner.check()
        done, self._done = self._done, []
        return done

    def run(self) -> list[Answer | Refusal]:
        """Work until nothing is left."""
        done = []
        while self.busy:
            done += self.step()
        return done

    def close(self) -> None:
        """End the processes that share the model, if there are any."""
        self._runner.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _checked(self, request: Request) -> Request:
        def refuse(message: str) -> None:
            raise RequestError(request.id, message)

        context, prompt = self.config.max_seq_len, list(request.prompt)
        if not prompt:
            refuse("prompt is empty; give at least one token (end-of-text begins a document)")
        strange = next((token for token in prompt if not 0 <= token < self.config.vocab_size), None)
        if strange is not None:
            refuse(f"prompt has token {strange}; expected 0 to {self.config.vocab_size - 1}")
        if request.n < 1:
            refuse(f"n={request.n}: expected a positive integer")
        if len(prompt) >= context:
            if request.truncate == "refuse":
                refuse(
                    f"prompt has {len(prompt)} tokens and model.max_seq_len is {context}, which leaves no room: "
                    "shorten it, or give truncate=left"
                )
            prompt = prompt[-max(1, context - request.params.max_new_tokens) :]
        params = request.params
        if params.stop and self._vocabulary is None:
            refuse(f"stop={list(params.stop)}: this engine has no vocabulary and sees no text; use stop_tokens")
        unknown = [t for t in (*params.stop_tokens, *params.logit_bias) if not 0 <= t < self.config.vocab_size]
        if unknown:
            refuse(f"stop_tokens or logit_bias name token {unknown[0]}; expected 0 to {self.config.vocab_size - 1}")
        longest = min(len(prompt) + params.max_new_tokens, context)
        if longest > self.options.n_pages * self.options.page_tokens:
            refuse(
                f"prompt and max_new_tokens={params.max_new_tokens} take {longest} tokens of a cache of "
                f"cache_tokens={self.options.cache_tokens}: ask for less, or give a larger cache"
            )
        return Request(request.id, prompt, params, request.seed, request.n, request.truncate)

    def _sequences(self, request: Request, on_text: OnText | None) -> list[Running]:
        def stream() -> TextStream | None:
            return None if self._vocabulary is None else TextStream(self._vocabulary, request.params.stop)

        n_prompt = len(request.prompt)
        return [
            Running(request, index, list(request.prompt), n_prompt, stream(), on_text) for index in range(request.n)
        ]

    def _bring_back(self) -> None:
        """Sequences that were set aside, oldest first, while there is room for them and what they will write next."""
        while self._aside and len(self._running) < self.options.max_sequences:
            sequence = self._aside[0]
            needed = pages_for(sequence.cached + 1, self.options.page_tokens)
            if needed + len(self._running) > self._pool.n_free and (self._running or self._prompts):
                return
            self._aside.pop(0)
            held = pages_for(sequence.cached, self.options.page_tokens)
            sequence.pages = [self._pool.take() for _ in range(held)]
            self._runner.restore(sequence.pages, sequence.saved)
            sequence.saved = None
            self._running.append(sequence)

    def _admit(self) -> None:
        """New requests, in their order, while there is room for their prompts and a page for each answer."""
        while self._waiting and not self._aside:
            group = self._waiting[0]
            others = len(self._running) + sum(len(group) for group in self._prompts)
            if others and others + len(group) > self.options.max_sequences:
                return
            prompt = pages_for(group[0].n_prompt, self.options.page_tokens)
            if others and prompt + len(group) + others > self._pool.n_free:
                return
            self._waiting.popleft()
            group[0].pages = [self._pool.take() for _ in range(prompt)]
            self._prompts.append(group)

    def _compute_prompts(self) -> None:
        """The next pieces of prompts, oldest first; a prompt that is done gets the first tokens of its answers."""
        pieces: list[tuple[list[Running], Piece]] = []
        left = self.options.step_tokens
        for group in self._prompts:
            first = group[0]
            start = first.cached
            while start < first.n_prompt:
                end = min(first.n_prompt, start + self.options.piece_tokens)
                if pieces and (end - start > left or pieces[-1][0] is group):
                    break  # two pieces of one prompt need two steps: the second one reads the first one's cache
                pieces.append((group, Piece(first.tokens[start:end], start, first.pages)))
                left -= end - start
                start = end
        if not pieces:
            return
        logits_PV = self._runner.prefill([piece for _, piece in pieces])
        begun: list[tuple[list[Running], int]] = []
        for row, (group, piece) in enumerate(pieces):
            group[0].cached += len(piece.tokens)
            if group[0].cached == group[0].n_prompt:
                self._prompts.remove(group)
                begun.append((group, row))
        if begun:
            rows = [row for group, row in begun for _ in group]
            sequences = [sequence for group, _ in begun for sequence in group]
            for group, _ in begun:
                for other in group[1:]:
                    other.pages, other.cached = list(group[0].pages), group[0].cached
                    self._pool.share(other.pages)
            self._running += sequences
            self._take_tokens(sequences, logits_PV[rows])

    def _decode(self) -> None:
        self._make_room()
        if not self._running:
            return
        running = list(self._running)
        token_B = torch.tensor([sequence.tokens[-1] for sequence in running], device=self._device)
        logits_BV = self._runner.decode(token_B, self._plan_of(running))
        for sequence in running:
            sequence.cached += 1
        self._take_tokens(running, logits_BV)

    def _plan_of(self, running: list[Running]) -> Plan:
        """That of the step before, moved on, where no page has changed hands."""
        key = (self._pool.changes, *running)
        if self._plan and self._plan[0] == key:
            self._plan[1].advance()
        else:
            self._plan = (key, self._runner.plan([one.pages for one in running], [one.cached for one in running]))
        return self._plan[1]

    def _make_room(self) -> None:
        """A page of its own, with a free place in it, for every sequence that runs; the youngest ones give way."""
        size = self.options.page_tokens
        for sequence in list(self._running):
            while sequence in self._running and not self._has_place(sequence):
                if self._pool.n_free:
                    page = self._pool.take()
                    if sequence.cached % size:  # the last page is shared: a copy of it
                        self._runner.copy_page(sequence.pages[-1], page)
                        self._pool.give_back([sequence.pages.pop()])
                    sequence.pages.append(page)
                else:
                    self._set_aside(self._running[-1])

    def _has_place(self, sequence: Running) -> bool:
        if pages_for(sequence.cached + 1, self.options.page_tokens) > len(sequence.pages):
            return False
        return self._pool.holders(sequence.pages[-1]) == 1

    def _set_aside(self, sequence: Running) -> None:
        self._running.remove(sequence)
        held = sequence.pages[: pages_for(sequence.cached, self.options.page_tokens)]
        sequence.saved = self._runner.save(held)
        self._pool.give_back(sequence.pages)
        sequence.pages = []
        self._aside.insert(0, sequence)

    def _take_tokens(self, sequences: list[Running], logits_BV: torch.Tensor) -> None:
        """Draw a token for each sequence; those that end leave."""
        choice = self._choose(sequences, logits_BV)
        drawn = zip(
            sequences, choice.token_B.tolist(), choice.logprob_B.tolist(), choice.raw_logprob_B.tolist(), strict=True
        )
        for sequence, token, logprob, raw in drawn:
            if sequence.finish:  # with another answer to its request
                continue
            if math.isnan(raw):
                self._drop(sequence.request)
                continue
            text = sequence.add(token, logprob, raw, self._eot_id, self.config.max_seq_len)
            if sequence.finish:
                self._running.remove(sequence)
                self._finish(sequence, sequence.finish)
            if sequence.on_text:  # last: it may cancel the request
                sequence.on_text(sequence.request.id, sequence.index, token, text)

    def _choose(self, sequences: list[Running], logits_BV: torch.Tensor) -> Choice:
        adjusted_BV = None
        for row, sequence in enumerate(sequences):
            if sequence.request.params.adjusts_logits:
                adjusted_BV = logits_BV.clone() if adjusted_BV is None else adjusted_BV
                adjust(adjusted_BV[row], sequence.request.params, set(sequence.tokens))
        if self._groups[0] != sequences:
            self._groups = (sequences, group_rows([one.request.params for one in sequences], logits_BV.device))
        seeds, positions = [one.seed for one in sequences], [len(one.tokens) for one in sequences]
        seed_B, position_B = torch.tensor([seeds, positions], device=self._device)
        return sample(logits_BV, self._groups[1], uniform(seed_B, position_B), adjusted_BV)

    def _finish(self, sequence: Running, reason: FinishReason) -> None:
        sequence.finish = reason
        self._forget(sequence)
        self._pool.give_back(sequence.pages)
        sequence.pages = []
        self._done.append(sequence.answer(self.version))

    def _drop(self, request: Request) -> None:
        """Its logits are no numbers: all its answers end, and nothing of them stays in the cache."""
        for place in (self._running, self._aside):
            for sequence in [one for one in place if one.request is request]:
                place.remove(sequence)
                self._runner.clear(sequence.pages)
                self._pool.give_back(sequence.pages)
                self._forget(sequence)
                sequence.finish = "cancelled"
        self._done.append(Refusal(request.id, "the model's logits are not numbers (nan)"))

    def _forget(self, sequence: Running) -> None:
        if sequence.saved is not None:
            self._runner.forget(sequence.saved)
            sequence.saved = None


def _runner(config: ModelConfig, options: EngineOptions, dtype: torch.dtype, device: torch.device, tp: int) -> Runner:
    if tp == 1:
        cache = build_cache(config, options.n_pages, options.page_tokens, dtype, device)
        return Decoder(config, cache, options.page_tokens, dtype, device)
    from dist_lm.generation.sharded import ShardedDecoder  # with process groups, which one device does without

    return ShardedDecoder(config, options.n_pages, options.page_tokens, dtype, device, tp)
