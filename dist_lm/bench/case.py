"""What a benchmark compares, as values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_lm.config.root import Config
from dist_lm.launcher.compose import compose_config

TOKENS_A_SECOND = "tokens/s"
# randomness and regularisation off, so that the losses of what is compared can be compared
BASE = (
    "stage=language",
    "tracking=none",
    "parallel.compute_dtype=fp32",
    "parallel.compile=never",
    "stage.dropout=0",
    "stage.label_smoothing=0",
    "stage.document_mask=false",
)


@dataclass(frozen=True)
class CrewSize:
    """Processes that run one way of doing the work; ways with the same size share the same processes."""

    ranks: int
    threads: int = 1  # of each rank, on the CPU


@dataclass(frozen=True)
class Comparison:
    """One row of the table: a way, and what it is measured against."""

    own: str
    peer: str | None = None  # a way
    peer_name: str = ""  # for people; where `peer` is None but a name is given, that is why there is none
    ceiling: str | None = None  # a way that nothing of this kind can beat
    fact: str | None = None  # compare this fact of the trials, in its own unit; none: tokens/s


@dataclass(frozen=True)
class Case:
    """One workload and the ways to do it, all timed in the same rounds."""

    name: str
    config: Config
    ways: Mapping[str, CrewSize]
    comparisons: Sequence[Comparison]
    same_losses: frozenset[str]  # ways that have to show the same loss in the first steps
    rounds: int = 15
    amount: int = 0  # of `unit` that a step does, without the `/s`; 0: its tokens
    unit: str = TOKENS_A_SECOND

    @property
    def a_step(self) -> int:
        """What a step does, in `unit` times a second."""
        return self.amount or self.config.stage.global_batch * self.config.stage.seq_len


def configurations(shapes: Sequence[Sequence[str]], overrides: Sequence[str], quick: bool) -> list[Config]:
    """Composed with `overrides` where a user gives them, else with each of `shapes` (the first alone, if `quick`)."""
    chosen = [overrides] if overrides else shapes[:1] if quick else shapes
    return [compose_config([*BASE, *one]) for one in chosen]


def describe(config: Config) -> str:
    """`nano 160 wide 4 heads 2x64`."""
    model, stage = config.model, config.stage
    heads = f"{model.n_heads}/{model.kv_heads}" if model.kv_heads != model.n_heads else f"{model.n_heads}"
    return f"{model.name} {model.d_model} wide {heads} heads {stage.global_batch}x{stage.seq_len}"
