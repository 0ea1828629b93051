"""Alerts for people, derived from the metrics of a run and from their absence. Pure: `wandb_run` sends them."""

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dist_lm.tracking.readable import four_digits

QUIET_S = 300.0  # seconds; shortest time between two alerts of the same kind
FIRST_LINE_S = 1800.0  # seconds allowed before the first step: start, compilation
STALLED_STEPS = 20  # a run is stalled after this many times the usual interval
INTERVALS = 64  # the usual interval is the median of this number of newest ones
# Counters whose increase is an alert, with its kind and text.
COUNTERS = {
    "train/loss_spikes": ("loss spike", "train/loss is far above its recent mean"),
    "train/skipped_steps": ("NaN", "gradients were NaN or infinite, the step was skipped"),
}
# The first that a finished run has are named in the message.
RESULTS = ("val/loss", "train/loss", "rlhf/reward_mean", "generate/answers")

# A null in metrics.jsonl means that the number was not finite.
FINITE = ("train/loss", "train/grad_norm")


@dataclass(frozen=True)
class Alert:
    """A message for people."""

    title: str
    text: str
    level: Literal["INFO", "WARN", "ERROR"]


def finished(name: str, metrics: dict[str, float]) -> Alert:
    """Returns the alert for a run that is complete; it names the newest `RESULTS`."""
    figures = (f"{key} {four_digits(metrics[key])}" for key in RESULTS if key in metrics)
    return Alert(f"{name} finished", ", ".join(figures) or "all steps are done", "INFO")


def failed(name: str, error: str, again: bool) -> Alert:
    """Returns the alert for a failed gang; with `again` another attempt follows."""
    if again:
        return Alert(f"{name} restarts", error, "WARN")
    return Alert(f"{name} failed", error, "ERROR")


class AlertWatch:
    """Follows the metrics of one run over its attempts; it must not get the lines of an earlier attempt again."""

    def __init__(self, name: str, now: float) -> None:
        """Begins at `now` (seconds of a monotonic clock)."""
        self._name = name
        self._counts: dict[str, float] = {}
        self._alerted_at: dict[str, float] = {}
        # A run that is silent from the start is stalled, too.
        self._line_at = now
        self._intervals: deque[float] = deque(maxlen=INTERVALS)
        self._stepped = False  # whether this attempt has written a line

    def attempt(self, now: float) -> None:
        """Notes that another gang starts: it is allowed the time of a start. The usual interval and the counters
        stay."""
        self._line_at = now
        self._stepped = False
        self._alerted_at.pop("stalled", None)

    def line(self, line: Mapping[str, Any], now: float) -> list[Alert]:
        """Returns the alerts for a line of the metrics file, and notes its time: for a counter of COUNTERS that grew
        since the last line, and for a loss or norm that is not finite (None).

        The first value of a counter, or a lower one (a resumed run), gives none. Of each kind there is at most one
        alert in QUIET_S seconds.

        Args:
            now: seconds, as in `__init__`.
        """
        if self._stepped:
            self._intervals.append(now - self._line_at)
        self._line_at = now
        self._stepped = True
        self._alerted_at.pop("stalled", None)

        alerts = []
        for counter, (kind, text) in COUNTERS.items():
            before, count = self._counts.get(counter), line.get(counter)
            if count is not None:
                # The first line only sets the counters: earlier attempts have reported what they counted.
                self._counts[counter] = count
                if before is not None and count > before:
                    alerts += self._alert(kind, f"step {line['step']}: {text}", now)

        for name in FINITE:
            if name in line and line[name] is None:
                alerts += self._alert("NaN", f"step {line['step']}: {name} is not finite", now)

        return alerts

    def tick(self, now: float) -> list[Alert]:
        """Returns an alert if no line was written for unusually long, one for each silence; else none.

        Unusually long is more than FIRST_LINE_S seconds before an attempt's first line, later more than STALLED_STEPS
        times the median interval and more than QUIET_S seconds.
        """
        patience_s = FIRST_LINE_S
        if self._stepped:
            usual_s = statistics.median(self._intervals or [0.0])
            patience_s = max(QUIET_S, STALLED_STEPS * usual_s)

        silent_s = now - self._line_at
        if silent_s <= patience_s or "stalled" in self._alerted_at:
            return []

        self._alerted_at["stalled"] = now
        return [Alert(f"{self._name}: stalled", f"no step has been done for {silent_s:.0f} s", "WARN")]

    def _alert(self, kind: str, text: str, now: float) -> list[Alert]:
        if now - self._alerted_at.get(kind, -QUIET_S) < QUIET_S:
            return []
        self._alerted_at[kind] = now
        return [Alert(f"{self._name}: {kind}", text, "WARN")]
