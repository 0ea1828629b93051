"""Arguments that the program of a rank passes to the methods of a training stage, and what they return."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_lm.config.root import Config
from dist_lm.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch.distributed import ProcessGroup

    from dist_lm.data.stream import StepStream
    from dist_lm.model.transformer import Transformer
    from dist_lm.parallel.mesh import World
    from dist_lm.tokenizer.tokenizer import Tokenizer
    from dist_lm.training.trainer import Evaluate


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


def batch_options(arguments: DataArguments) -> dict[str, Any]:
    """Returns the keyword arguments that all streams and all evaluation batches take."""
    return {
        "seq_len": arguments.config.stage.seq_len,
        "micro_batch": arguments.config.stage.micro_batch,
        # Tensor-parallel ranks of a group have one dp_rank: they read the same sequences.
        "dp_rank": arguments.dp_rank,
        "dp_size": arguments.dp_size,
        "pad_id": arguments.tokenizer.pad_id,
        "first_token": arguments.tokenizer.first_token,
    }


def sequence_limit(config: Config, everything: bool) -> int:
    """Returns the largest number of held-out sequences that an evaluation reads; 0: `everything`."""
    return 0 if everything else config.stage.eval_sequences


@dataclass(frozen=True)
class StageData:
    """Training stream and evaluation of a rank."""

    stream: "StepStream"
    evaluate: "Evaluate"
    bytes_per_token: float = 0.0  # mean of the training text; 0: the data is not text


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
