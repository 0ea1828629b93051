"""What wandb's own files of a run hold, as wandb's terminal program reads them."""

import json
import subprocess
import sys

from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.dashboard_show import newest_offline
from dist_lm.tracking.registry import metric_of, metrics_of

OURS = ("samples/",)  # tables, which are no metrics


def history_names(run: RunDirectory) -> set[str]:
    """The names in the history of the newest offline run of a run directory."""
    (log,) = newest_offline(run).glob("*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    said = subprocess.run(inspect, cwd=run.path, check=True, capture_output=True, text=True).stdout
    records = map(json.loads, said.splitlines())
    found = {name for record in records if record["type"] == "history" for name in record["history"]["item"]}
    return {name for name in found if not name.startswith(("_", *OURS))}


def assert_every_metric(names: set[str], stage: str) -> None:
    """Every metric that docs/metrics.md gives a stage is among `names`, but those for which it says when they are not;
    and nothing else is."""
    shown = {metric_of(name) for name in names}
    missing = {metric.name for metric in metrics_of(stage) if not metric.only} - {metric.name for metric in shown}
    assert missing == set()
    assert {metric.name for metric in shown} <= {metric.name for metric in metrics_of(stage)}
