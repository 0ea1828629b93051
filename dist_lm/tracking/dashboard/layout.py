"""What a dashboard shows, as values: a section a group of metrics, a panel a metric or several that belong together.

Everything here follows from the registry. A metric that is added there has a panel of its own at the next push;
`TOGETHER` says which ones share one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dist_lm.errors import require
from dist_lm.tracking.metric import MEASURED_STAGES, Metric
from dist_lm.tracking.registry import metrics_of

OVERVIEW = "overview"
BOARDS = (OVERVIEW, *MEASURED_STAGES)

# title -> metrics that are read against each other, in one panel where its first one belongs
TOGETHER = {
    "Loss, trained and held out": ("train/loss", "val/loss"),
    "Where the time of a step goes": (
        "perf/data_wait_s",
        "perf/forward_s",
        "perf/backward_s",
        "perf/optimizer_s",
        "perf/communication_s",
    ),
    "Where the time of an iteration goes": (
        "timing/rollout_s",
        "timing/forward_s",
        "timing/update_s",
        "timing/push_s",
        "timing/iteration_s",
    ),
    "Tokens a second": ("perf/tokens_per_s", "rollout/tokens_per_s"),
    "Steps that went wrong": ("train/skipped_steps", "train/loss_spikes"),
    "Score and reward": ("rlhf/reward_mean", "rlhf/score_mean"),
    "Prompts that were done": ("generate/prompts", "generate/refused"),
    "Losses": ("rlhf/policy_loss", "rlhf/value_loss", "rlhf/pretrain_loss"),
    "Gradient norms": ("rlhf/policy_grad_norm", "rlhf/value_grad_norm"),
    "Tokens clipped": ("rlhf/clip_frac", "rlhf/value_clip_frac"),
    "Value and return": ("rlhf/value_mean", "rlhf/return_mean"),
    "Score on held-out prompts": ("rlhf/held_out_score", "rlhf/held_out_score_reference"),
    "Score of the model it started from": ("reward/score_mean", "reward/score_std"),
}
# values over several powers of ten, none of them zero or less
LOGARITHMIC = ("train/grad_norm", "train/grad_norm_{group}", "train/update_ratio", "rlhf/policy_grad_norm")
# groups before and after those that only one stage has
FIRST, LAST = ("loss", "held-out"), ("updates", "optimizer", "throughput", "memory", "time", "system")
OPEN = 4  # sections, from the first on
# of every stage, what the overview compares
COMPARED = {
    "learning": ("train/loss", "val/loss", "val/bits_per_byte"),
    "speed": ("perf/tokens_per_s", "perf/tokens_per_s_per_rank", "perf/mfu", "perf/step_s"),
    "tools": ("tools/call_exact", "tools/irrelevance"),
    "code": ("code/parses_{language}",),
    "reward": ("reward/accuracy", "reward/kendall_tau"),
    "rlhf": ("rlhf/reward_mean", "rlhf/score_mean", "rlhf/kl", "rlhf/win_rate"),
    "generate": ("generate/tokens_per_s", "generate/prompts"),
}


@dataclass(frozen=True)
class Panel:
    """A line plot over steps."""

    title: str
    metrics: tuple[Metric, ...]  # single ones, or families that one pattern covers
    pattern: str = ""  # of a family: a regular expression (RE2) that names match from end to end

    @property
    def unit(self) -> str:
        """Of its values; empty where they have none or differ."""
        units = {metric.unit for metric in self.metrics}
        return units.pop() if len(units) == 1 else ""

    @property
    def logarithmic(self) -> bool:
        """Whether the values are better seen as powers of ten."""
        return all(metric.name in LOGARITHMIC for metric in self.metrics)

    @property
    def names(self) -> tuple[str, ...]:
        """What it plots by name; empty of a family."""
        return () if self.pattern else tuple(metric.name for metric in self.metrics)

    def shows(self, name: str) -> bool:
        """Whether a metric of a run is in it."""
        return bool(re.fullmatch(self.pattern, name)) if self.pattern else name in self.names


@dataclass(frozen=True)
class Section:
    """Panels under a heading."""

    name: str
    panels: tuple[Panel, ...]
    is_open: bool


@dataclass(frozen=True)
class Board:
    """A workspace: that of a stage, or the overview."""

    name: str
    title: str
    sections: tuple[Section, ...]

    @property
    def stage(self) -> str:
        """Whose runs it shows; empty: all."""
        return "" if self.name == OVERVIEW else self.name

    @property
    def panels(self) -> tuple[Panel, ...]:
        """Of all sections."""
        return tuple(panel for section in self.sections for panel in section.panels)


def boards() -> tuple[Board, ...]:
    """The overview, then a board for each stage that writes metrics."""
    return tuple(board_of(name) for name in BOARDS)


def boards_named(name: str | None) -> tuple[Board, ...]:
    """One board, or all of them.

    Raises:
        ConfigError: there is no board of this name.
    """
    if name is None:
        return boards()
    require(name in BOARDS, "board", name, ", ".join(BOARDS))
    return (board_of(name),)


def board_of(name: str) -> Board:
    """The board of a stage, or `overview`."""
    if name == OVERVIEW:
        return Board(name, "dist_lm overview of the pipeline", tuple(_compared()))
    panels = list(_panels(metrics_of(name)))
    groups = sorted(dict.fromkeys(panel.metrics[0].group for panel in panels), key=_place)
    sections = tuple(
        Section(group, tuple(panel for panel in panels if panel.metrics[0].group == group), is_open=place < OPEN)
        for place, group in enumerate(groups)
    )
    return Board(name, f"dist_lm stage {name}", sections)


def _place(group: str) -> int:
    if group in FIRST:
        return FIRST.index(group)
    return len(FIRST) + (1 + LAST.index(group) if group in LAST else 0)


def _compared() -> Iterator[Section]:
    every = {metric.name: metric for stage in MEASURED_STAGES for metric in metrics_of(stage)}
    for heading, names in COMPARED.items():
        panels = []
        for name in names:
            metric = every[name]
            panels.append(_family((metric,)) if metric.slot else Panel(name, (metric,)))
        yield Section(heading, tuple(panels), is_open=True)


def _panels(metrics: tuple[Metric, ...]) -> Iterator[Panel]:
    """A panel for each metric that is in no other; families that begin alike share one, for one pattern is both."""
    by_name = {metric.name: metric for metric in metrics}
    shared = {name: title for title, names in TOGETHER.items() for name in names}
    made: set[str] = set()
    for metric in metrics:
        if metric.name in made:
            continue
        if metric.slot:
            alike = tuple(other for other in metrics if other.slot and _stem(other) == _stem(metric))
            panel = _family(alike)
        elif metric.name in shared:
            title = shared[metric.name]
            panel = Panel(title, tuple(by_name[name] for name in TOGETHER[title] if name in by_name))
            panel = panel if len(panel.metrics) > 1 else Panel(metric.name, (metric,))
        else:
            panel = Panel(metric.name, (metric,))
        made |= {one.name for one in panel.metrics}
        yield panel


def _family(metrics: tuple[Metric, ...]) -> Panel:
    stem = _stem(metrics[0])
    by = " and ".join(dict.fromkeys(metric.slot for metric in metrics))
    return Panel(f"{stem.rstrip('_')} by {by}", metrics, f"^{re.escape(stem)}.+$")


def _stem(metric: Metric) -> str:
    """A family's name up to its slot, and without a letter that only sets two families apart: `reward/top1_`."""
    before = metric.name.partition("{")[0]
    return before[: before.rindex("_") + 1]
