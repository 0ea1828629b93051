"""Every metric that there is: logging, dashboards, reports and docs/metrics.md are made from this list.

A name that is not here cannot be written to a metrics file. To add one, add it to the table in `metric_tables/` that it
belongs to.
"""

import difflib
import re
from functools import cache

from dist_lm.errors import UserError
from dist_lm.tracking.metric import Metric
from dist_lm.tracking.metric_tables.generation import GENERATION
from dist_lm.tracking.metric_tables.held_out import HELD_OUT
from dist_lm.tracking.metric_tables.reinforcement import REINFORCEMENT
from dist_lm.tracking.metric_tables.system import SYSTEM
from dist_lm.tracking.metric_tables.training import TRAINING

__all__ = ["METRICS", "Metric", "UnknownMetricError", "metric_of", "metrics_of"]

METRICS: tuple[Metric, ...] = (*TRAINING, *HELD_OUT, *REINFORCEMENT, *GENERATION, *SYSTEM)

SLOTS = {"completions": r"\d+"}  # what may stand for a slot; any other: anything


class UnknownMetricError(UserError):
    """A metric that is not in the registry."""


@cache
def metric_of(name: str) -> Metric:
    """The metric or family that a name in a metrics file is of.

    An exact name goes before a family; of several families the one that says most of the name.

    Raises:
        UnknownMetricError: names the nearest one that there is.
    """
    for metric in _singles_then_families():
        if _pattern(metric).fullmatch(name):
            return metric
    nearest = difflib.get_close_matches(name, [metric.name for metric in METRICS], n=1, cutoff=0)[0]
    raise UnknownMetricError(
        f"metric {name}: not in the registry, the nearest is {nearest}; add it to dist_lm/tracking/metric_tables"
    )


def metrics_of(stage: str) -> tuple[Metric, ...]:
    """The metrics that runs of a stage write, in the order of the registry; none of an unknown stage."""
    return tuple(metric for metric in METRICS if stage in metric.stages)


@cache
def _singles_then_families() -> tuple[Metric, ...]:
    def order(metric: Metric) -> tuple[bool, bool, int]:
        return bool(metric.slot), metric.slot not in SLOTS, len(metric.slot) - len(metric.name)

    return tuple(sorted(METRICS, key=order))


@cache
def _pattern(metric: Metric) -> re.Pattern[str]:
    before, _, rest = metric.name.partition("{")
    if not metric.slot:
        return re.compile(re.escape(before))
    return re.compile(re.escape(before) + SLOTS.get(metric.slot, ".+") + re.escape(rest.partition("}")[2]))
