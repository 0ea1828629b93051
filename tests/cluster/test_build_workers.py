"""Tasks of a build on a Ray cluster: the bytes of a build on one machine, also when a node is lost."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.cluster.build_workers import ray_workers
from dist_lm.data.task_workers import in_this_process
from dist_lm.errors import ArtefactError
from tests.cluster.loopback_ray import loopback_ray
from tests.data.mixed_corpora import write_corpora
from tests.stages.test_builds_by_tasks import by_tasks, files_of, new_work

__all__ = ["new_work"]  # a fixture


@pytest.mark.heavy
def test_a_lost_node_changes_no_byte(monkeypatch, new_work, tmp_path):
    """Would find tasks that are lost with their node, bytes that depend on the node, and an error of a task that does
    not reach the command."""
    corpus = write_corpora(tmp_path, random.Random(0), held_out=False)
    expected = files_of(by_tasks(monkeypatch, new_work("one"), corpus, 3000, in_this_process))

    with loopback_ray(tmp_path, nodes=2) as ray, ray_workers(ray.config()) as run_pass:

        def run_and_lose(folder: Path, pass_name: str, numbers: Sequence[int]) -> Iterator[int]:
            for place, number in enumerate(run_pass(folder, pass_name, numbers)):
                if place == 0 and pass_name == "compare":
                    ray.lose(1)
                yield number

        folders = by_tasks(monkeypatch, new_work("two"), corpus, 3000, run_and_lose)
        assert files_of(folders) == expected

        # The command names what is wrong with the data, as a build on one machine does.
        broken = replace(corpus, max_bad_fraction=0.0)
        with pytest.raises(ArtefactError, match="rows are broken"):
            by_tasks(monkeypatch, new_work("broken"), broken, 3000, run_pass)
