"""Arguments that the program of a rank passes to the methods of a training stage, and what they return."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dist_lm.config.root import Config
from dist_lm.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch.distributed import ProcessGroup

    from dist_lm.data.epochs import CorpusPass
    from dist_lm.data.order import DocumentSlice
    from dist_lm.data.stream import StepStream
    from dist_lm.data.token_corpus import TokenCorpus
    from dist_lm.model.transformer import Transformer
    from dist_lm.parallel.mesh import World
    from dist_lm.tokenizer.tokenizer import Tokenizer
    from dist_lm.training.trainer import Evaluate


class TrainingSequences(Protocol):
    """The sequences that a training stream reads, numbered 0, 1, 2, ... over all epochs."""

    @property
    def corpora(self) -> "list[TokenCorpus]":
        """Its corpora, that of the stage first."""
        ...

    def slices(self, number: int) -> "tuple[TokenCorpus, list[DocumentSlice]]":
        """Returns the corpus of a sequence, and the parts of documents in it."""
        ...

    def numbers(
        self, corpus: "TokenCorpus", parts: "Sequence[DocumentSlice]", end: int
    ) -> "dict[DocumentSlice, list[int]]":
        """Returns the sequences below `end` that hold a token of each part of a document."""
        ...


@dataclass(frozen=True)
class DataArguments:
    """Arguments of `TrainingStage.open_data` on a rank."""

    config: Config
    run: RunDirectory
    world: "World"
    tokenizer: "Tokenizer"
    data_ranks: "ProcessGroup"  # the ranks that read different data, this one included
    dp_rank: int  # among `data_ranks`
    dp_size: int
    position: int  # sequences consumed so far
    initial: "Callable[[], AbstractContextManager[Transformer]] | None" = None  # the model that training starts from
    alive: Callable[[], None] = lambda: None  # writes a heartbeat; long preparations call it regularly
    scoring: Callable[[float], None] = lambda done: None  # likewise, with the share of log-probabilities computed


@dataclass(frozen=True)
class StageData:
    """Training stream and evaluation of a rank."""

    stream: "StepStream"
    evaluate: "Evaluate"
    bytes_per_token: float = 0.0  # mean of the training text; 0: the data is not text
    passes: "tuple[CorpusPass, ...]" = ()  # corpora of the stream, that of the stage first
    phases: Sequence[dict[str, Any]] = ()  # stage.phases in numbers, for `TrainState.phases`


@dataclass(frozen=True)
class EvaluationArguments:
    """Arguments of `TrainingStage.before_training` and `after_training` on a rank."""

    config: Config
    run: RunDirectory
    world: "World"
    tokenizer: "Tokenizer"
    model: "Callable[[], Transformer]"  # makes a whole copy of the model on every rank (collective)
    step: int
    alive: Callable[[], None] = lambda: None  # writes a heartbeat; call it regularly
