"""What the fullest rank holds of a model in training, and what was measured beside it. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_lm.config.model import ModelConfig
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.placement import placements
from dist_lm.report.facts import RunFacts
from dist_lm.tracking.metric import LOOP_STAGES
from dist_lm.tracking.readable import counted, gib, readable_count
from dist_lm.training.parameter_groups import is_matrix

ELEMENT_BYTES = 4  # parameters, gradients and moments are kept in fp32; computing in bf16 casts what is gathered
MEMORY = "perf/memory_gib"


@dataclass(frozen=True)
class Part:
    """A part of a bar; `start` and `width` are per cent."""

    label: str
    size: str
    start: float
    width: float
    colour: int


@dataclass(frozen=True)
class RankMemory:
    """A bar, and words on what is not in it."""

    parts: tuple[Part, ...]
    total: str
    words: str


def rank_memory(model: ModelConfig, layout: Layout, runs: Sequence[RunFacts]) -> RankMemory:
    """Of runs that share model and layout. Of stage rlhf alone, the policy's weights are shown."""
    looped = [run for run in runs if run.stage in LOOP_STAGES]
    muon = all(_has_muon(run.config.get("stage", {})) for run in looped)
    sizes = {"weights": _elements(model, layout, lambda _: 1)}
    if looped:
        sizes["gradients"] = sizes["weights"]
        sizes["moments of the optimizer"] = _elements(model, layout, lambda name: 1 if muon and is_matrix(name) else 2)
    total, start, parts = sum(sizes.values()), 0.0, []
    for colour, (label, elements) in enumerate(sizes.items()):
        width = 100 * elements / total
        parts.append(Part(label, gib(elements * ELEMENT_BYTES), start, width, colour))
        start += width
    peaks = [peak for run in looped or runs if (peak := _peak(run)) is not None]
    words = [small_words(model, layout)]
    if others := [run.label for run in runs if run.stage not in LOOP_STAGES]:
        words.append(f"Of {', '.join(others)} this is the policy; critic, reference and reward model come on top.")
    if peaks:
        words.insert(
            0, f"Measured at most: {gib(max(peaks) * 2**30)}, with activations, messages and the program itself."
        )
    return RankMemory(
        tuple(parts),
        f"{gib(total * ELEMENT_BYTES)} of {'model and optimizer' if looped else 'weights'}",
        " ".join(words),
    )


def small_words(model: ModelConfig, layout: Layout) -> str:
    """What is not drawn: norms and biases."""
    small = {
        name: placement
        for name, placement in placements(model, layout).items()
        if len(placement.logical) < 2 or name.endswith("_bias")
    }
    whole = sum(math.prod(placement.logical) for placement in small.values())
    held = sum(math.prod(placement.local(layout)) for placement in small.values())
    return (
        f"Not drawn: {counted(len(small), 'norm')} and biases of {readable_count(whole)} elements in all, "
        f"of which a rank holds {readable_count(held)}."
    )


def _elements(model: ModelConfig, layout: Layout, times: Any) -> int:
    return sum(
        times(name) * math.prod(placement.local(layout)) for name, placement in placements(model, layout).items()
    )


def _has_muon(stage: Mapping[str, Any]) -> bool:
    return float((stage.get("muon") or {}).get("lr") or 0) > 0


def _peak(run: RunFacts) -> float | None:
    series = run.series.get(MEMORY)
    finite = [value for value in series.values.tolist() if math.isfinite(value)] if series else []
    return max(finite, default=None)
