"""The continuous-batching engine: requests join and leave at any step, with one model and one cache of fixed size.

A step computes some pieces of new prompts and one token for every running sequence. A sequence holds only the pages it
needs now. When no page is free, the youngest sequence is set aside: the content of its pages moves to host memory
until pages are free again. So the cache never overflows, and an answer does not depend on other requests (on the CPU in
fp32 to the last bit: see `linear.py`, `plain_pages.py` and `sampling.py`).

    waiting -> prompt -> running -> answered
                            ^  |
                            |  v
                          set aside
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dist_lm.config.model import ModelConfig
from dist_lm.generation.cache_size import EngineOptions, pages_that_fit
from dist_lm.generation.decoder import Decoder, Weights, best_page_tokens, checked
from dist_lm.generation.paged_cache import PagePool, Piece, Plan, pages_for
from dist_lm.generation.request import Answer, FinishReason, OnText, Refusal, Request, Room, TextStream, fitted
from dist_lm.generation.request import Sequence as Running
from dist_lm.generation.sampling import Choice, Group, adjusted, group_rows, sample, uniform
from dist_lm.generation.transfer import upload

if TYPE_CHECKING:
    from dist_lm.generation.sharded import ShardedDecoder


_Rows = tuple[list[Running], torch.Tensor, torch.Tensor]
"""Sequences that get a token, their logits (B, V), and the positions (B,) of the tokens."""


class Engine:
    """One model that answers many requests at the same time. With tp > 1, use it as a context manager or `close` it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
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
            weights: of `version`.
            eot_id: end-of-text, which ends an answer.
            vocabulary: the bytes of every token; needed for texts.
            tp: devices of this node that share the model; on CUDA the first ones this process sees.

        Raises:
            ArtefactError: the weights do not fit the model.
            ConfigError: the model cannot be cut into `tp` parts, or there are fewer devices.
            RankLostError: another process of the model has ended.
        """
        self.config = config
        self._eot_id = eot_id
        self._vocabulary = vocabulary
        self._device = device or torch.device("cpu")
        options = options or EngineOptions()
        page_tokens = options.page_tokens or best_page_tokens(config, dtype, self._device)
        self.options = replace(options, page_tokens=page_tokens)
        self._dtype, self._tp = dtype, tp
        self._pool = PagePool(self.options.n_pages)
        self._asleep = not self.options.n_pages
        checked(config, weights)
        self._decoder = _build_decoder(config, self.options, dtype, self._device, tp)
        self._waiting: deque[list[Running]] = deque()
        self._prompts: list[list[Running]] = []  # all answers to one request; the first one holds the pages
        self._running: list[Running] = []  # oldest first
        self._aside: list[Running] = []  # oldest first
        self._done: list[Answer | Refusal] = []
        self._plan: tuple[tuple[object, ...], Plan] | None = None
        self._rows: tuple[list[Running], torch.Tensor, list[Group]] | None = None  # with their seeds
        self.version: int | None = None  # None: the weights have not arrived completely
        try:
            self.load_weights(weights, version)
        except BaseException:
            self.close()
            raise

    @property
    def busy(self) -> bool:
        """Whether requests or results are left."""
        return bool(self._waiting or self._prompts or self._running or self._aside or self._done)

    @property
    def decoder(self) -> Decoder:
        """The whole model, for computations without the cache; only with tp=1."""
        assert isinstance(self._decoder, Decoder), "a sharded decoder computes steps of the cache alone"
        return self._decoder

    @property
    def tokens_in_flight(self) -> int:
        """Upper bound of the tokens of prompts and answers that are still to be computed."""
        groups = [*self._waiting, *self._prompts]
        sequences = [*self._running, *self._aside, *(one for group in groups for one in group)]
        prompts = sum(group[0].n_prompt - group[0].cached for group in groups)
        return prompts + sum(one.request.params.max_new_tokens - one.n_new for one in sequences)

    def load_weights(self, weights: Weights, version: int) -> None:
        """Replace the weights. After an error the engine accepts no request until a later call succeeds.

        Raises:
            RuntimeError: requests are under way, so that their answers would mix two versions.
            ArtefactError: the weights do not fit the model.
        """
        if self.busy:
            raise RuntimeError("weights cannot change while requests are under way: finish or cancel them first")
        checked(self.config, weights)
        self.version = None
        with torch.inference_mode():
            self._decoder.load(weights)
        self.version = version

    def sleep(self) -> None:
        """Free the memory of the cache until the next request; no request may be under way."""
        assert not self.busy, "their pages would be lost"
        self._plan = None
        with torch.inference_mode():
            self._decoder.resize(0)
        self._asleep = True

    def _wake(self) -> None:
        options = self.options
        n_pages = options.n_pages or pages_that_fit(self.config, options, self._dtype, self._device, self._tp)
        with torch.inference_mode():
            self._decoder.resize(n_pages)
        self._pool, self._asleep = PagePool(n_pages), False

    def submit(self, request: Request, on_text: OnText | None = None) -> None:
        """Queue a request.

        Args:
            on_text: called for every token of its answers.

        Raises:
            RequestError: the request cannot be answered; the message names the field.
        """
        if self.version is None:
            raise RuntimeError("weights did not arrive completely: load them again")
        if self._asleep:
            self._wake()
        cached = self._pool.n_pages * self.options.page_tokens
        room = Room(self.config.max_seq_len, self.config.vocab_size, cached, self.options.cache_tokens or cached)
        request = fitted(request, room, texts=self._vocabulary is not None)
        group = [Running(request, index, on_text) for index in range(request.n)]
        if self._vocabulary is not None:
            for sequence in group:
                sequence.stream = TextStream(self._vocabulary, request.params.stop)
        self._waiting.append(group)

    def cancel(self, request: str) -> None:
        """End a request now; its answers finish as `cancelled`."""
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
        """Run one step. Returns the results that it finished."""
        self._bring_back()
        self._admit()
        begun, running = self._compute_prompts(), self._decode()
        self._running += begun[0] if begun else []
        if rows := [rows for rows in (running, begun) if rows]:
            self._take_tokens(rows)
        self._decoder.check()
        done, self._done = self._done, []
        return done

    def run(self) -> list[Answer | Refusal]:
        """Run steps until all requests are finished. Returns their results."""
        return list(self.results())

    def results(self) -> Iterator[Answer | Refusal]:
        """Run steps until all requests are finished. Yields results as soon as they are there."""
        while self.busy:
            yield from self.step()

    def close(self) -> None:
        """End the other processes of the model, if any."""
        self._decoder.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _bring_back(self) -> None:
        """Resume sequences that were set aside, oldest first, while pages are free for them and their next token."""
        while self._aside and len(self._running) < self.options.max_sequences:
            sequence = self._aside[0]
            needed = pages_for(sequence.cached + 1, self.options.page_tokens)
            if needed + len(self._running) > self._pool.n_free and (self._running or self._prompts):
                return
            self._aside.pop(0)
            held = pages_for(sequence.cached, self.options.page_tokens)
            sequence.pages = [self._pool.take() for _ in range(held)]
            self._decoder.restore(sequence.pages, sequence.saved)
            sequence.saved = None
            self._running.append(sequence)

    def _admit(self) -> None:
        """Start new requests in order, while pages are free for the prompt and for one page per sequence."""
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

    def _compute_prompts(self) -> _Rows | None:
        """Compute the next pieces of prompts, oldest first. Returns the answers whose prompts are complete."""
        pieces: list[tuple[list[Running], Piece]] = []
        left = self.options.step_tokens
        for group in self._prompts:
            first = group[0]
            start = first.cached
            while start < first.n_prompt:
                end = min(first.n_prompt, start + self.options.piece_tokens)
                if pieces and (end - start > left or pieces[-1][0] is group):
                    break  # one piece of a prompt per step: the next piece reads its cache
                pieces.append((group, Piece(first.tokens[start:end], start, first.pages)))
                left -= end - start
                start = end
        if not pieces:
            return None
        logits_PV = self._decoder.prefill([piece for _, piece in pieces])
        begun: list[tuple[list[Running], int]] = []
        for row, (group, piece) in enumerate(pieces):
            group[0].cached += len(piece.tokens)
            if group[0].cached == group[0].n_prompt:
                self._prompts.remove(group)
                begun.append((group, row))
        sequences = [sequence for group, _ in begun for sequence in group]
        for group, _ in begun:
            for other in group[1:]:
                other.pages, other.cached = list(group[0].pages), group[0].cached
                self._pool.share(other.pages)
        rows, positions = [row for group, row in begun for _ in group], [one.cached for one in sequences]
        if not begun:
            return None
        row_B, position_B = upload(self._device, torch.tensor(rows), torch.tensor(positions))
        return sequences, logits_PV[row_B], position_B

    def _decode(self) -> _Rows | None:
        self._take_pages()
        if not self._running:
            return None
        running = list(self._running)
        plan = self._plan_of(running)
        logits_BV = self._decoder.decode([sequence.tokens[-1] for sequence in running], plan)
        for sequence in running:
            sequence.cached += 1
        return running, logits_BV, plan.position_B + 1

    def _plan_of(self, running: list[Running]) -> Plan:
        """The plan of the last step, advanced, if no page has changed its holders; otherwise a new one."""
        key = (self._pool.changes, *running)
        if self._plan and self._plan[0] == key:
            self._plan[1].advance()
        else:
            self._plan = (key, self._decoder.plan([one.pages for one in running], [one.cached for one in running]))
        return self._plan[1]

    def _take_pages(self) -> None:
        """Give every running sequence a page of its own for its next token; set the youngest aside if none is free."""
        size = self.options.page_tokens
        for sequence in list(self._running):
            while sequence in self._running and not self._has_page(sequence):
                if self._pool.n_free:
                    page = self._pool.take()
                    if sequence.cached % size:  # the last page is shared: copy it
                        self._decoder.copy_page(sequence.pages[-1], page)
                        self._pool.give_back([sequence.pages.pop()])
                    sequence.pages.append(page)
                else:
                    self._set_aside(self._running[-1])

    def _has_page(self, sequence: Running) -> bool:
        holds = pages_for(sequence.cached + 1, self.options.page_tokens) <= len(sequence.pages)
        return holds and self._pool.holders(sequence.pages[-1]) == 1

    def _set_aside(self, sequence: Running) -> None:
        self._running.remove(sequence)
        held = sequence.pages[: pages_for(sequence.cached, self.options.page_tokens)]
        sequence.saved = self._decoder.save(held)
        self._pool.give_back(sequence.pages)
        sequence.pages = []
        self._aside.insert(0, sequence)

    def _take_tokens(self, rows: Sequence[_Rows]) -> None:
        """Draw a token for each sequence, and remove sequences that end. Here the host waits, once in a step."""
        parts, logits, positions = zip(*rows, strict=True)
        sequences = [sequence for part in parts for sequence in part]
        logits_BV, position_B = (x[0] if len(x) == 1 else torch.cat(x) for x in (logits, positions))
        choice = self._choose(sequences, logits_BV, position_B)
        columns = [column.tolist() for column in (choice.token_B, choice.logprob_B, choice.raw_logprob_B)]
        sets = choice.sets or [None] * len(sequences)
        for sequence, token, logprob, raw, kept in zip(sequences, *columns, sets, strict=True):
            if sequence.finish:  # ended with another answer to its request
                continue
            if math.isnan(raw):
                self._drop(sequence.request)
                continue
            text = sequence.add(token, logprob, raw, self._eot_id, self.config.max_seq_len, kept)
            if sequence.finish:
                self._running.remove(sequence)
                self._finish(sequence, sequence.finish)
            if sequence.on_text:  # last, because it may cancel the request
                sequence.on_text(sequence.request.id, sequence.index, token, text)

    def _choose(self, sequences: list[Running], logits_BV: torch.Tensor, position_B: torch.Tensor) -> Choice:
        params = [one.request.params for one in sequences]
        adjusted_BV = adjusted(logits_BV, params, [one.tokens for one in sequences])
        if self._rows is None or self._rows[0] != sequences:
            (seed_B,) = upload(self._device, torch.tensor([one.seed for one in sequences]))
            self._rows = (sequences, seed_B, group_rows(params, self._device))
        _, seed_B, groups = self._rows
        keep_sets = any(one.request.keep_sets for one in sequences)
        return sample(logits_BV, groups, uniform(seed_B, position_B), adjusted_BV, keep_sets)

    def _finish(self, sequence: Running, reason: FinishReason) -> None:
        sequence.finish = reason
        self._release(sequence)
        assert self.version is not None
        self._done.append(sequence.answer(self.version))

    def _drop(self, request: Request) -> None:
        """Refuse a request whose logits are nan: end all its answers and clear their pages."""
        for place in (self._running, self._aside):
            for sequence in [one for one in place if one.request is request]:
                place.remove(sequence)
                self._decoder.clear(sequence.pages)
                self._release(sequence)
                sequence.finish = "cancelled"
        self._done.append(Refusal(request.id, "the model's logits are not numbers (nan)"))

    def _release(self, sequence: Running) -> None:
        if sequence.saved is not None:
            self._decoder.forget(sequence.saved)
            sequence.saved = None
        self._pool.give_back(sequence.pages)
        sequence.pages = []


def _build_decoder(
    config: ModelConfig, options: EngineOptions, dtype: torch.dtype, device: torch.device, tp: int
) -> "Decoder | ShardedDecoder":
    if tp == 1:
        return Decoder(config, options.n_pages, options.page_tokens, dtype, device)
    from dist_lm.generation.sharded import ShardedDecoder  # needs process groups, which one device does not

    return ShardedDecoder(config, options.n_pages, options.page_tokens, dtype, device, tp)
