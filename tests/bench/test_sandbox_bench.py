"""The ceiling of `bench sandbox`: as many forks as it counts."""

import pytest

from dist_lm.bench.sandbox import RUNS, shares


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 16, 64])
def test_all_runs_are_shared_out(cores: int):
    found = shares(RUNS, cores)
    assert (sum(found), len(found)) == (RUNS, cores)
    assert max(found) - min(found) <= 1
