"""The figures of several models as rows, the paired comparison of two models, and both as text."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dist_lm.evaluation.statistics import estimate, paired_test
from dist_lm.tracking.readable import counted


def rows_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of a model as rows: model, task, figure, value, low, high, items."""
    rows = []
    for task, found in result["tasks"].items():
        for name, value in found["figures"].items():
            rows.append({"model": result["model"], "task": task, "figure": name, **value})
        for group, (name, value, items) in found["groups"].items():
            part = {"figure": f"{name}, {group}", "value": value, "low": None, "high": None, "items": items}
            rows.append({"model": result["model"], "task": task, **part})
    return rows


def compared_tasks(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A paired test for each task, over the items that both models have values of.

    Of items that only one of them has, as where a question does not fit a context, the number is `left_out`.
    """
    from dist_lm.evaluation.tasks import REWARD

    found = []
    for task, values in first["tasks"].items():
        one: dict[str, Any] = {"task": task, "first": first["model"], "second": second["model"]}
        a, b = (dict(zip(own["ids"], own["values"], strict=True)) for own in (values, second["tasks"][task]))
        pairs = [(a[name], b[name]) for name in a if name in b]
        one["left_out"] = len(a) + len(b) - 2 * len(pairs)
        if pairs:
            one |= asdict(paired_test(*zip(*pairs, strict=True)))
            if task == REWARD:
                one["wins"] = asdict(estimate([0.5 if x == y else float(y > x) for x, y in pairs]))
        found.append(one)
    return found


def comparison_text(one: Mapping[str, Any]) -> str:
    """`own_python: code/b - code/a = 0.060 [-0.020, 0.140], p = 0.25 (McNemar)`."""
    between = f"{one['task']}: {one['second']} - {one['first']}"
    if "difference" not in one:
        return f"{between}: not compared, they have no question in common"
    left, wins = one.get("left_out"), one.get("wins")
    without = f"; without {counted(left, 'question')} that only one of them has" if left else ""
    won = f"; wins {wins['value']:.3f} [{wins['low']:.3f}, {wins['high']:.3f}]" if wins else ""
    return (
        f"{between} = {one['difference']:+.3f} "
        f"[{one['low']:.3f}, {one['high']:.3f}], p = {one['p']:.2g} ({one['method']}){won}{without}"
    )


def figures_of(result: Mapping[str, Any]) -> str:
    """The first figure of each task and model, for the closing table."""
    words = []
    for one in result["models"]:
        first = {task: next(iter(own["figures"].items())) for task, own in one["tasks"].items() if own["figures"]}
        shown = ", ".join(f"{task} {name} {value['value']:.3f}" for task, (name, value) in first.items())
        words.append(f"{one['model']}: {shown}" if len(result["models"]) > 1 else shown)
    return "; ".join(words)
