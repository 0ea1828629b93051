"""The parts of `bench tracking`: a clock of work and waiting, a server that never helps, a follower that follows."""

import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

import pytest

from dist_lm.bench.tracking import SIDE, WAIT, CountedWriter, facts_of_run
from dist_lm.bench.tracking_follower import OFFLINE, TROUBLE, troubled_server
from dist_lm.tracking.metrics import MetricsWriter


def test_standing_still_in_a_write_is_counted_and_working_is_not(tmp_path: Path, monkeypatch) -> None:
    writer = CountedWriter(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(MetricsWriter, "write", lambda *arguments: time.sleep(0.2))
    writer.write(1, {})
    assert writer.waited_s >= 0.19
    before = writer.waited_s
    monkeypatch.setattr(MetricsWriter, "write", lambda *arguments: sum(range(1_000_000)))
    began = time.perf_counter()
    writer.write(2, {})
    assert writer.waited_s - before < time.perf_counter() - began


def test_no_request_to_the_troubled_server_succeeds() -> None:
    with troubled_server() as address:
        for _ in range(8):
            with pytest.raises((urllib.error.URLError, HTTPException, ConnectionError, TimeoutError)):
                urllib.request.urlopen(address, timeout=0.5)


@pytest.mark.parametrize(
    "variant", [pytest.param(OFFLINE, marks=pytest.mark.bars), pytest.param(TROUBLE, marks=pytest.mark.heavy)]
)
def test_a_run_is_followed_to_its_end(variant: str) -> None:
    found = facts_of_run(variant, None)
    assert found[SIDE] > 0
    assert found[WAIT] > 0
