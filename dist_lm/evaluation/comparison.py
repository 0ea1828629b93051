"""Writes the figures of models as rows, compares two models on the same items, and puts both into words."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dist_lm.evaluation.statistics import estimate, paired_test
from dist_lm.tracking.readable import counted

SHOWN_MODELS = 3  # most models whose values stand in the closing table


def rows_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the figures of a model as rows: model, task, figure, value, low, high, items. Groups have no
    interval (None)."""
    rows = []
    for task, scores in result["tasks"].items():
        model_task = {"model": result["model"], "task": task}
        for name, interval in scores["figures"].items():
            rows.append({**model_task, "figure": name, **interval})
        for group, (name, share, items) in scores["groups"].items():
            no_interval = {"value": share, "low": None, "high": None, "items": items}
            rows.append({**model_task, "figure": f"{name}, {group}", **no_interval})
    return rows


def compared_tasks(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a paired test for each task, over the items that both models have values of: second model minus first.

    A comparison has task, first and second (names of the models), `left_out`, and the fields of `PairedTest`; without
    common items not the latter. `left_out` counts the items that only one model has: a question may not fit the context
    of the other one. For the reward also `wins`, the `Estimate` of the share of items on which the second scores
    higher; a tie counts half. Figures of different tests of our own problems, by version or seed, are not compared: the
    comparison then has `tests`, those of both.

    Args:
        first: figures of a model as in `result.json` of stage evaluate, as is `second`, which has the same tasks.
    """
    from dist_lm.evaluation.tasks import REWARD  # imports torch, which the launcher does without

    comparisons = []
    for task, scores in first["tasks"].items():
        comparison: dict[str, Any] = {"task": task, "first": first["model"], "second": second["model"]}
        other_scores = second["tasks"][task]
        first_values = dict(zip(scores["ids"], scores["values"], strict=True))
        second_values = dict(zip(other_scores["ids"], other_scores["values"], strict=True))
        pairs = [(first_values[name], second_values[name]) for name in first_values if name in second_values]
        comparison["left_out"] = len(first_values) + len(second_values) - 2 * len(pairs)
        tests = [task_scores.get("tests") for task_scores in (scores, other_scores)]
        if tests[0] != tests[1]:
            comparisons.append(comparison | {"tests": tests})
            continue

        # Scores have a scale of their own, so their comparison has a win rate too.
        if pairs:
            comparison |= asdict(paired_test(*zip(*pairs, strict=True)))
            if task == REWARD:
                comparison["wins"] = asdict(estimate([0.5 if x == y else float(y > x) for x, y in pairs]))
        comparisons.append(comparison)
    return comparisons


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """Returns a comparison of `compared_tasks` as text: `own_python: code/b - code/a = +0.060 [-0.020, 0.140], p = 0.25
    (McNemar)`, then the share of wins and the number of questions left out, if there are any.

    Without common questions it says that the models are not compared.
    """
    subject = f"{comparison['task']}: {comparison['second']} - {comparison['first']}"
    if "tests" in comparison:
        return f"{subject}: not compared, their tests differ ({' and '.join(map(_tests_text, comparison['tests']))})"
    if "difference" not in comparison:
        return f"{subject}: not compared, they have no question in common"

    text = (
        f"{subject} = {comparison['difference']:+.3f} "
        f"[{comparison['low']:.3f}, {comparison['high']:.3f}], p = {comparison['p']:.2g} ({comparison['method']})"
    )
    if wins := comparison.get("wins"):
        text += f"; wins {wins['value']:.3f} [{wins['low']:.3f}, {wins['high']:.3f}]"
    if left_out := comparison.get("left_out"):
        text += f"; without {counted(left_out, 'question')} that only one of them has"
    return text


def _tests_text(tests: Mapping[str, int] | None) -> str:
    return f"version {tests['version']}, seed {tests['seed']}" if tests else "version 1"


def figures_of(result: Mapping[str, Any]) -> str:
    """Returns the first figure of the first task of each model as text, for the closing table, which is narrow.

    Args:
        result: `result.json` of stage evaluate.
    """
    models = result["models"]
    task, scores = next(iter(models[0]["tasks"].items()))
    name = next(iter(scores["figures"]), "")
    figures = [model["tasks"][task]["figures"].get(name) for model in models]
    values = [f"{interval['value']:.3f}" for interval in figures if interval]

    text = f"{counted(len(models), 'model')}, {counted(len(models[0]['tasks']), 'task')}"
    if not values or len(values) > SHOWN_MODELS:
        return text
    return f"{text}; {task} {name} {', '.join(values)}"


def shortened(text: str, width: int) -> str:
    """Returns a text of at most `width` characters: the middle of a longer one becomes `...`.

    The end keeps twice as much as the beginning, as a path says most at its end.
    """
    if len(text) <= width:
        return text
    n_first = width // 3
    return f"{text[:n_first]}...{text[n_first + 3 - width :]}"
