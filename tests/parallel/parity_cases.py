"""Which layouts, models and switches are compared with one process.

Every layout that only cuts heads meets every number of heads. The other choices are spread over the rows so that any
two values of any two of them meet somewhere (`test_parity.py` counts), instead of multiplying the matrix.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from itertools import combinations, product
from typing import Any

import pytest

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import ModelConfig
from dist_lm.parallel.layout import Layout

D_FF, VOCAB_SIZE, N_LAYERS = 90, 515, 2  # neither width divides by 4, nor the vocabulary by 2

WIDTHS = {25: 100, 12: 48, 8: 48, 6: 48, 5: 40, 4: 40}
"""d_model by number of heads."""

HEADS = ((25, 25), (5, 5), (4, 4), (25, 5), (12, 4), (8, 2), (6, 3), (5, 1))
"""(query heads, key/value heads): over 2 and 4 ranks whole groups and cut ones, more ranks than key heads, ranks that
hold nothing but padding."""

DATA_LAYOUTS = ("1x1x1", "1x2x1", "2x1x1", "1x4x1", "4x1x1", "2x2x1")
TENSOR_LAYOUTS = ("1x1x2", "1x1x4")
MIXED_LAYOUTS = ("1x1x2+sp", "1x1x4+sp", "1x2x2", "1x2x2+sp", "2x1x2")
EIGHT_RANKS = (("1x1x8", (25, 25)), ("1x1x8+sp", (25, 5)), ("2x2x2+sp", (25, 25)))
"""dp_replicate x dp_shard x tp, and whether sequences are split over tp too."""

CHOICES: dict[str, tuple] = {  # in an order in which the rows meet all pairs
    "ffn": ("gelu", "swiglu"),
    "reshard_after_forward": (True, False),
    "biases": ("none", "qkv", "all"),
    "tie_embeddings": (False, True),
    "scaled_part_rotated": (False, True),
    "activation_checkpointing": ("full", "none", "selective"),
    "chunked_loss": (False, True),
    "norm": ("layernorm", "rmsnorm"),
    "parallel_residual": (False, True),
    "reduce_every_micro_batch": (False, True),
}
BIASES = {"all": {}, "none": {"bias": False}, "qkv": {"bias": False, "qkv_bias": True}}
IN_MODEL = ("norm", "ffn", "parallel_residual", "tie_embeddings")
OF_MODEL = ("biases", "scaled_part_rotated", *IN_MODEL)


SMALL = ("1x1x1", "1x2x1", "1x1x4+sp", "1x2x2+sp")
"""Layouts of the small size of the tests; between them they cut whatever any layout cuts."""


def layouts(*names: str) -> list:
    """Parameters for tests: those not in SMALL are run at length."""
    return [pytest.param(name, marks=() if name in SMALL else pytest.mark.bars) for name in names]


@dataclass(frozen=True)
class Case:
    layout: str
    heads: tuple[int, int]
    choices: dict[str, Any]

    @property
    def world_size(self) -> int:
        return layout_of(self.layout).world_size

    @property
    def model(self) -> ModelConfig:
        positions = positions_of(self.heads) if self.choices["scaled_part_rotated"] else {}
        rest = {key: self.choices[key] for key in IN_MODEL}
        return model_of(self.heads, **BIASES[self.choices["biases"]], **positions, **rest)

    @property
    def parallel(self) -> ParallelConfig:
        rest = {key: value for key, value in self.choices.items() if key not in (*OF_MODEL, "chunked_loss")}
        return parallel_of(self.layout, **rest)

    @property
    def chunk_bytes(self) -> int:
        return 5 * 4 * VOCAB_SIZE if self.choices["chunked_loss"] else 0

    def __str__(self) -> str:
        words = [key if value is True else value for key, value in self.choices.items() if value is not False]
        return "-".join((self.layout, f"{self.heads[0]}of{self.heads[1]}", *words))


def model_of(heads: tuple[int, int], **changes: Any) -> ModelConfig:
    return ModelConfig(
        name="parity",
        d_model=WIDTHS[heads[0]],
        n_layers=N_LAYERS,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        d_ff=D_FF,
        max_seq_len=16,
        vocab_size=VOCAB_SIZE,
        init_std=0.05,
        **changes,
    )


def positions_of(heads: tuple[int, int]) -> dict[str, Any]:
    """Options of RoPE: it rotates one pair of a head, by a scaled frequency."""
    scaled = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_len": 12, "rope_base": 50.0}
    return {"rotary_fraction": 2 * heads[0] / WIDTHS[heads[0]], **scaled}


def layout_of(layout: str) -> Layout:
    return Layout(*(int(axis) for axis in layout.removesuffix("+sp").split("x")))


def parallel_of(layout: str, **changes: Any) -> ParallelConfig:
    values: dict[str, Any] = {"compute_dtype": "fp32", "compile": "never", "sp": layout.endswith("+sp")}
    return ParallelConfig(**asdict(layout_of(layout)), **(values | changes))


def cases() -> list[Case]:
    """The matrix, by rising number of ranks."""
    rows = [(layout, HEADS[(3 * i + j) % len(HEADS)]) for i, layout in enumerate(DATA_LAYOUTS) for j in range(3)]
    rows += product(TENSOR_LAYOUTS, HEADS)
    rows += [(layout, heads) for i, layout in enumerate(MIXED_LAYOUTS) for heads in HEADS[i % 2 :: 2]]
    rows += EIGHT_RANKS
    met: Counter = Counter()
    found = []
    for layout, heads in rows:
        row: dict[str, Any] = {"layout": layout, "heads": heads}
        for key, values in CHOICES.items():
            row[key] = min(values, key=lambda value: _meetings(met, row, key, value))
        met.update(combinations(row.items(), 2))
        found.append(Case(row.pop("layout"), row.pop("heads"), row))
    return sorted(found, key=lambda case: case.world_size)


def small_cases() -> list[Case]:
    """The fewest rows, found greedily, in which every layout of up to four ranks occurs, every number of heads meets
    every width of tensor parallelism, and any two values of any two other choices meet. The rest
    is run at length."""
    left = [case for case in cases() if case.world_size <= 4]
    missing = set().union(*(_facts(case) for case in left))
    found = []
    while missing:
        best = max(left, key=lambda case: len(_facts(case) & missing))
        missing -= _facts(best)
        found.append(best)
    return found


def _facts(case: Case) -> set[tuple]:
    """What a row shows of what `small_cases` has to show."""
    facts: set[tuple] = {("layout", case.layout), *combinations(case.choices.items(), 2)}
    tp = layout_of(case.layout).tp
    if tp > 1:
        facts.add((tp, case.heads))
    return facts


def _meetings(met: Counter, row: dict[str, Any], key: str, value: Any) -> tuple[int, int]:
    """How often `value` has met what is already in the row: (never met pairs first, then how often in all)."""
    counts = [met[(item, (key, value))] for item in row.items()]
    return -counts.count(0), sum(counts)
