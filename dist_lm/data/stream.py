"""Makes training batches without end, from one integer of state.

Sequences are numbered 0, 1, 2, ... over all epochs. A step takes the next `global_batch` of them, and a
data-parallel rank its contiguous part, so a run can continue from the integer at any number of ranks.

For each step a thread asks `sequences.MixedSequences` for the contents of the sequences: an order (`order.py`) says
which slices they hold, and `token_corpus.py` where the tokens lie. `batch.assemble` then reads them into batches.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from dist_lm.data.batch import Batch, assemble
from dist_lm.data.infill import Infill
from dist_lm.data.packing import DROP
from dist_lm.data.sequences import DOCUMENTS, SEQ_LEN, MixedSequences, PhasedCorpora
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ConfigError
from dist_lm.tokenizer.tokenizer import FirstToken

if TYPE_CHECKING:
    from dist_lm.data.without import DocumentIds

PREFETCH = 2  # steps prepared ahead
FETCHED_AHEAD = 4  # steps whose pieces of remote tars are fetched before they are prepared
FETCHES = 8  # requests of a rank at once
ALIVE_S = 10.0  # between signs of life while a step waits for a store


@dataclass(frozen=True, slots=True)
class StepData:
    """The data of one rank for one optimizer step."""

    position: int  # sequences consumed over all ranks after this step: the state of the stream
    micro_batches: list[Batch]
    tokens: int  # tokens of the micro-batches, padding excluded


class StepStream(Iterator[StepData]):
    """The steps from `position` on, prepared ahead by a thread. A context manager; `close` ends the thread.

    The state is that of the last delivered step (`StepData.position`), so steps prepared ahead do not count. An error
    in the thread is raised by the `next` that would have delivered the step.
    """

    def __init__(
        self,
        batches_of: Callable[[list[list[int]]], Iterable[Batch]],
        *,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        position: int = 0,
        pin_memory: bool = False,
        packing: dict[str, float] | None = None,
    ) -> None:
        """Starts to prepare steps.

        Args:
            batches_of: makes the micro-batches of a step, from the global sequence numbers of each; called in the
                thread.
            position: sequences consumed over all ranks before the first step.
            packing: figures of how the stage's own corpus is packed, for `result.json`; None for text.

        Raises:
            ConfigError: the batch does not divide over the ranks.
        """
        self.packing = packing
        self._batches_of = batches_of
        self._global_batch = global_batch
        self._micro_batches = rank_micro_batches(global_batch, micro_batch, dp_rank, dp_size)
        self._pin_memory = pin_memory
        self._next_position = position  # position of the next step to prepare
        self._steps: deque[Future[StepData]] = deque()

        # Pinning belongs to a CUDA device, and the current one is a setting of the thread.
        initializer = None
        if pin_memory:
            initializer = partial(torch.cuda.set_device, torch.cuda.current_device())
        self._thread = ThreadPoolExecutor(1, "stream", initializer)
        for _ in range(PREFETCH):
            self._prepare_next()

    def __next__(self) -> StepData:
        if not self._steps:
            raise StopIteration  # closed
        # A step that failed stays at the head, so every later call raises its error again.
        step = self._steps[0].result()
        self._steps.popleft()
        self._prepare_next()
        return step

    def wait(self, alive: Callable[[], None]) -> None:
        """Waits until the next step is there, or its error.

        Args:
            alive: called every `ALIVE_S` while a store that fails is asked again, because such a wait is no hang.
        """
        if not self._steps:
            return  # closed
        step = self._steps[0]
        while wait([step], ALIVE_S).not_done:
            if self._waits_for_store():
                alive()

    def _waits_for_store(self) -> bool:
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drops the prepared steps and ends the thread, after the step that it is preparing. `next` then stops."""
        self._steps.clear()
        self._thread.shutdown(cancel_futures=True)

    def _prepare_next(self) -> None:
        self._steps.append(self._thread.submit(self._step, self._next_position))
        self._next_position += self._global_batch

    def _step(self, position: int) -> StepData:
        micro_batches, tokens = [], 0
        numbers = [[position + offset for offset in offsets] for offsets in self._micro_batches]
        for batch in self._batches_of(numbers):
            tokens += batch.n_tokens
            micro_batches.append(batch.pin_memory() if self._pin_memory else batch)
        return StepData(position + self._global_batch, micro_batches, tokens)


