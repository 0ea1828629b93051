"""What a dry run says a rank holds, against what the kernel says a rank held in a real step.

The width of `medium` at two layers; the whole of it takes minutes, see docs/decisions.md.
"""

import json
import os
import subprocess
import sys

import pytest

from dist_lm.cluster.torchrun import CPU_ALLOCATOR
from dist_lm.config.root import save_config
from dist_lm.dry_run.play import play_ranks
from dist_lm.parallel.layout import resolve_layout
from dist_lm.prepare.compose import compose_config
from tests.patience import patient

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]

SETTINGS = (
    *("stage=language", "model=medium", "model.n_layers=2", "stage.seq_len=128", "stage.micro_batch=2"),
    *("hardware=cpu", "device=cpu", "tracking=none"),
)


LONG = ("model=nano", "model.n_layers=4", "model.max_seq_len=8192", "stage.seq_len=8192", "stage.micro_batch=1")


@pytest.mark.parametrize(
    ("overrides", "global_batch"),
    [
        pytest.param(("parallel.dp_shard=2",), 8, id="fsdp"),
        pytest.param(("parallel.tp=2",), 4, id="tp", marks=pytest.mark.bars),
        pytest.param((*LONG, "parallel.cp=2"), 2, id="cp, long sequences", marks=pytest.mark.bars),
    ],
)
def test_measured_memory_is_what_the_dry_run_says(overrides, global_batch, tmp_path, monkeypatch):
    config = compose_config([*SETTINGS, *overrides, f"stage.global_batch={global_batch}"])
    save_config(config, tmp_path / "config.yaml")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "tests.cluster.measured_step", str(tmp_path / "config.yaml"), "2"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | CPU_ALLOCATOR,  # as in training
        capture_output=True,
        text=True,
        timeout=patient(240),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    monkeypatch.setattr("dist_lm.dry_run.play.ranks_to_play", lambda config, layout: [0])
    [played] = play_ranks(config, resolve_layout(config.parallel, config.model, 2))
    print(f"{measured}; by the dry run {played.memory.resident}, {played.memory.peak} of tensors")
    assert played.memory.resident == pytest.approx(measured["resident"], rel=0.1)
    assert played.memory.peak == pytest.approx(measured["tensors"], rel=0.01)
