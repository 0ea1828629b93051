"""How far a training stage has come, as values: fed with lines of its metrics file and with what its gang says."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_lm.tracking.live.series import Series
from dist_lm.tracking.readable import four_digits, percent, three_decimals


@dataclass(frozen=True)
class Figure:
    """A metric that people watch while it moves."""

    metric: str
    label: str  # of its row, a word
    form: Callable[[float], str]
    unit: str = ""
    from_zero: bool = False  # its line is drawn over zero, not over its least value
    plain: str = ""  # how a plain line says it; empty: not at all


# a row each, in this order, where the stage has them
FIGURES = (
    Figure("train/loss", "loss", three_decimals, plain="loss {}"),
    Figure("val/bits_per_byte", "val", three_decimals, "bits/byte", plain="val {} bits/byte"),
    Figure("reward/accuracy", "accuracy", percent, "held out", plain="val accuracy {}"),
    Figure("tools/call_exact", "calls", percent, "exact"),
    Figure("rlhf/reward_mean", "reward", three_decimals, plain="reward {}"),
    Figure("rlhf/kl", "kl", three_decimals, "nats", from_zero=True, plain="kl {}"),
    Figure("rlhf/win_rate", "wins", percent, "held out"),
    Figure("perf/tokens_per_s", "speed", four_digits, "tokens/s", from_zero=True, plain="{} tokens/s"),
    Figure("train/lr", "lr", four_digits, from_zero=True),
)


@dataclass(frozen=True)
class GangFacts:
    """The ranks of an attempt, and where they are."""

    hosts: tuple[str, ...]  # one a node
    ranks_per_node: int
    device: str
    layout: str
    attempt: int = 1


@dataclass(frozen=True)
class RankPulse:
    """What a rank was last heard doing."""

    rank: int
    step: int  # completed steps
    doing: str
    age_s: float  # since it said so, when it was asked


@dataclass
class TrainingState:
    """A training stage under way; see `take`."""

    steps: int
    since: float = 0.0  # seconds since 1970: lines written before are of an earlier attempt
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)  # the newest of each metric
    series: dict[str, Series] = field(default_factory=dict)  # of the figures
    gang: GangFacts | None = None
    ranks: tuple[RankPulse, ...] = ()
    ranks_at: float = 0.0  # when they were asked, by the clock of the view
    saved: tuple[int, float | None] | None = None  # step of the newest checkpoint, when it came by the same clock
    best: tuple[int, float] | None = None  # step and val/loss
    _time: float = 0.0
    _first: tuple[int, float] | None = None  # step and time (s) from which the time left is reckoned

    def take(self, line: Mapping[str, Any]) -> bool:
        """Take in one line of the metrics file. Returns False for one of an earlier attempt, which is not timed."""
        step, at = line["step"], line.get("time", self._time)
        if step < self.step:  # lines were taken back, and the file is read again
            self.series, self.best = {}, None
        earlier = at < self.since
        if earlier:
            self._first = None
        elif self._first is None or step < self.step:
            self._first = (step, at)
        self.step, self._time = step, at
        finite = {
            name: value for name, value in line.items() if isinstance(value, int | float) and math.isfinite(value)
        }
        self.values.update(finite)
        for figure in FIGURES:
            if figure.metric in finite:
                self.series.setdefault(figure.metric, Series()).add(finite[figure.metric])
        loss = finite.get("val/loss")
        if loss is not None and (self.best is None or loss < self.best[1]):
            self.best = (step, loss)
        return not earlier

    def hear(self, ranks: Sequence[RankPulse], now: float) -> None:
        """Take in what the ranks were last heard doing."""
        self.ranks, self.ranks_at = tuple(ranks), now

    def save(self, step: int, at: float | None) -> None:
        """The newest checkpoint is that of `step` (0: there is none), and came at this time; None: not known."""
        if step and (self.saved is None or self.saved[0] != step):
            self.saved = (step, at)

    def start(self, gang: GangFacts) -> None:
        """Another attempt begins."""
        self.gang, self.ranks = gang, ()

    def seconds_left(self) -> float | None:
        """By the mean of this attempt so far; None: not known yet, or over."""
        if self._first is None or self.step <= self._first[0] or self.step >= self.steps:
            return None
        a_step = (self._time - self._first[1]) / (self.step - self._first[0])
        return a_step * (self.steps - self.step)

    def headline(self) -> str:
        """The figure that says most about the stage: what it is judged by on held-out data."""
        for name, words, form in (
            ("rlhf/win_rate", "wins {}", percent),
            ("rlhf/reward_mean", "reward {}", three_decimals),
            ("reward/accuracy", "accuracy {}", percent),
            ("tools/call_exact", "calls {} exact", percent),
            ("val/bits_per_byte", "val {} bits/byte", three_decimals),
            ("val/loss", "val loss {}", three_decimals),
            ("train/loss", "loss {}", three_decimals),
        ):
            if name in self.values:
                return words.format(form(self.values[name]))
        return ""
