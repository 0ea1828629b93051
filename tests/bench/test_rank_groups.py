"""Rank groups: every rank answers, a failure is reported in its own words, and no process is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from dist_lm.bench.case import Case, Comparison, GroupSize
from dist_lm.bench.rank_groups import RankFailedError, rank_groups
from dist_lm.bench.run import NotTheSameError, check_same, run_case
from dist_lm.prepare.compose import compose_config
from dist_lm.storage.process import is_alive
from tests.patience import patient

PAIR = GroupSize(2)
CONFIG = compose_config(["stage=language", "model=nano"])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        with rank_groups("toy_benchmark", "cpu", tmp_path_factory.mktemp("toy")) as running:
            yield running
    assert not [rank.pid for group in running.values() for rank in group.ranks if rank.poll() is None]


def case_of(*variants: str, same: tuple[str, ...] = ()) -> Case:
    comparisons = [
        Comparison(variants[0], peer=variants[-1]),
        Comparison(variants[0], peer=variants[-1], fact="size MiB"),
    ]
    return Case("toy", CONFIG, dict.fromkeys(variants, PAIR), comparisons, frozenset(same))


@pytest.mark.heavy
def test_a_case_is_built_timed_and_reported(toy, tmp_path):
    def ask(size, request):
        answers = toy[size].ask(request)
        assert len(answers) == size.ranks
        return answers

    speed, size = run_case("toy", case_of("prints", "silent", same=("prints", "silent")), ask, tmp_path, quick=True)
    assert speed.ratio == speed.value / speed.peer_value
    assert (size.value, size.unit, size.rounds) == (10.0, "MiB", 1)
    with pytest.raises(NotTheSameError, match="'other'"):
        run_case("toy", case_of("prints", "other", same=("prints", "other")), ask, tmp_path, quick=True)


@pytest.mark.heavy
def test_a_rank_that_ends_is_reported_with_the_end_of_its_log(toy, tmp_path):  # the last test: its group ends
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 .*exit code 1.*the reason, in its own words"):
        run_case("toy", case_of("fails"), lambda size, request: toy[size].ask(request), tmp_path, quick=True)


FAILS_WITH_RAY_OPEN = """
from contextlib import contextmanager
from dist_lm.bench import rlhf

@contextmanager
def connect(config):
    try:
        yield
    finally:
        import wave  # as Ray imports at its end
        print("closed")

rlhf.connect = connect
rlhf.WORKER.cluster()
raise RuntimeError("the reason")
"""


@pytest.mark.heavy
def test_the_last_line_of_a_failed_rank_is_its_reason_when_ray_was_open():
    failed = subprocess.run([sys.executable, "-c", FAILS_WITH_RAY_OPEN], capture_output=True, text=True, check=False)
    assert failed.stdout == "closed\n"
    assert failed.stderr.splitlines()[-1] == "RuntimeError: the reason"


def test_losses_that_are_not_finite_are_not_the_same():
    check_same({"a": [2.0, 1.0], "b": [2.0, 1.00001]})
    with pytest.raises(NotTheSameError, match="step 1"):
        check_same({"a": [2.0, 1.0], "b": [2.0, float("nan")]}, torch.bfloat16)


def test_losses_in_bf16_may_differ_by_its_rounding():
    losses = {"a": [2.0], "b": [2.004]}
    check_same(losses, torch.bfloat16)
    with pytest.raises(NotTheSameError):
        check_same(losses)


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks by their parent")
def test_ctrl_c_ends_every_process():
    overrides = ["model=nano", "model.n_layers=1", "stage.global_batch=2", "stage.seq_len=16", "device=cpu"]
    bench = subprocess.Popen(
        [sys.executable, "-m", "dist_lm", "bench", "fsdp", *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + patient(240)
    while len(ranks := psutil.Process(bench.pid).children()) < 2:
        assert bench.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    bench.send_signal(signal.SIGINT)
    assert bench.wait(patient(120)) != 0
    _, left = psutil.wait_procs(ranks, timeout=patient(60))
    assert not [rank.pid for rank in left if is_alive(rank)]
