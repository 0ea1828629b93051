"""Dashboards as values: a board a stage, a section a group of metrics, a panel a metric.

Boards follow from the registry: a new metric has a panel at the next push. `TOGETHER` lists the metrics that share one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dist_lm.errors import require
from dist_lm.tracking.registry import MEASURED_STAGES, Metric, metrics_of

OVERVIEW = "overview"
BOARDS = (OVERVIEW, *MEASURED_STAGES)

# title -> metrics that share a panel, at the place of the first one
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
    "Implicit rewards": ("train/chosen_reward", "train/rejected_reward"),
    "Log-probabilities of answers": ("train/chosen_logprob", "train/rejected_logprob"),
    "Implicit rewards of held-out answers": ("preference/chosen_reward", "preference/rejected_reward"),
    "Log-probabilities of held-out answers": ("preference/chosen_logprob", "preference/rejected_logprob"),
    "Score of the model it started from": ("reward/score_mean", "reward/score_std"),
}
# positive values that span several powers of ten
LOGARITHMIC = ("train/grad_norm", "train/grad_norm_{group}", "train/update_ratio", "rlhf/policy_grad_norm")
# groups at the beginning and at the end of every board
FIRST, LAST = ("loss", "held-out"), ("updates", "optimizer", "throughput", "memory", "time", "system")
OPEN = 4  # sections that are open at first
# sections of the overview
COMPARED = {
    "learning": ("train/loss", "val/loss", "val/bits_per_byte"),
    "speed": ("perf/tokens_per_s", "perf/tokens_per_s_per_rank", "perf/mfu", "perf/step_s"),
    "tools": ("tools/call_exact", "tools/irrelevance"),
    "code": ("code/parses_{language}",),
    "preference": ("preference/accuracy", "preference/margin"),
    "reward": ("reward/accuracy", "reward/kendall_tau"),
    "rlhf": ("rlhf/reward_mean", "rlhf/score_mean", "rlhf/kl", "rlhf/win_rate"),
    "generate": ("generate/tokens_per_s", "generate/prompts"),
}


@dataclass(frozen=True)
class Panel:
    """A line plot over steps."""

    title: str
    metrics: tuple[Metric, ...]  # single metrics, or families that one pattern matches
    pattern: str = ""  # of a family: a regular expression (RE2) for the whole name

    @property
    def unit(self) -> str:
        """The unit of all its metrics; empty where they differ."""
        units = {metric.unit for metric in self.metrics}
        return units.pop() if len(units) == 1 else ""

    @property
    def logarithmic(self) -> bool:
        """Whether the axis of values is logarithmic."""
        return all(metric.name in LOGARITHMIC for metric in self.metrics)

    @property
    def names(self) -> tuple[str, ...]:
        """The plotted metrics by name; empty for a family."""
        return () if self.pattern else tuple(metric.name for metric in self.metrics)


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
        """The stage whose runs are shown; empty: all stages."""
        return "" if self.name == OVERVIEW else self.name

    @property
    def panels(self) -> tuple[Panel, ...]:
        """The panels of all sections."""
        return tuple(panel for section in self.sections for panel in section.panels)


def boards(name: str | None = None) -> tuple[Board, ...]:
    """The overview, then a board for each stage that writes metrics; with a name this board only.

    Raises:
        ConfigError: no board has this name.
    """
    if name is None:
        return tuple(board_of(name) for name in BOARDS)
    require(name in BOARDS, "board", name, ", ".join(BOARDS))
    return (board_of(name),)


def board_of(name: str) -> Board:
    """The board of a stage, or the overview."""
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
    """A panel for each metric or group of `TOGETHER`; families with the same stem share a panel and a pattern."""
    by_name = {metric.name: metric for metric in metrics}
    shared = {name: title for title, names in TOGETHER.items() for name in names}
    made: set[str] = set()
    for metric in metrics:
        if metric.name in made:
            continue
        if metric.slot:
            alike = tuple(other for other in metrics if other.slot and other.stem == metric.stem)
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
    stem, first = metrics[0].stem, metrics[0]
    if stem == first.name:  # a slot in the middle: a panel of its own
        before, _, rest = first.name.partition("{")
        after = rest.partition("}")[2]
        return Panel(f"{before}*{after} by {first.slot}", metrics, f"^{re.escape(before)}.+{re.escape(after)}$")
    by = " and ".join(dict.fromkeys(metric.slot for metric in metrics))
    return Panel(f"{stem} by {by}", metrics, f"^{re.escape(stem)}_.+$")
