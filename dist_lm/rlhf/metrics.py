"""What an iteration is measured by. Names follow TRL and OpenRLHF where they mean the same."""

import time
from collections.abc import Mapping, Sequence

from dist_lm.rlhf.advantages import Moments
from dist_lm.rlhf.algorithm import Prepared
from dist_lm.rlhf.collect import Collected
from dist_lm.rlhf.kl import k1
from dist_lm.rlhf.rollouts import Rollouts
from dist_lm.rlhf.state import RlhfState
from dist_lm.rlhf.update import Updates


class Clock:
    """Seconds by name, one after the other."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """All since the last lap was `name`."""
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        """`timing/NAME_s` of each, and `timing/iteration_s`."""
        laps = {f"timing/{name}_s": seconds for name, seconds in self._laps.items()}
        return laps | {"timing/iteration_s": self._last - self._started}


def iteration_metrics(
    state: RlhfState,
    rollouts: Rollouts,
    collected: Collected,
    prepared: Prepared,
    updates: Updates,
    drawing_s: float,
) -> dict[str, float]:
    """All but the clock's.

    Args:
        state: before the iteration.
        drawing_s: seconds that drawing took; 0 where that is not known.
    """
    experience, mask_BT = collected.experience, collected.experience.mask_BT
    score = float(experience.score_B.double().mean())
    metrics = {
        "rlhf/score_mean": score,
        "rlhf/reward_mean": score,
        "rlhf/entropy": float(Moments.of(collected.entropy_BT, mask_BT).mean),
        "rlhf/truncated_rate": 1 - float(rollouts.whole.mean()),
        "rlhf/new_tokens_mean": float(rollouts.new_tokens_B.mean()),
        "rlhf/updates": float(len(updates.metrics)),
        "rollout/staleness": float((state.version - rollouts.version_B).mean()),
    }
    if experience.reference_logprob_BT is not None:
        kl_BT = k1(experience.logprob_BT, experience.reference_logprob_BT) * mask_BT
        kl = float(kl_BT.double().sum() / len(rollouts))
        metrics |= {
            "rlhf/kl": kl,  # nats a sequence
            "rlhf/kl_coefficient": state.kl.coefficient,
            "rlhf/reward_mean": score - state.kl.coefficient * kl,
        }
    gap_BT = (experience.logprob_BT - collected.engine_logprob_BT).abs() * mask_BT
    metrics["rollout/logprob_gap"] = float(gap_BT.max())
    if drawing_s:
        metrics["rollout/tokens_per_s"] = float(rollouts.new_tokens_B.sum()) / drawing_s
    metrics |= {f"rlhf/part_{name}": float(score_B.double().mean()) for name, score_B in collected.part_B.items()}
    metrics |= {f"rlhf/{name}": value for name, value in prepared.metrics.items()}
    return metrics | {f"rlhf/{name}": value for name, value in _means(updates.metrics).items()}


def _means(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(line[name] for line in lines) / len(lines) for name in lines[0]}
