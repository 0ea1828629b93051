"""Waiting for a condition, with a deadline."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from dist_lm.cluster.gang import Gang, GangStatus
from dist_lm.cluster.inspection import Demands
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.cluster.recruit import Crew, recruit
from dist_lm.storage.process import is_alive
from dist_lm.storage.run_directory import RunDirectory
from tests.patience import patient

Value = TypeVar("Value")


def eventually(what: str, condition: Callable[[], Value], seconds: float = 150.0) -> Value:
    """The first truthy value of `condition`; `seconds` are those of a quiet machine."""
    seconds = patient(seconds)
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.05)
    return value


def wait_for_end(gang: Gang) -> GangStatus:
    """The status of a gang once it has ended."""
    while (status := gang.poll()).state == "running":
        time.sleep(0.2)
    return status


def ready_ranks(directory: Path, count: int) -> list[dict[str, Any]]:
    """What `count` dummy ranks have said about themselves, once all of them have."""
    paths = [directory / f"ready_{rank}" for rank in range(count)]
    eventually("ranks are up", lambda: all(path.exists() for path in paths))
    return [json.loads(path.read_text()) for path in paths]


def living(pids: list[int]) -> list[int]:
    """Those of `pids` that still run."""
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found += [pid] if is_alive(psutil.Process(pid)) else []
    return found


def recruited(cluster: RayCluster, run: RunDirectory, nodes: int, timeout_s: float = 240.0, **options: Any) -> Crew:
    """Nodes of a cluster that have what any node has; `options` are those of `recruit`."""
    demands = Demands(gpus=0, free_bytes=1, temporary_bytes=1, clock_skew_s=5.0, link_ratio=0.0)
    crew = recruit(
        cluster,
        nodes,
        gpus_per_node=0,
        directory=run.path,
        demands=demands,
        timeout_s=patient(timeout_s),
        **options,
    )
    assert crew is not None
    return crew
