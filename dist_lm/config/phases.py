"""`stage.phases`: parts of a run, each with a mix of corpora and a factor of the learning rate."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

from dist_lm.errors import require

_EPOCHS = re.compile(r"(\d+(?:\.\d+)?) epochs?")


@dataclass
class PhaseConfig:
    """A part of a run."""

    until: int | float | None = None  # its last step (800), or its end as a share of stage.steps (0.8); null: the end
    # corpus -> weight (3), or passes in this phase ("2 epochs"); weights divide the sequences that epochs leave
    mix: dict[str, int | float | str] = field(default_factory=dict)
    lr: float = 1.0  # multiplies the learning rate of the schedule


def phased_corpora(phases: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the names of the corpora in phases that are plain values, as in a `config.yaml`: sorted."""
    return sorted({str(name) for phase in phases for name in phase["mix"]})


def weights_of(mix: Mapping[str, int | float | str]) -> dict[str, Fraction]:
    """Returns the weights in the mix of a phase, as they are written: 0.1 is a tenth."""
    return {name: Fraction(str(weight)) for name, weight in mix.items() if not isinstance(weight, str)}


def epochs_in(mix: Mapping[str, int | float | str]) -> dict[str, Fraction]:
    """Returns the passes in the mix of a phase: `{tools: "2 epochs"}` gives 2 for tools."""
    matches = {name: _EPOCHS.fullmatch(amount) for name, amount in mix.items() if isinstance(amount, str)}
    return {name: Fraction(match[1]) for name, match in matches.items() if match}


def phase_ends(phases: Sequence[PhaseConfig], steps: int) -> list[int]:
    """Returns the last step of each phase, from 1; that of the last phase is `steps`."""
    ends = []
    for phase in phases:
        if phase.until is None:
            ends.append(steps)
        elif isinstance(phase.until, int):
            ends.append(phase.until)
        else:
            ends.append(round(Fraction(str(phase.until)) * steps))
    return ends


def rate_factor(phases: Sequence[PhaseConfig], steps: int, step: int) -> float:
    """Returns the factor of the learning rate at a 0-based step of a run of `steps`; `phases` are not empty."""
    for phase, end in zip(phases, phase_ends(phases, steps), strict=True):
        if step < end:
            return phase.lr
    return phases[-1].lr


def check_phases(phases: Sequence[PhaseConfig], steps: int) -> None:
    """Refuses phases that do not follow one another up to the last step, and amounts that are neither weights nor
    epochs.

    Raises:
        ConfigError: names the phase, the key and what would be accepted.
    """
    for i, phase in enumerate(phases):
        key, is_last = f"stage.phases[{i}]", i == len(phases) - 1
        require(0 < phase.lr < math.inf, f"{key}.lr", phase.lr, "a positive factor of the learning rate")
        if is_last:
            require(phase.until is None, f"{key}.until", phase.until, "none: the last phase goes on to the last step")
        else:
            accepted = "a step (800), or a share of stage.steps (0.8)"
            is_share = isinstance(phase.until, float) and 0 < phase.until < 1
            require(isinstance(phase.until, int) or is_share, f"{key}.until", phase.until, accepted)
        _check_amounts(f"{key}.mix", phase.mix)

    ends = [0, *phase_ends(phases, steps)]
    for i, (before, end) in enumerate(pairwise(ends)):
        accepted = f"a step after {before:,} and before stage.steps={steps:,}"
        if i == len(phases) - 1:
            accepted = f"more than {before:,}, the steps of the phases before the last one"
            require(before < end, "stage.steps", steps, accepted)
        else:
            require(before < end < steps, f"stage.phases[{i}].until", phases[i].until, accepted)


def _check_amounts(key: str, mix: Mapping[str, int | float | str]) -> None:
    """Refuses the mix of a phase without a weight, since passes alone hardly ever fill its steps exactly.

    Raises:
        ConfigError: names the corpus and what would be accepted.
    """
    accepted = 'a positive weight (3), or passes in this phase ("2 epochs")'
    for name, amount in mix.items():
        is_weight = isinstance(amount, int | float) and 0 < amount < math.inf
        is_epochs = isinstance(amount, str) and any(epochs_in({name: amount}).values())
        require(is_weight or is_epochs, f"{key}.{name}", amount, accepted)
    require(bool(weights_of(mix)), key, mix, "at least one corpus with a weight, which takes what epochs leave")
