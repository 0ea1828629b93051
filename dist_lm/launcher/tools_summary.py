"""What stage `tools` ends with: right calls by kind of conversation, before the first step and after the last."""

from dist_lm.tracking.console import Console
from dist_lm.tracking.readable import percent

COLUMNS = {  # figure -> what the table calls it
    "parses": "parses",
    "valid_call": "fits a tool",
    "name_exact": "names",
    "args_exact": "arguments",
    "call_exact": "whole turn",
    "irrelevance": "no call",
}
OVERALL = ("parallel_exact", "false_refusals")


def print_tools(result: dict, console: Console) -> None:
    """A row a kind, with `before -> after` in per cent; nothing where no questions were asked."""
    before, after = result.get("before", {}), result["metrics"]
    kinds = sorted({kind for name in after if (kind := kind_of(name))})
    if not kinds:
        return
    rows = [
        (
            kind or "all",
            *(cell(f"tools/{figure}" + (f"_{kind}" if kind else ""), before, after) for figure in COLUMNS),
        )
        for kind in ["", *kinds]
    ]
    console.table("calls of tools never trained on, %", ("conversations", *COLUMNS.values()), rows)


def tool_entries(metrics: dict) -> list[tuple[str, str]]:
    """The figures that no kind has, as a line of the summary."""
    found = [
        f"{name.replace('_', ' ')} {percent(metrics[f'tools/{name}'])}"
        for name in OVERALL
        if f"tools/{name}" in metrics
    ]
    return [("calls", ", ".join(found))] if found else []


def kind_of(metric: str) -> str:
    """`single` of `tools/parses_single`; empty for a figure over all kinds, and for any other metric."""
    name = metric.removeprefix("tools/")
    if name == metric:
        return ""
    return next((name.removeprefix(f"{figure}_") for figure in COLUMNS if name.startswith(f"{figure}_")), "")


def cell(name: str, before: dict, after: dict) -> str:
    """`3 -> 98`."""
    if name not in after:
        return ""
    now = f"{after[name] * 100:.0f}"
    return f"{before[name] * 100:.0f} -> {now}" if name in before else now
