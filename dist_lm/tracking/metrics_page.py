"""The registry of metrics as a page: docs/metrics.md, which `python -m dist_lm metrics` prints."""

from dist_lm.errors import ConfigError
from dist_lm.tracking.registry import MEASURED_STAGES, TEXT_STAGES, Metric, all_metrics, metrics_of

HEAD = """# Metrics

Generated from `dist_lm/tracking/registry.py` by `python -m dist_lm metrics > docs/metrics.md`; do not edit.

`metrics.jsonl`, wandb, dashboards and reports use these names. `{slot}` stands for a language, a corpus or another
name. A line is written every `stage.log_every` steps (stage generate: about every ten seconds; a step is a prompt).
Losses and norms belong to the last step; times and speeds are means since the line before.
`train/update_ratio`, `perf/straggler_ratio` and `perf/slowest_rank` are on every tenth step and the last line.
↓ and ↑ mark the better direction. "text" stands for the stages language, code, sft and tools.
Headings name the stages of tables without that column.
"""
ARROWS = {"lower": "↓", "higher": "↑", "": ""}


def page(stage: str | None = None) -> str:
    """Returns the text of docs/metrics.md: a Markdown table for each group of metrics.

    Args:
        stage: include only metrics of this stage; None: all metrics.

    Raises:
        ConfigError: the stage writes no metrics.
    """
    metrics = all_metrics()
    if stage is not None:
        metrics = metrics_of(stage)
    if not metrics:
        raise ConfigError(f"--stage {stage}: expected one of {', '.join(MEASURED_STAGES)}")

    groups = dict.fromkeys(metric.group for metric in metrics)
    tables = [_markdown(group, [metric for metric in metrics if metric.group == group]) for group in groups]
    return "\n".join([HEAD, *tables])


def _markdown(group: str, metrics: list[Metric]) -> str:
    """Returns the heading and table of a group as Markdown. Families of a metric share its row; stages are in the
    heading if all rows have the same. `metrics`: those of the group, at least one."""
    rows: dict[str, list[Metric]] = {}
    single = {metric.name for metric in metrics if not metric.slot}
    for metric in metrics:
        # `val/loss` and `val/loss_{corpus}` have one meaning, so they share a row.
        name = metric.name
        if metric.stem in single:
            name = metric.stem
        rows.setdefault(name, []).append(metric)

    # One column less if all rows have the same stages, which then stand in the heading.
    columns, title = ["name", "unit", "stages", "meaning"], group
    stages, *other_stages = {_stages(metric) for metric in metrics}
    if not other_stages:
        columns.remove("stages")
        if stages != group:
            title += f" ({stages})"

    table = [
        columns,
        ["---"] * len(columns),
        *([_cell(members, column) for column in columns] for members in rows.values()),
    ]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def _cell(metrics: list[Metric], column: str) -> str:
    """Returns the text of one cell in the row of a metric (the first of `metrics`) and its families.

    Args:
        column: name | unit (with the arrow of the better direction) | stages; any other: the meaning.
    """
    first = metrics[0]
    if column == "name":
        return ", ".join(f"`{metric.name}`" for metric in metrics)
    if column == "unit":
        return f"{first.unit} {ARROWS[first.better]}".strip()
    if column == "stages":
        return _stages(first)
    if first.only:
        return f"{first.meaning.removesuffix('.')}, {first.only}."
    return first.meaning


def _stages(metric: Metric) -> str:
    return ", ".join(metric.stages).replace(", ".join(TEXT_STAGES), "text")
