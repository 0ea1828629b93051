"""The continuous-batching engine: requests join and leave at any step, with one model and one cache of fixed size.

A step reads some pieces of new prompts, and draws one token for every running sequence, and the first one for every
prompt that is complete. A sequence holds only the pages it
needs now. When no page is free, the youngest sequence is preempted: the content of its pages moves to host memory until
pages are free again. So the cache never overflows, and an answer does not depend on other requests (on the CPU in fp32
to the last bit: see `linear.py`, `paged_cache.py` and `sampling.py`). With `prefix_cache`, a prompt begins on the pages
of an earlier one, as far as they have the same tokens (`prefix_cache.py`).

Adapters can share the weights (`add_adapter`): a step then mixes requests of the base and of all adapters.

Where a constraint allows exactly one token, the engine takes it without asking the model, and goes on until there is a
choice again (`_take_forced`, after a draw). In the next step, or in several if there are many, the model reads these
tokens in one pass, which also gives their log-probabilities (`_extend`); then the sequence draws again.

    waiting -> prefilling -> running -> finished
                               ^  |
                               |  v
                            preempted

Dimensions: P pieces (of prompts, or of answers with forced tokens), N their tokens, n the tokens of one piece, B
sequences that get a token, V vocabulary, U bytes with one bit for each token of the vocabulary.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.errors import UserError, require
from dist_lm.generation.adapters import AdapterWeights
from dist_lm.generation.decoder import Decoder, Weights, best_page_tokens, checked
from dist_lm.generation.engine_options import EngineOptions, pages_that_fit
from dist_lm.generation.grammar import GrammarError, Grammars, Matcher, allows, only_token
from dist_lm.generation.paged_cache import DecodePlan, PagePool, Piece, pages_for
from dist_lm.generation.prefix_cache import Prefix, PrefixCache, PrefixCounts, block_digests
from dist_lm.generation.request import (
    Answer,
    AnswerSequence,
    FinishReason,
    OnText,
    Refusal,
    Request,
    RequestError,
    Room,
    SamplingParams,
    TextStream,
    fitted,
)
from dist_lm.generation.sampling import Choice, DrawGroup, adjusted, constrained, group_rows, sample, uniform
from dist_lm.generation.transfer import concatenated, download, upload
from dist_lm.model.token_sets import packed

if TYPE_CHECKING:
    from dist_lm.generation.sharded import ShardedDecoder


NAN = "the model's logits are not numbers (nan)"
NOTHING_ALLOWED = "logit_bias and constraint together allow no token"


@dataclass(frozen=True)
class _LogitRows:
    """Sequences that get a token in this step."""

    sequences: list[AnswerSequence]
    logits_BV: torch.Tensor  # fp32
    position_B: torch.Tensor  # int64, position of the token to draw


@dataclass(frozen=True)
class _SamplingPlan:
    """How to draw the next tokens of some sequences: what does not change until one joins or leaves."""

    sequences: list[AnswerSequence]
    params: list[SamplingParams]
    seed_B: torch.Tensor  # int64
    groups: list[DrawGroup]
    keep_sets: bool  # whether a request asks for sets
    n_top: int  # most `top_logprobs` of a request


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
        grammars: Grammars | None = None,
    ) -> None:
        """
        Args:
            weights: parameters of `version`.
            eot_id: id of end-of-text, which ends an answer.
            vocabulary: the bytes of every token; needed for texts.
            grammars: needed for constraints.
            tp: devices of this node that share the model; on CUDA the first ones this process sees.

        Raises:
            ArtefactError: the weights do not fit the model.
            ConfigError: the model cannot be cut into `tp` parts, or there are fewer devices.
            RankLostError: another process of the model has ended.
        """
        self.config = config
        self._eot_id = eot_id
        self._vocabulary = vocabulary
        self._grammars = grammars
        self.device = device or torch.device("cpu")
        self._dtype = dtype
        self._tp = tp

        options = (options or EngineOptions()).for_device(self.device)
        # 256 where the flash kernel runs, otherwise 64
        page_tokens = options.page_tokens or best_page_tokens(config, dtype, self.device)
        self.options = replace(options, page_tokens=page_tokens)
        self.prefix_counts = PrefixCounts()
        self._page_pool, self._prefixes = self._build_pool(self.options.n_pages)
        self._asleep = not self.options.n_pages

        self._waiting: deque[list[AnswerSequence]] = deque()  # one sequence per answer, grouped by request
        self._prefilling: list[list[AnswerSequence]] = []  # only the first sequence of a request holds pages
        self._running: list[AnswerSequence] = []  # oldest first
        self._preempted: list[AnswerSequence] = []  # oldest first
        self._finished: list[Answer | Refusal] = []
        self._adapter_versions: dict[str, int] = {}

        # Kept from the last step, for as long as the same sequences run; (key, plan), see `_plan_for`.
        self._plan: tuple[tuple[object, ...], DecodePlan] | None = None
        self._sampling_plan: _SamplingPlan | None = None

        checked(config, weights)
        self._decoder = self._build_decoder()
        self.version: int | None = None  # None: the weights have not arrived completely
        try:
            self.load_weights(weights, version)
        except BaseException:
            self.close()
            raise

    @property
    def busy(self) -> bool:
        """Whether requests are under way, or answers have not been returned yet."""
        return bool(self._waiting or self._prefilling or self._running or self._preempted or self._finished)

    @property
    def decoder(self) -> Decoder:
        """The complete model, for computations without the cache; only with tp=1."""
        assert isinstance(self._decoder, Decoder), "a sharded decoder computes steps of the cache alone"
        return self._decoder

    @property
    def free_pages(self) -> int:
        """Pages of the cache that no sequence holds."""
        return self._page_pool.n_free

    @property
    def tokens_in_flight(self) -> int:
        """Upper bound of the tokens of prompts and answers that are still to be computed."""
        unstarted = [*self._waiting, *self._prefilling]
        sequences = [*self._running, *self._preempted, *(sequence for answers in unstarted for sequence in answers)]
        prompt_tokens = sum(answers[0].n_prompt - answers[0].cached for answers in unstarted)
        return prompt_tokens + sum(sequence.request.params.max_new_tokens - sequence.n_new for sequence in sequences)

    def load_weights(self, weights: Weights, version: int) -> None:
        """Replaces the weights and sets `version`. After an error in the middle the engine refuses requests until a
        later call succeeds; with tp > 1 no later call can, because the other processes were ended.

        Raises:
            RuntimeError: the engine is `busy`, so that answers would mix two versions, or has adapters, which belong to
                the old weights; these stay.
            ArtefactError: the weights do not fit the model; a mapping is checked before the old weights are dropped.
            RankLostError: with tp > 1, another process of the model has ended.
        """
        if self.busy:
            raise RuntimeError("weights cannot change while requests are under way: finish or cancel them first")
        self._replace_weights(weights, version)

    def swap_weights(self, weights: Weights, version: int) -> None:
        """Replaces the weights between two steps, also while requests are under way, and sets `version`.

        Answers under way keep their tokens, keys and values, and go on by the new weights (`Answer.versions`). A prompt
        that is not read to its end is read again, so that one version has read all of it. An answer is thus a function
        of request, versions and their weights: it does not depend on other requests.

        Raises:
            RuntimeError: the engine has adapters, which belong to the old weights.
            ArtefactError, RankLostError: as `load_weights`.
        """
        # A page of the prefix cache may be shared, so prompts are admitted again instead of read again in place.
        for answers in reversed(self._prefilling):
            self._clear_nan(answers[0])
            self._page_pool.give_back(answers[0].pages)
            for sequence in answers:
                sequence.pages, sequence.cached, sequence.n_reused, sequence.has_nan = [], 0, 0, None
                sequence.versions.clear()
            self._waiting.appendleft(answers)
        self._prefilling.clear()
        self._replace_weights(weights, version)

    def awaited_version(self) -> int | None:
        """Returns the oldest version that a request waits for (`Request.versions`), if no request can go on by the
        weights that are there; None otherwise."""
        unfinished = [*self._preempted, *self._running, *(answers[0] for answers in self._waiting)]
        if self._prefilling or any(self._is_due(sequence) for sequence in unfinished):
            return None
        return min((version for s in unfinished if (version := s.next_version) is not None), default=None)

    def _is_due(self, sequence: AnswerSequence) -> bool:
        """Returns whether the present weights are those that a sequence goes on by."""
        return sequence.next_version in (None, self.version)

    def _replace_weights(self, weights: Weights, version: int) -> None:
        if self._adapter_versions:
            raise RuntimeError("weights cannot change below adapters: build another engine")
        checked(self.config, weights)
        self.version = None
        if self._prefixes:
            self._prefixes.clear()
        with torch.inference_mode():
            self._decoder.load(weights)
        self.version = version

    def add_adapter(self, adapter: AdapterWeights) -> None:
        """Adds an adapter of the weights, for requests that name it.

        Raises:
            ArtefactError: a factor is missing or has another shape.
            ConfigError: the engine has several devices, or an adapter of this name.
        """
        require(self._tp == 1, "tp", self._tp, "1 with adapters that share their base")
        is_new = bool(adapter.name) and adapter.name not in self._adapter_versions
        require(is_new, "adapter", adapter.name, "another name for each adapter")
        with torch.inference_mode():
            self.decoder.add_adapter(adapter)
        self._adapter_versions[adapter.name] = adapter.version

    def version_of(self, adapter: str) -> int:
        """Returns the version of an adapter's factors, or that of the weights where `adapter` is empty."""
        version = self._adapter_versions[adapter] if adapter else self.version
        assert version is not None
        return version

    def sleep(self) -> None:
        """Frees the memory of the cache, and on a GPU that of the weights, until the next request; the engine must not
        be `busy`."""
        assert not self.busy, "their pages would be lost"
        self._plan = None
        with torch.inference_mode():
            self._decoder.sleep()
        self._asleep = True

    def _wake(self) -> None:
        options = self.options
        with torch.inference_mode():
            # The weights come first: the cache takes a share of the memory that they leave.
            self._decoder.wake()
            n_pages = options.n_pages or pages_that_fit(self.config, options, self._dtype, self.device, self._tp)
            self._decoder.resize(n_pages)
        self._page_pool, self._prefixes = self._build_pool(n_pages)
        self._asleep = False

    def _build_pool(self, n_pages: int) -> tuple[PagePool, PrefixCache | None]:
        """Returns the bookkeeping of an empty cache."""
        if not self.options.prefix_cache:
            return PagePool(n_pages), None
        pool = PagePool(n_pages, evicted=lambda page: prefixes.forget(page))
        prefixes = PrefixCache(pool, self.options.page_tokens)
        return pool, prefixes

    def submit(self, request: Request, on_text: OnText | None = None) -> Sequence[AnswerSequence]:
        """Queues a request; `step` computes its answers. The cache is allocated if it is not there.

        Returns:
            Its answers in progress, to look at between steps.

        Args:
            on_text: called inside `step` for every token of its answers, with the text that became final (maybe empty);
                it may cancel the request.

        Raises:
            RequestError: the request cannot be answered, or its constraint cannot be read; the message names the field.
            ConfigError: with cache_tokens=0, free memory does not hold one context.
            RuntimeError: the weights have not arrived completely.
            RankLostError: with tp > 1, the cache had to be allocated and another process of the model has ended.
        """
        if self.version is None:
            raise RuntimeError("weights did not arrive completely: load them again")
        if self._asleep:
            self._wake()
        if request.adapter and request.adapter not in self._adapter_versions:
            raise RequestError(request.id, f"adapter={request.adapter}: this engine has none of this name")

        # A request that could never run alone is refused here, so that scheduling always makes progress.
        capacity = self._page_pool.n_pages * self.options.page_tokens
        room = Room(self.config.max_seq_len, self.config.vocab_size, capacity, self.options.cache_tokens or capacity)
        request = fitted(request, room, texts=self._vocabulary is not None)

        # Every answer has a stream of its own, because characters are cut off at different tokens.
        streams = [TextStream(self._vocabulary, request.params.stop) for _ in range(request.n)]
        answers = [AnswerSequence(request, index, on_text, stream) for index, stream in enumerate(streams)]
        for sequence in answers:
            sequence.matcher = self._matcher(request)
        if self._prefixes:
            answers[0].digests = block_digests(answers[0].tokens, request.prefix_key)
        self._waiting.append(answers)
        return answers

    def _matcher(self, request: Request) -> Matcher | None:
        """Returns the object that follows a request's constraint and says which tokens it allows next; None without a
        constraint.

        Raises:
            RequestError: the constraint cannot be read, or this engine takes none.
        """
        if not request.constraint:
            return None
        if not self._grammars:
            raise RequestError(request.id, "constraint: this engine has no tokenizer and cannot follow one")
        ends = (self._eot_id, *request.params.stop_tokens)
        try:
            return self._grammars.matcher(request.constraint, ends)
        except UserError as error:
            raise RequestError(request.id, str(error)) from error

    def cancel(self, request: str) -> None:
        """Ends a request now and frees its pages: the next `step` returns its unfinished answers as they are, with the
        reason `cancelled`, also without a token. An unknown or finished id does nothing."""
        for queue in (self._waiting, self._prefilling):
            for answers in [answers for answers in queue if answers[0].request.id == request]:
                queue.remove(answers)
                self._clear_nan(answers[0])
                for sequence in answers:
                    self._finish(sequence, "cancelled")
        for queue in (self._running, self._preempted):
            for sequence in [sequence for sequence in queue if sequence.request.id == request]:
                queue.remove(sequence)
                self._finish(sequence, "cancelled")

    def cancel_all(self) -> None:
        """Ends all requests and drops their answers."""
        sequences = [*self._running, *self._preempted]
        sequences += [answers[0] for answers in (*self._waiting, *self._prefilling)]
        for request in {sequence.request.id for sequence in sequences}:
            self.cancel(request)
        self._finished.clear()

    @torch.inference_mode()
    def step(self) -> list[Answer | Refusal]:
        """Runs one step: reads pieces of new prompts, and draws one token for every running sequence, and the first one
        for every prompt that is complete. Returns the answers and refusals that ended in it, or by `cancel` since the
        last step; empty if none did.

        A request whose logits are nan is refused with all its unfinished answers, and the others go on. What a caller's
        `on_text` raises passes.

        Raises:
            RankLostError: with tp > 1, another process of the model has ended; answers of this step are lost.
        """
        # Preempted sequences come first: their prompts are computed, and new requests would take the pages they need.
        self._await_weights()
        self._resume()
        self._admit()
        for sequence in self._running:
            sequence.read_by(self.version_of(sequence.request.adapter))

        prefilled = self._prefill()
        self._allocate_pages()
        extended = self._extend()
        decoded = self._decode()
        # A prompt that is complete has logits for its first token already, and decodes from the next step on.
        if prefilled:
            self._running += prefilled.sequences
        if parts := [part for part in (decoded, extended, prefilled) if part]:
            self._draw_tokens(parts)

        # Check before answers are returned: if a rank of the model has died, the logits may be wrong.
        self._decoder.check()
        finished, self._finished = self._finished, []
        return finished

    def run(self) -> list[Answer | Refusal]:
        """Runs steps until all requests are finished. Returns their answers and refusals, in the order in which they
        end."""
        return list(self.results())

    def results(self) -> Iterator[Answer | Refusal]:
        """Runs steps until all requests are finished. Yields each answer or refusal after the step that finished it."""
        while self.busy:
            yield from self.step()

    def close(self) -> None:
        """Ends the other processes of the model, if any."""
        self._decoder.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Scheduling: which sequences run in this step, and on which pages.

    def _await_weights(self) -> None:
        """Preempts the sequences that wait for other weights."""
        # Most requests ask for no version, and this runs in every step.
        waiting = [s for s in self._running if s.request.versions and not self._is_due(s)]
        for sequence in waiting:
            self._preempt(sequence)

    def _resume(self) -> None:
        """Moves preempted sequences back to pages, oldest first, and lets them run; those that wait for other weights
        stay.

        It stops when `max_sequences` run, or when the free pages do not hold the sequence with its next token and one
        page more for each running sequence.
        """
        while len(self._running) < self.options.max_sequences:
            sequence = next(filter(self._is_due, self._preempted), None)
            if sequence is None:
                return
            n_needed = pages_for(len(sequence.tokens), self.options.page_tokens)
            # Leave one page for each running sequence. If nothing else is under way, the sequence fits by itself.
            if n_needed + len(self._running) > self._page_pool.n_free and (self._running or self._prefilling):
                return

            self._preempted.remove(sequence)
            n_saved = pages_for(sequence.cached, self.options.page_tokens)
            sequence.pages = [self._page_pool.take() for _ in range(n_saved)]
            self._decoder.restore(sequence.pages, sequence.saved)
            sequence.saved = None
            self._running.append(sequence)

    def _admit(self) -> None:
        """Moves waiting requests to prefilling, in order, and takes the pages of their prompts.

        It stops when more than `max_sequences` answers would be active, or when the free pages do not hold the prompt
        and one page more for each active sequence. None is admitted while a sequence is preempted for want of pages.
        If nothing is active, one request is always admitted. Requests that wait for other weights are passed over.
        """
        # Preempted sequences are older than any waiting request.
        while not any(map(self._is_due, self._preempted)):
            answers = next((answers for answers in self._waiting if self._is_due(answers[0])), None)
            if answers is None:
                return
            first = answers[0]
            n_active = len(self._running) + sum(len(answers) for answers in self._prefilling)
            # A request alone is always admitted: `fitted` has checked that the cache holds it.
            if n_active and n_active + len(answers) > self.options.max_sequences:
                return
            prefix = Prefix()
            if self._prefixes:
                prefix = self._prefixes.find(first.digests, first.n_prompt)
            n_held = sum(self._page_pool.holders(page) > 0 for page in prefix.pages)
            n_needed = pages_for(first.n_prompt, self.options.page_tokens) - n_held
            if n_active and n_needed + len(answers) + n_active > self._page_pool.n_free:
                return

            self._waiting.remove(answers)
            for sequence in answers:
                sequence.read_by(self.version_of(sequence.request.adapter))
            self._take_prompt_pages(answers, prefix)
            # One sequence computes the prompt for all answers to its request.
            self._prefilling.append(answers)

    def _take_prompt_pages(self, answers: Sequence[AnswerSequence], prefix: Prefix) -> None:
        """Gives the first of a request's answers the pages of its prompt, of which the first ones hold `prefix`."""
        first = answers[0]
        n_new = pages_for(first.n_prompt, self.options.page_tokens) - len(prefix.pages)
        self._page_pool.share(prefix.pages)
        first.cached = len(prefix.pages) * self.options.page_tokens

        # A page that holds more than the prefix is copied; it must not be evicted before, nor be the last one there is.
        source = prefix.partial_page
        if source is not None and self._page_pool.n_free - (self._page_pool.holders(source) == 0) < n_new:
            source = None
        if source is not None:
            self._page_pool.share([source])
        new_pages = [self._page_pool.take() for _ in range(n_new)]
        if source is not None:
            self._decoder.copy_page(source, new_pages[0], prefix.n_partial)
            self._page_pool.give_back([source])
            first.cached += prefix.n_partial
        first.pages = [*prefix.pages, *new_pages]

        if self._prefixes:
            self.prefix_counts.looked_up += first.n_prompt
            self.prefix_counts.reused += first.cached
        for sequence in answers:
            sequence.n_reused = first.cached

    def _prefill(self) -> _LogitRows | None:
        """Computes and caches the next pieces of prompts, oldest first. A request whose prompt is complete leaves the
        prefilling ones, and all its answers hold the pages of the prompt.

        Returns:
            The sequences whose prompts are complete, with logits of their first tokens; None if there are none.
        """
        pieces = self._next_pieces()
        if not pieces:
            return None
        logits_PV = self._decoder.prefill([piece for _, piece in pieces])

        # Read only if the request is cancelled or its weights are exchanged: the host need not wait for it here.
        has_nan_P = logits_PV.isnan().any(dim=-1)

        rows: list[int] = []
        sequences: list[AnswerSequence] = []
        for row, (answers, piece) in enumerate(pieces):
            first = answers[0]
            first.cached += len(piece.tokens)
            first.has_nan = has_nan_P[row]
            if self._prefixes:
                self._prefixes.add(first.digests, first.pages, piece.start, first.cached)
            if first.cached < first.n_prompt:
                continue
            # All answers to a request share the pages of its prompt until they write to them.
            self._prefilling.remove(answers)
            for sequence in answers[1:]:
                sequence.pages = list(first.pages)
                sequence.cached = first.cached
                self._page_pool.share(sequence.pages)
            sequences += answers
            rows += [row] * len(answers)
        if not sequences:
            return None

        positions = [sequence.cached for sequence in sequences]
        row_B, position_B = upload(self.device, torch.tensor(rows), torch.tensor(positions))
        return _LogitRows(sequences, logits_PV[row_B], position_B)

    def _next_pieces(self) -> list[tuple[list[AnswerSequence], Piece]]:
        """Returns the pieces of prompts for this step, each with the sequences of its request; empty if no prompt is
        unfinished.

        Each prompt gives its next piece, of at most `piece_tokens` tokens, oldest prompt first; a piece that does not
        fit waits. Together they have at most `step_tokens` tokens, unless the first one is longer. Nothing changes.
        """
        pieces: list[tuple[list[AnswerSequence], Piece]] = []
        tokens_left = self.options.step_tokens
        for answers in self._prefilling:
            first = answers[0]
            start = first.cached
            while start < first.n_prompt:
                end = min(first.n_prompt, start + self.options.piece_tokens)
                if pieces and (end - start > tokens_left or pieces[-1][0] is answers):
                    break  # one piece of a prompt per step: the next piece reads its cache
                pieces.append((answers, Piece(first.tokens[start:end], start, first.pages, first.request.adapter)))
                tokens_left -= end - start
                start = end
        return pieces

    def _extend(self) -> _LogitRows | None:
        """Lets the model read tokens that a constraint forced (in `_take_forced`): up to `piece_tokens` of a sequence,
        and together `step_tokens`, unless the first sequence has more.

        It sets their log-probabilities, and finishes sequences that end with them. A request whose logits are nan is
        refused.

        Returns:
            The sequences that have a choice again, with the logits of their next tokens; None if there are none.
        """
        sequences: list[AnswerSequence] = []
        pieces: list[Piece] = []
        next_tokens: list[int] = []
        for sequence in self._running:
            if sequence.n_to_compute <= 1 and not sequence.finish:
                continue  # a usual step
            start = sequence.cached
            tokens = sequence.tokens[start : start + min(sequence.n_to_compute, self.options.piece_tokens)]
            if pieces and len(next_tokens) + len(tokens) > self.options.step_tokens:
                continue
            sequences.append(sequence)
            pieces.append(Piece(tokens, start, sequence.pages, sequence.request.adapter))
            following = sequence.tokens[start + 1 : start + 1 + len(tokens)]
            next_tokens += [*following, *[0] * (len(tokens) - len(following))]  # 0: not known yet
        if not pieces:
            return None
        self._plan = None  # it would move these sequences by one position
        logprob_N, logits_PV = self._decoder.extend(pieces, next_tokens)
        (logprob_N,) = download(logprob_N)  # here the host waits for the device

        ready: list[int] = []
        for row, (sequence, logprob_n) in enumerate(
            zip(sequences, logprob_N.split([len(piece.tokens) for piece in pieces]), strict=True)
        ):
            if sequence.finish == "cancelled":  # its request was refused in this loop
                continue
            sequence.cached += len(logprob_n)
            raw_logprobs = logprob_n[: sequence.n_unscored].tolist()
            if any(map(math.isnan, raw_logprobs)):
                self._refuse(sequence.request, NAN)
                continue
            sequence.raw_logprobs += raw_logprobs
            if sequence.finish and not sequence.n_unscored:
                self._running.remove(sequence)
                self._finish(sequence, sequence.finish)
            elif sequence.cached == len(sequence.tokens):
                ready.append(row)
        if not ready:
            return None

        positions = [sequences[row].cached for row in ready]
        row_B, position_B = upload(self.device, torch.tensor(ready), torch.tensor(positions))
        return _LogitRows([sequences[row] for row in ready], logits_PV[row_B], position_B)

    def _decode(self) -> _LogitRows | None:
        """Runs the model on the newest token of every running sequence that waits for one token alone.

        It adds one to `cached` of each.

        Returns:
            These sequences, ordered by adapter, with the logits of their next tokens (sequences, V); None if there are
            none.
        """
        sequences = [sequence for sequence in self._running if sequence.n_to_compute == 1 and not sequence.finish]
        if not sequences:
            return None
        # Rows of one adapter are multiplied together.
        sequences.sort(key=lambda sequence: sequence.request.adapter)
        plan = self._plan_for(sequences)
        tokens = [sequence.tokens[-1] for sequence in sequences]
        if self._adapter_versions:
            logits_BV = self.decoder.decode(tokens, plan, [sequence.request.adapter for sequence in sequences])
        else:
            logits_BV = self._decoder.decode(tokens, plan)
        for sequence in sequences:
            sequence.cached += 1
        return _LogitRows(sequences, logits_BV, plan.position_B + 1)

    def _plan_for(self, sequences: list[AnswerSequence]) -> DecodePlan:
        """Returns the last step's plan, advanced, if no page has changed its holders; otherwise a new plan."""
        key = (self._page_pool.changes, *sequences)
        if self._plan and self._plan[0] == key:
            self._plan[1].advance()
        else:
            pages = [sequence.pages for sequence in sequences]
            self._plan = (key, self._decoder.plan(pages, [sequence.cached for sequence in sequences]))
        return self._plan[1]

    def _allocate_pages(self) -> None:
        """Makes sure that every running sequence has space for its tokens on pages that no other sequence holds.

        A page with other holders is copied. If no page is free, the youngest running sequence is preempted.
        """
        for sequence in list(self._running):
            while sequence in self._running and not self._has_pages(sequence):
                if not self._page_pool.n_free:
                    self._preempt(self._running[-1])
                    continue
                page = self._page_pool.take()
                # Copy on write: the last page of a shared prompt has space, but other sequences hold it too.
                if self._next_page_is_shared(sequence):
                    n_tokens = sequence.cached % self.options.page_tokens
                    self._decoder.copy_page(sequence.pages[-1], page, n_tokens)
                    self._page_pool.give_back([sequence.pages.pop()])
                sequence.pages.append(page)

    def _has_pages(self, sequence: AnswerSequence) -> bool:
        has_space = pages_for(len(sequence.tokens), self.options.page_tokens) <= len(sequence.pages)
        return has_space and not self._next_page_is_shared(sequence)

    def _next_page_is_shared(self, sequence: AnswerSequence) -> bool:
        page = sequence.cached // self.options.page_tokens
        return page < len(sequence.pages) and self._page_pool.holders(sequence.pages[page]) > 1

    def _preempt(self, sequence: AnswerSequence) -> None:
        """Moves a running sequence to the preempted ones: its pages' content goes to host memory, its pages become
        free."""
        self._running.remove(sequence)
        # The last page may be empty: it was taken for the next token.
        used_pages = sequence.pages[: pages_for(sequence.cached, self.options.page_tokens)]
        sequence.saved = self._decoder.save(used_pages)
        self._page_pool.give_back(sequence.pages)
        sequence.pages = []
        self._preempted.insert(0, sequence)

    # Sampling: one token for each sequence, and the end of answers.

    def _draw_tokens(self, rows: Sequence[_LogitRows]) -> None:
        """Draws a token for each sequence, adds it, calls the sequence's `on_text`, and finishes the sequences that
        end.

        A request whose logits are nan is refused, and one whose constraint allows no token. Here the host waits for the
        device. Elsewhere in a step it waits only if `_extend` scores forced tokens, or if preempted sequences move
        between device and host memory.
        """
        sequences = [sequence for part in rows for sequence in part.sequences]
        logits_BV = concatenated([part.logits_BV for part in rows])
        position_B = concatenated([part.position_B for part in rows])
        allowed = self._allowed(sequences)
        choice = self._sample(sequences, logits_BV, position_B, allowed)

        columns = [column.tolist() for column in (choice.token_B, choice.logprob_B, choice.raw_logprob_B)]
        sets = choice.sets or [None] * len(sequences)
        # nan in one row stays in that row, so only its request is refused. This comes before any `on_text`, which may
        # cancel the request: its pages would be free with nan in them.
        for sequence, raw_logprob in zip(sequences, columns[2], strict=True):
            if math.isnan(raw_logprob) and not sequence.finish:
                self._refuse(sequence.request, NAN)

        for row, (sequence, token, logprob, raw_logprob, token_set) in enumerate(
            zip(sequences, *columns, sets, strict=True)
        ):
            if sequence.finish:  # its request was cancelled or refused in this loop
                continue
            # The largest logit and the draw mean nothing where every token is forbidden.
            if is_forbidden(token, sequence.request.params, allowed.get(row)):
                self._refuse(sequence.request, NOTHING_ALLOWED)
                continue
            top_logprobs = choice.top_logprobs(row, sequence.request.params.top_logprobs)
            try:
                text = sequence.add(
                    token, logprob, raw_logprob, self._eot_id, self.config.max_seq_len, token_set, top_logprobs
                )
            except GrammarError as error:  # to follow the constraint takes more work than the library's limits
                self._refuse(sequence.request, str(error))
                continue
            if sequence.finish:
                self._running.remove(sequence)
                self._finish(sequence, sequence.finish)
            if sequence.on_text:  # last, because it may cancel the request
                sequence.on_text(sequence.request.id, sequence.index, token, text)
            self._take_forced(sequence)

    def _take_forced(self, sequence: AnswerSequence) -> None:
        """Adds the tokens that the constraint leaves no choice about, calls `on_text` for each, and stops where there
        is one. An answer that ends in such tokens stays running until `_extend` has scored them.

        A request whose constraint allows no token, or whose biases forbid the only one, is refused.
        """
        while sequence.matcher and not sequence.finish:
            try:
                sequence.allowed = sequence.matcher.allowed()
            except GrammarError as error:
                self._refuse(sequence.request, str(error))
                return
            token = only_token(sequence.allowed)
            if token is None:
                return
            if is_forbidden(token, sequence.request.params, None):
                self._refuse(sequence.request, NOTHING_ALLOWED)
                return

            # The only token there is has probability 1 where it is drawn; `_extend` lets the model score it.
            token_set = packed(np.array([token]), self.config.vocab_size) if sequence.request.keep_sets else None
            try:
                text = sequence.add(token, 0.0, None, self._eot_id, self.config.max_seq_len, token_set)
            except GrammarError as error:  # as in `_draw_tokens`
                self._refuse(sequence.request, str(error))
                return
            if sequence.on_text:
                sequence.on_text(sequence.request.id, sequence.index, token, text)

    def _allowed(self, sequences: Sequence[AnswerSequence]) -> dict[int, np.ndarray]:
        """Returns the tokens that each sequence with a constraint may draw, by its row, as `Matcher.allowed`.

        A request whose constraint cannot be followed any further (GrammarError) is refused, and has no entry.
        """
        allowed: dict[int, np.ndarray] = {}
        for row, sequence in enumerate(sequences):
            if not sequence.matcher or sequence.finish:
                continue
            try:
                allowed[row] = sequence.matcher.allowed() if sequence.allowed is None else sequence.allowed
            except GrammarError as error:
                self._refuse(sequence.request, str(error))
        return allowed

    def _sample(
        self,
        sequences: list[AnswerSequence],
        logits_BV: torch.Tensor,
        position_B: torch.Tensor,
        allowed: Mapping[int, np.ndarray],
    ) -> Choice:
        """Returns one token for each sequence, on the host; it changes no sequence.

        Logits pass through penalties and bias, then through the constraint, then through temperature and filters. The
        draw is keyed by the answer's seed (of the request and its index) and the position.

        Args:
            logits_BV: fp32.
            position_B: int64, position of the token to draw.
            allowed: bits of the tokens that rows with a constraint may draw.
        """
        plan = self._sampling_plan_for(sequences)
        tokens_of_rows = [sequence.tokens for sequence in sequences]
        adjusted_BV = adjusted(logits_BV, plan.params, tokens_of_rows, [sequence.n_prompt for sequence in sequences])
        if allowed:
            adjusted_BV = constrained(logits_BV if adjusted_BV is None else adjusted_BV, allowed)
        uniform_B = uniform(plan.seed_B, position_B)
        return sample(logits_BV, plan.groups, uniform_B, adjusted_BV, plan.keep_sets, plan.n_top)

    def _sampling_plan_for(self, sequences: list[AnswerSequence]) -> _SamplingPlan:
        """Returns the last step's plan, if the same sequences draw tokens; otherwise a new plan."""
        if self._sampling_plan is None or self._sampling_plan.sequences != sequences:
            params = [sequence.request.params for sequence in sequences]
            (seed_B,) = upload(self.device, torch.tensor([sequence.seed for sequence in sequences]))
            self._sampling_plan = _SamplingPlan(
                sequences=sequences,
                params=params,
                seed_B=seed_B,
                groups=group_rows(params, self.device),
                keep_sets=any(sequence.request.keep_sets for sequence in sequences),
                n_top=max(row_params.top_logprobs for row_params in params),
            )
        return self._sampling_plan

    def _finish(self, sequence: AnswerSequence, reason: FinishReason) -> None:
        sequence.finish = reason
        self._release(sequence)
        self._finished.append(sequence.answer(self.version_of(sequence.request.adapter)))

    def _refuse(self, request: Request, reason: str) -> None:
        """Refuses a request under way: ends its unfinished answers, and clears and frees their pages."""
        for queue in (self._running, self._preempted):
            for sequence in [sequence for sequence in queue if sequence.request is request]:
                queue.remove(sequence)
                self._clear_pages(sequence)
                self._release(sequence)
                sequence.finish = "cancelled"
        self._finished.append(Refusal(request.id, reason))

    def _clear_nan(self, sequence: AnswerSequence) -> None:
        """Clears the pages of a prompt that is not read to its end, if they hold nan."""
        if sequence.has_nan is not None and sequence.has_nan.item():
            self._clear_pages(sequence)

    def _clear_pages(self, sequence: AnswerSequence) -> None:
        """Writes zeros into the pages that the sequence alone holds, because they may hold nan."""
        # Whoever else holds a page goes on with it, or ends for the same nan and clears it.
        last_pages = [page for page in sequence.pages if self._page_pool.holders(page) == 1]
        if not last_pages:
            return
        if self._prefixes:
            self._prefixes.drop(last_pages)
        with torch.inference_mode():
            self._decoder.clear(last_pages)

    def _release(self, sequence: AnswerSequence) -> None:
        if sequence.saved is not None:
            self._decoder.forget(sequence.saved)
            sequence.saved = None
        self._page_pool.give_back(sequence.pages)
        sequence.pages = []

    def _build_decoder(self) -> "Decoder | ShardedDecoder":
        options = self.options
        if self._tp == 1:
            return Decoder(self.config, options.n_pages, options.page_tokens, self._dtype, self.device)
        from dist_lm.generation.sharded import ShardedDecoder  # needs process groups, which one device does not

        return ShardedDecoder(self.config, options.n_pages, options.page_tokens, self._dtype, self.device, self._tp)


def is_forbidden(token: int, params: SamplingParams, allowed_U: np.ndarray | None) -> bool:
    """Returns whether a bias of -inf or the bits of a constraint (`Matcher.allowed`; None: no constraint) forbid the
    token."""
    if params.logit_bias.get(token) == -math.inf:
        return True
    return allowed_U is not None and not allows(allowed_U, token)
