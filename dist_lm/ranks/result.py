"""The success marker of a training run: what every stage says in it."""

import os
from collections.abc import Mapping
from typing import Any

from dist_lm.config.root import Config
from dist_lm.model.size import parameter_count
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.metrics import read_metrics
from dist_lm.training import checkpoint_files


def write_success(
    run: RunDirectory,
    config: Config,
    *,
    steps: int,
    tokens: int,
    seconds: float,
    metrics: Mapping[str, float | None],
    more: Mapping[str, Any],
) -> None:
    """Write `result.json`.

    Args:
        metrics: those of the last step.
        more: what the stage adds of its own.
    """
    latest = checkpoint_files.read_pointer(run.checkpoints, checkpoint_files.LATEST)
    durable.write_json(
        run.result,
        {
            "stage": config.stage.name,
            "run_id": config.run_id,
            "steps": steps,
            "tokens": tokens,
            "parameters": parameter_count(config.model),
            "ranks": int(os.environ["WORLD_SIZE"]),
            "seconds": seconds,
            "checkpoint": latest.name if latest else None,
            "metrics": metrics,
            "before": metrics_of_step(run, 0),
            **more,
        },
    )


def metrics_of_step(run: RunDirectory, step: int) -> dict[str, float | None]:
    """All metrics of one step; none where nothing was written then."""
    metrics = {}
    for line in read_metrics(run.metrics):
        if line["step"] == step:
            metrics |= {key: value for key, value in line.items() if key not in ("step", "time")}
    return metrics
