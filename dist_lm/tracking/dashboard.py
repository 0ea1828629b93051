"""Dashboards as values: one board for each stage, one section for each group of metrics, one panel for each metric.

Boards follow from the registry: a new metric has a panel at the next push. `SHARED_PANELS` lists the metrics that share
one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dist_lm.errors import require
from dist_lm.tracking.registry import MEASURED_STAGES, Metric, metrics_of

OVERVIEW = "overview"
BOARDS = (OVERVIEW, *MEASURED_STAGES)

# Title -> metrics that share a panel. The panel stands where the first of them would stand.
SHARED_PANELS = {
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
    "Where the time of a conversation goes": ("timing/environment_s", "timing/model_s"),
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

# These metrics are positive and span several powers of ten.
LOGARITHMIC = ("train/grad_norm", "train/grad_norm_{group}", "train/update_ratio", "rlhf/policy_grad_norm")

# Groups at the top and at the bottom of every board; the others stand between them.
FIRST_GROUPS = ("loss", "held-out")
LAST_GROUPS = ("updates", "optimizer", "throughput", "memory", "time", "system")
NUM_OPEN = 4  # sections that are unfolded at first

# Sections of the overview and their metrics.
OVERVIEW_SECTIONS = {
    "learning": ("train/loss", "val/loss", "val/bits_per_byte"),
    "speed": ("perf/tokens_per_s", "perf/tokens_per_s_per_rank", "perf/mfu", "perf/step_s"),
    "tools": ("tools/call_exact", "tools/irrelevance"),
    "code": ("code/parses_{language}",),
    "preference": ("preference/accuracy", "preference/margin"),
    "reward": ("reward/accuracy", "reward/kendall_tau"),
    "rlhf": ("rlhf/reward_mean", "rlhf/score_mean", "rlhf/kl", "rlhf/win_rate"),
    "agents": ("rollout/turns", "rollout/tool_errors", "rollout/unreadable_turns", "rollout/invalid_{reason}"),
    "generate": ("generate/tokens_per_s", "generate/prompts"),
}


@dataclass(frozen=True)
class Panel:
    """A line plot over steps."""

    title: str
    metrics: tuple[Metric, ...]  # single metrics, or families that one pattern matches
    pattern: str = ""  # for a family: a regular expression (RE2) that matches the full names

    @property
    def unit(self) -> str:
        """Returns the unit of all its metrics; empty where they differ."""
        units = {metric.unit for metric in self.metrics}
        if len(units) > 1:
            return ""
        return units.pop()

    @property
    def logarithmic(self) -> bool:
        """Returns whether the vertical axis is logarithmic."""
        return all(metric.name in LOGARITHMIC for metric in self.metrics)

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the plotted metrics; empty for a family."""
        if self.pattern:
            return ()
        return tuple(metric.name for metric in self.metrics)


@dataclass(frozen=True)
class Section:
    """Panels under a heading."""

    name: str
    panels: tuple[Panel, ...]
    is_open: bool


@dataclass(frozen=True)
class Board:
    """The workspace of a stage, or the overview."""

    name: str
    title: str
    sections: tuple[Section, ...]

    @property
    def stage(self) -> str:
        """Returns the stage whose runs are shown; empty: all stages."""
        if self.name == OVERVIEW:
            return ""
        return self.name

    @property
    def panels(self) -> tuple[Panel, ...]:
        """Returns the panels of all sections."""
        return tuple(panel for section in self.sections for panel in section.panels)


def boards(name: str | None = None) -> tuple[Board, ...]:
    """Returns the overview and a board for each stage that writes metrics; with `name` only this board.

    Raises:
        ConfigError: no board has this name.
    """
    if name is None:
        return tuple(board_of(name) for name in BOARDS)

    require(name in BOARDS, "board", name, ", ".join(BOARDS))
    return (board_of(name),)


def board_of(name: str) -> Board:
    """Returns the board of a stage (a section for each group of its metrics), or the overview; a name that is neither
    gives a board without sections."""
    if name == OVERVIEW:
        return Board(name, "dist_lm overview of the pipeline", tuple(_overview_sections()))

    panels = list(_panels(metrics_of(name)))
    groups = sorted(dict.fromkeys(panel.metrics[0].group for panel in panels), key=_group_order)
    sections = tuple(
        Section(group, tuple(panel for panel in panels if panel.metrics[0].group == group), is_open=position < NUM_OPEN)
        for position, group in enumerate(groups)
    )
    return Board(name, f"dist_lm stage {name}", sections)


def _group_order(group: str) -> int:
    """Returns the sort key of a group; groups between the first and the last ones keep the registry's order."""
    if group in FIRST_GROUPS:
        return FIRST_GROUPS.index(group)
    if group in LAST_GROUPS:
        return len(FIRST_GROUPS) + 1 + LAST_GROUPS.index(group)
    return len(FIRST_GROUPS)


def _overview_sections() -> Iterator[Section]:
    metric_named = {metric.name: metric for stage in MEASURED_STAGES for metric in metrics_of(stage)}

    for heading, names in OVERVIEW_SECTIONS.items():
        panels = tuple(_panel_of((metric_named[name],)) for name in names)
        yield Section(heading, panels, is_open=True)


def _panels(metrics: tuple[Metric, ...]) -> Iterator[Panel]:
    """Yields the panels of a stage's metrics, in their order: one for each metric, or for each entry of `SHARED_PANELS`
    of which the stage has several; families with one stem share a panel and a pattern."""
    by_name = {metric.name: metric for metric in metrics}
    title_of = {name: title for title, names in SHARED_PANELS.items() for name in names}
    plotted: set[str] = set()

    for metric in metrics:
        if metric.name in plotted:
            continue

        # The stage may have only one of the metrics that share a panel; that one has its own title.
        title = title_of.get(metric.name, "")
        sharing = tuple(by_name[name] for name in SHARED_PANELS.get(title, ()) if name in by_name)
        if metric.slot:
            panel = _panel_of(tuple(family for family in metrics if family.slot and family.stem == metric.stem))
        elif len(sharing) > 1:
            panel = Panel(title, sharing)
        else:
            panel = _panel_of((metric,))

        plotted |= {metric.name for metric in panel.metrics}
        yield panel


def _panel_of(metrics: tuple[Metric, ...]) -> Panel:
    """Returns the panel of one metric, or of families with one stem, which a pattern matches."""
    first = metrics[0]
    stem = first.stem
    if not first.slot:
        return Panel(first.name, metrics)

    # The slot is in the middle of the name, so no other family has this stem.
    if stem == first.name:
        before, _, after_brace = first.name.partition("{")
        after = after_brace.partition("}")[2]
        return Panel(f"{before}*{after} by {first.slot}", metrics, f"^{re.escape(before)}.+{re.escape(after)}$")

    slots = " and ".join(dict.fromkeys(metric.slot for metric in metrics))
    return Panel(f"{stem} by {slots}", metrics, f"^{re.escape(stem)}_.+$")
