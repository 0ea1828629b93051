"""New weights on their way from a rank to engines: memory, completeness, and kills in the middle of a push."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_lm.cluster.pool import Pool
from dist_lm.cluster.pool_weights import Stored, chunks_of, store, to_array, to_tensor
from dist_lm.cluster.ray_cluster import connect
from dist_lm.config.cluster import ClusterConfig
from tests.cluster.small_pool import MODEL, SPEC, requests, sorted_results, weights_of
from tests.patience import patient

LOCAL = ClusterConfig(name="local", connect_timeout_s=120.0, node_wait_s=180.0)
WIDE = ("model=nano", "model.vocab_size=32000", "model.d_model=320", "model.n_heads=5", "model.n_layers=2")


@pytest.mark.heavy
@pytest.mark.parametrize(
    "overrides", [WIDE, pytest.param(("model=medium",), marks=pytest.mark.bars)], ids=["wide", "medium"]
)
@pytest.mark.parametrize("way", ["engine", pytest.param("store", marks=[pytest.mark.cluster, pytest.mark.heavy])])
def test_a_push_takes_two_of_the_largest_parameters_at_most(way, overrides):
    command = [sys.executable, "-m", "tests.cluster.push_memory", way, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=patient(600))
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["rise"] <= 2 * found["largest"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_come_out_of_chunks_as_they_went_in(dtype):
    shapes = [(3,), (50, 7), (2, 2, 2), (1,), (400,)]
    given = [(str(i), torch.randn(shape).to(dtype)) for i, shape in enumerate(shapes)]
    chunks = list(chunks_of(iter(given), dtype, most=100))
    assert all(len(chunk) == 1 or sum(array.nbytes for array in chunk.values()) <= 100 for chunk in chunks)
    found = [(name, to_tensor(array, dtype)) for chunk in chunks for name, array in chunk.items()]
    assert [name for name, _ in found] == [name for name, _ in given]
    for (_, value), (_, expected) in zip(found, given, strict=True):
        assert value.dtype == dtype
        assert torch.equal(value, expected)


@pytest.mark.cluster
@pytest.mark.heavy
def test_actors_that_die_amid_a_push_get_all_of_it_and_nobody_draws_before(tmp_path: Path):
    import ray

    @ray.remote(num_cpus=0)
    def late(chunk: dict[str, np.ndarray], path: str) -> dict[str, np.ndarray]:
        deadline = time.monotonic() + 120  # Ray's processes cannot import tests
        while not os.path.exists(path) and time.monotonic() < deadline:  # noqa: PTH110
            time.sleep(0.05)
        return chunk

    new = [(name, torch.from_numpy(value)) for name, value in weights_of(1).items()]
    with connect(LOCAL) as cluster, Pool.start(cluster, SPEC, weights_of(0), actors=1) as pool:
        pool.load_weights(iter(new), 1)
        expected = sorted_results(pool.generate(requests(8)), requests(8))
        pool.load_weights(weights_of(0), 2)
        list(pool.generate(requests(1)))
        stored = store(iter(new), MODEL, SPEC.dtype)
        assert len(stored.chunks) > 4
        last = late.remote({name: to_array(value) for name, value in new[-1:]}, str(tmp_path / "come"))
        pool.load_weights(Stored([*stored.chunks[:-1], last]), 1)
        (member,) = pool.members
        assert (member.version, member.next_version) == (2, 1)  # all chunks but one can be read
        victim = member.pid
        os.kill(victim, signal.SIGKILL)
        (tmp_path / "come").touch()
        assert sorted_results(pool.generate(requests(8)), requests(8)) == expected
        assert [member.pid for member in pool.members] != [victim]
