"""The registry for people: docs/metrics.md, as `python -m dist_lm metrics` prints it."""

from dist_lm.errors import ConfigError
from dist_lm.tracking.metric import MEASURED_STAGES, TRAINING_STAGES, Metric
from dist_lm.tracking.registry import METRICS, metrics_of

HEAD = """# Metrics

Made from the registry (`dist_lm/tracking/registry.py`) by `python -m dist_lm metrics > docs/metrics.md`, never by hand.

`metrics.jsonl` in a run directory, wandb, dashboards and reports have these names and no others: a name that is not in
the registry cannot be written. `{slot}` stands for a part of the name: a language, a corpus, a kind. Lines are written
every `stage.log_every` steps. A figure of a step is that of the last one, a time or a speed the mean since the line
before. `train/update_ratio`, `perf/straggler_ratio` and `perf/slowest_rank` take a message of their own and a pass over
the parameters: they are on the last line, and on those of every tenth step (of the next multiple of `stage.log_every`).
In stage generate a line comes about every ten seconds, and a step is a prompt.
"""


def page(stage: str | None = None) -> str:
    """Markdown: a table for each group of metrics.

    Args:
        stage: only what its runs write.

    Raises:
        ConfigError: no run of such a stage writes metrics.
    """
    metrics = METRICS if stage is None else metrics_of(stage)
    if not metrics:
        raise ConfigError(f"--stage {stage}: expected one of {', '.join(MEASURED_STAGES)}")
    tables = [_table(group, [metric for metric in metrics if metric.group == group]) for group in groups_of(metrics)]
    return "\n".join([HEAD, *tables])


def groups_of(metrics: tuple[Metric, ...]) -> list[str]:
    """The groups, each once, in the order of the registry."""
    return list(dict.fromkeys(metric.group for metric in metrics))


def _table(group: str, metrics: list[Metric]) -> str:
    rows = "".join(_row(metric) for metric in metrics)
    return f"## {group}\n\n| name | unit | good | stages | meaning |\n| --- | --- | --- | --- | --- |\n{rows}"


def _row(metric: Metric) -> str:
    stages = "all that train" if metric.stages == TRAINING_STAGES else ", ".join(metric.stages)
    only = f" Only {metric.only}." if metric.only else ""
    return f"| `{metric.name}` | {metric.unit} | {metric.better} | {stages} | {metric.meaning}{only} |\n"
