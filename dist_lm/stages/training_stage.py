"""What the program of a rank asks of a training stage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed import ProcessGroup

from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.data.stream import StepStream
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training.objective import Objective
from dist_lm.training.trainer import Evaluate


@dataclass(frozen=True)
class Opening:
    """What there is when a rank opens what it trains on."""

    config: Config
    run: RunDirectory
    world: World
    tokenizer: Tokenizer
    data_ranks: ProcessGroup  # those that have other data than this one, and this one
    dp_rank: int  # among them
    dp_size: int
    position: int  # sequences consumed so far


@dataclass(frozen=True)
class StageData:
    """What a rank trains on and is measured by."""

    stream: StepStream
    evaluate: Evaluate
    bytes_per_token: float = 0.0  # of the text that is trained on; 0: it is none


@dataclass(frozen=True)
class Closing:
    """What a stage has at hand when its last step is done, or before its first: on every rank."""

    config: Config
    run: RunDirectory
    world: World
    tokenizer: Tokenizer
    model: Callable[[], Transformer]  # makes a plain copy for evaluation, all of it on every rank (collective)
    step: int
    alive: Callable[[], None] = lambda: None  # to be called as work gets on


@dataclass(frozen=True)
class TrainingStage:
    """A stage that trains: what it optimises, and what it reports at its end."""

    name: str
    objective: Callable[[Config], Objective]
    close: Callable[[Closing], dict[str, float]]  # collective; metrics, the same on every rank
    open: Callable[[Closing], dict[str, float]] | None = None  # the same before the first step (stage.eval_at_start)
    data: Callable[[Opening], StageData] | None = None  # none: texts and conversations (`rank_data`)
    result: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda metrics: {}  # more for result.json, of its metrics
    made_up_batch: Callable[[Config], Batch] | None = None  # a micro-batch for the dry run; none: of tokens to predict
