"""Alerts for people, derived from the metrics of a run and from their absence. Pure: `wandb_run` sends them."""

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dist_lm.tracking.readable import four_digits

QUIET_S = 300.0  # at least this long between two alerts of the same kind
FIRST_LINE_S = 1800.0  # allowed before the first step: start, compilation
STALLED_STEPS = 20  # a run is stalled after this many times the usual interval
INTERVALS = 64
COUNTERS = {
    "train/loss_spikes": ("loss spike", "train/loss is far above its recent mean"),
    "train/skipped_steps": ("NaN", "gradients were NaN or infinite, the step was skipped"),
}
RESULTS = ("val/loss", "train/loss", "rlhf/reward_mean", "generate/answers")
FINITE = ("train/loss", "train/grad_norm")


@dataclass(frozen=True)
class Alert:
    """A message for people."""

    title: str
    text: str
    level: Literal["INFO", "WARN", "ERROR"]


def finished(name: str, metrics: dict[str, float]) -> Alert:
    """The run is complete."""
    shown = (f"{key} {four_digits(metrics[key])}" for key in RESULTS if key in metrics)
    return Alert(f"{name} finished", ", ".join(shown) or "all steps are done", "INFO")


def failed(name: str, error: str, again: bool) -> Alert:
    """A gang failed; `again`: another attempt follows."""
    if again:
        return Alert(f"{name} restarts", error, "WARN")
    return Alert(f"{name} failed", error, "ERROR")


class AlertWatch:
    """Follows the metrics of one run over its attempts; it must not get the lines of an earlier attempt again."""

    def __init__(self, name: str, now: float) -> None:
        """Begin at `now` (seconds of a monotonic clock)."""
        self._name = name
        self._counts: dict[str, float] = {}
        self._said: dict[str, float] = {}
        self._line_at = now
        self._intervals: deque[float] = deque(maxlen=INTERVALS)
        self._any = False

    def attempt(self, now: float) -> None:
        """Another gang starts: it has the patience of a start. The usual interval and the counters are kept."""
        self._line_at, self._any = now, False
        self._said.pop("stalled", None)

    def line(self, line: Mapping[str, Any], now: float) -> list[Alert]:
        """Alerts for a line of the metrics file; a counter that decreased (a resumed run) gives none."""
        if self._any:
            self._intervals.append(now - self._line_at)
        self._line_at, self._any = now, True
        self._said.pop("stalled", None)
        found = []
        for counter, (kind, text) in COUNTERS.items():
            before, count = self._counts.get(counter), line.get(counter)
            if count is not None:
                self._counts[counter] = count
                if before is not None and count > before:
                    found += self._say(kind, f"step {line['step']}: {text}", now)
        for name in FINITE:
            if name in line and line[name] is None:
                found += self._say("NaN", f"step {line['step']}: {name} is not finite", now)
        return found

    def tick(self, now: float) -> list[Alert]:
        """Alerts for the absence of lines."""
        usual = statistics.median(self._intervals) if self._intervals else 0.0
        patience = max(QUIET_S, STALLED_STEPS * usual) if self._any else FIRST_LINE_S
        silent = now - self._line_at
        if silent <= patience or "stalled" in self._said:
            return []
        self._said["stalled"] = now
        return [Alert(f"{self._name}: stalled", f"no step has been done for {silent:.0f} s", "WARN")]

    def _say(self, kind: str, text: str, now: float) -> list[Alert]:
        if now - self._said.get(kind, -QUIET_S) < QUIET_S:
            return []
        self._said[kind] = now
        return [Alert(f"{self._name}: {kind}", text, "WARN")]
