"""What stage `reward` ends with: how its scores agree with held-out rankings, before and after training."""

import re

from dist_lm.tracking.console import Console

COLUMNS = {  # figure -> what the table calls it
    "accuracy": "pairs",
    "kendall_tau": "Kendall's tau",
    "top1": "best one",
    "calibration_error": "calibration error",
}


def print_agreement(result: dict, console: Console) -> None:
    """A row for all, each number of completions and each source, with `before -> after`; nothing without rankings."""
    before, after = result.get("before", {}), result["metrics"]
    parts = [name.removeprefix("reward/accuracy") for name in after if name.startswith("reward/accuracy")]
    if not parts:
        return
    rows = [(label(part), *(cell(f"reward/{figure}{part}", before, after) for figure in COLUMNS)) for part in parts]
    console.table("agreement with held-out rankings", ("rankings", *COLUMNS.values()), rows)


def label(part: str) -> str:
    """`all`, `of 4` for `_k4`, or the source."""
    if size := re.fullmatch(r"_k(\d+)", part):
        return f"of {size[1]}"
    return part.removeprefix("_") or "all"


def cell(name: str, before: dict, after: dict) -> str:
    """`0.51 -> 0.73`."""
    if after.get(name) is None:
        return ""
    now = f"{after[name]:.3f}"
    return f"{before[name]:.3f} -> {now}" if before.get(name) is not None else now


def reward_entries(result: dict) -> list[tuple[str, str]]:
    """The normaliser, as a line of the summary."""
    found = result.get("normaliser")
    if not found:
        return []
    scored = result["metrics"]["reward/scored"]
    return [("scores", f"mean {found['mean']:.3f}, deviation {found['std']:.3f} on {scored:,.0f} samples")]
