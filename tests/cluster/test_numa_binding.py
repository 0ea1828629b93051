"""Ranks are bound to the cores beside their GPU where that is possible, and nowhere else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_lm.cluster.agent import cores_of, numa_binding


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """(lists of cores by node, cores that the process may use, whether numactl is there) -> folder of the nodes."""

    def build(lists: list[str], allowed: set[int], has_numactl: bool = True) -> Path:
        for number, cores in enumerate(lists):
            (tmp_path / f"node{number}").mkdir()
            (tmp_path / f"node{number}" / "cpulist").write_text(f"{cores}\n")
        (tmp_path / "possible").write_text("0-1\n")
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/numactl" if has_numactl else None)
        return tmp_path

    return build


def test_two_nodes_bind(machine):
    """Without the option, ranks read memory of the other socket."""
    assert numa_binding(machine(["0-3,8-11", "4-7,12-15"], set(range(16)))) == ["--numa-binding", "node"]


@pytest.mark.parametrize(
    ("lists", "allowed", "has_numactl"),
    [
        (["0-7"], set(range(8)), True),
        ([], set(range(8)), True),
        (["0-3", "4-7"], set(range(8)), False),
        (["0-3", "4-7"], {0, 1}, True),
        (["0-7", ""], set(range(8)), True),
    ],
    ids=["one node", "no list", "no numactl", "cores of one node alone", "a node of memory"],
)
def test_where_torchrun_would_fail_or_nothing_be_gained_it_is_not_asked(machine, lists, allowed, has_numactl):
    """torchrun ends the gang if it cannot bind a rank: on a shared node, or in a small image."""
    assert numa_binding(machine(lists, allowed, has_numactl)) == []


def test_lists_of_cores():
    assert cores_of("0-2,8\n") == {0, 1, 2, 8}
    assert cores_of("\n") == set()
