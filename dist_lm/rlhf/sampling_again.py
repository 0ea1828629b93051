"""Sampling again: prompts whose rollouts all score alike are replaced by the next ones (Yu et al. 2025, section 3.2).

An advantage relative to the group is 0 in such a group, so it gives no gradient. Which prompts are drawn depends only
on the weights and on the position in the order of prompts, and the number of them is kept with the rollouts, so a run
that was interrupted draws the same ones.

    round 1: draw `prompts` prompts        | keep the groups with a signal
    round 2: draw as many as are missing   | keep ...
    after the last round: fill up with groups without a signal, the earliest first

Only rules are looked at. With a reward model among the parts, whose scores hardly ever agree, every group has a signal.

Dimensions: B rollouts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dist_lm.config.rlhf import RewardPartConfig
from dist_lm.rlhf.rollouts import JudgedRollouts, Rollouts, joined

DrawPrompts = Callable[[int, int], Rollouts]
"""(position of the first prompt, number of prompts) -> their rollouts, by the weights that the source has."""


@dataclass(frozen=True)
class SamplingAgain:
    """Draws and judges the rollouts of an iteration, on the first rank."""

    draw: DrawPrompts
    judge: Callable[[Rollouts], JudgedRollouts]
    parts: Mapping[str, RewardPartConfig]
    prompts: int  # of an iteration
    rounds: int  # at most

    def __call__(self, position: int) -> JudgedRollouts:
        """The rollouts of `prompts` prompts, in the order of prompts from `position` on."""
        found: list[JudgedRollouts] = []
        informative: list[int] = []  # positions of prompts whose group has a signal
        drawn = 0
        for _ in range(self.rounds):
            missing = self.prompts - len(informative)
            if not missing:
                break
            found.append(self.judge(self.draw(position + drawn, missing)))
            drawn += missing
            informative += positions_with_signal(found[-1], self.parts)
        every = [int(place) for part in found for place in np.unique(part.rollouts.position_B)]
        others = [place for place in every if place not in set(informative)]
        kept = [*informative, *others[: self.prompts - len(informative)]]
        return joined(found).of_prompts(np.array(kept), left_out=drawn - len(kept))


def positions_with_signal(judged: JudgedRollouts, parts: Mapping[str, RewardPartConfig]) -> list[int]:
    """Positions of the prompts whose rollouts do not all have the same score; rollouts without a score do not count."""
    position_B = judged.rollouts.position_B
    if set(parts) - set(judged.scores):
        return [int(place) for place in np.unique(position_B)]
    score_B = sum((part.weight * judged.scores[name] for name, part in parts.items()), np.zeros(len(position_B)))
    found = []
    for place in np.unique(position_B):
        own = score_B[(position_B == place) & np.isfinite(score_B)]
        if len(own) and own.min() < own.max():
            found.append(int(place))
    return found