class SequenceStream(StepStream):
    """The steps of text and conversations."""

    def __init__(
        self,
        corpus: TokenCorpus,
        *,
        seed: int,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        position: int = 0,
        document_mask: bool = True,
        reset_positions: bool = True,
        pad_id: int = 0,
        first_token: FirstToken | None = None,
        mix: Mapping[TokenCorpus, float] | PhasedCorpora | None = None,
        pin_memory: bool = False,
        seq_len_key: str = SEQ_LEN,
        infill: Infill | None = None,
        too_long: str = DROP,
        without: "DocumentIds | None" = None,
        order: str = DOCUMENTS,
    ) -> None:
        """Opens the stream. Arguments that are not listed are those of `StepStream` and `assemble`.

        Args:
            mix, seq_len_key, infill, too_long, without, order: as for `MixedSequences`.
            pad_id: the token that fills rows up.
            first_token: of the tokenizer; None: documents begin with end-of-text.

        Raises:
            ConfigError: the batch does not divide over the ranks, or a corpus cannot fill a phase.
            ArtefactError: a corpus fills no sequence.
        """
        self._sequences = MixedSequences(
            corpus,
            seed=seed,
            seq_len=seq_len,
            mix=mix,
            seq_len_key=seq_len_key,
            infill=infill,
            too_long=too_long,
            without=without,
            order=order,
        )
        self.corpora = self._sequences.of_corpora
        self.n_sequences = self.corpora[0].n_sequences  # an epoch

        self._seq_len, self._pad_id, self._first_token = seq_len, pad_id, first_token
        self._document_mask, self._reset_positions = document_mask, reset_positions

        self._fetches: ThreadPoolExecutor | None = None
        if any(each.is_remote for each in self._sequences.corpora):
            self._fetches = ThreadPoolExecutor(FETCHES, "fetch")
        self._fetched_to = position  # steps before this position were given to the pool

        packing = self.corpora[0].packing
        super().__init__(
            self._batches,
            global_batch=global_batch,
            micro_batch=micro_batch,
            dp_rank=dp_rank,
            dp_size=dp_size,
            position=position,
            pin_memory=pin_memory,
            packing=packing.report() if packing else None,
        )

    def close(self) -> None:
        """Ends the thread as `StepStream.close` does, and drops requests that were not sent yet."""
        for sequences in self.corpora:
            sequences.corpus.stop_waiting()
        super().close()
        if self._fetches:
            self._fetches.shutdown(wait=False, cancel_futures=True)

    def _waits_for_store(self) -> bool:
        return any(sequences.corpus.waits_for_store for sequences in self.corpora)

    def _step(self, position: int) -> StepData:
        if self._fetches:
            self._fetch_ahead(position, self._fetches)
        return super()._step(position)

    def _fetch_ahead(self, position: int, pool: ThreadPoolExecutor) -> None:
        """Has a pool fetch what the steps behind `position` read of remote corpora. The order of data is not touched.

        Runs in the thread that prepares steps, because the orders of epochs belong to it.
        """
        while self._fetched_to <= position + FETCHED_AHEAD * self._global_batch:
            for offsets in self._micro_batches:
                for offset in offsets:
                    corpus, slices = self._sequences.slices(self._fetched_to + offset)
                    if corpus.is_remote:
                        corpus.read_ahead(slices, pool)
            self._fetched_to += self._global_batch

    def _batches(self, numbers: list[list[int]]) -> Iterator[Batch]:
        """Yields the micro-batches of a step, each of some global sequence numbers, in host memory.

        Raises:
            ArtefactError: a tar is damaged.
        """
        # The whole step is looked up at once, which takes less time than micro-batch by micro-batch.
        contents = iter(self._sequences.contents([number for batch in numbers for number in batch]))
        for numbers_of_batch in numbers:
            yield assemble(
                list(islice(contents, len(numbers_of_batch))),
                numbers_of_batch,
                seq_len=self._seq_len,
                document_mask=self._document_mask,
                reset_positions=self._reset_positions,
                pad_id=self._pad_id,
                first_token=self._first_token,
            )


def rank_micro_batches(global_batch: int, micro_batch: int, dp_rank: int, dp_size: int) -> list[range]:
    """Returns the micro-batches of one rank as ranges of places in the `global_batch` sequences of a step.

    All ranks have the same number of micro-batches, of the same sizes. Only the last one may be smaller than
    `micro_batch`.

    Args:
        micro_batch: sequences of a micro-batch.
        dp_rank: number of the data-parallel rank, of `dp_size`.

    Raises:
        ConfigError: `global_batch` is no multiple of `dp_size`.
    """
    assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
    if global_batch % dp_size:
        below = global_batch // dp_size * dp_size
        accepted = f"{below} or {below + dp_size}" if below else f"{dp_size}"
        raise ConfigError(
            f"stage.global_batch={global_batch} does not divide over {dp_size} data-parallel ranks: expected a "
            f"multiple of {dp_size}, such as {accepted}"
        )

    # A contiguous part for each rank: in whatever layout, the step has the same sequences.
    share = global_batch // dp_size
    begin, end = dp_rank * share, (dp_rank + 1) * share
    return [range(first, min(first + micro_batch, end)) for first in range(begin, end, micro_batch)]
