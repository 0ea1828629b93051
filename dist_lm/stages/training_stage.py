"""What the program of a rank asks of a training stage."""

from collections.abc import Callable
from dataclasses import dataclass

from dist_lm.config import Config
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training.objective import Objective


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
