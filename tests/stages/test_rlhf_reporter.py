"""What an iteration of stage rlhf reports of its pace, and the result of a run."""

import math
from pathlib import Path
from typing import cast

import pytest
import torch

from dist_lm.errors import ArtefactError
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.rlhf.learner import IterationReport
from dist_lm.stages.rlhf.config import rlhf_config
from dist_lm.stages.rlhf.program import Reporter, last_figures
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tracking.metrics import MetricsWriter, read_metrics
from dist_lm.training.heartbeat import Unheard
from tests.conftest import TINY_MODEL
from tests.rlhf.toy import rollouts_with

UNUSED = cast(Tokenizer, None)  # it writes tables


@pytest.mark.parametrize("iteration", [1, 5], ids=["first", "later"])
def test_the_pace_is_that_of_the_iteration_alone(tmp_path: Path, iteration: int):
    """Not of what came before: loading and comparisons before the first, saves and tasks before the others."""
    config = rlhf_config(compose_config(["stage=rlhf", *TINY_MODEL, "stage.log_every=1", "rlhf.table_rollouts=0"]))
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    world = World(0, 2, 0, torch.device("cpu"))
    run = RunDirectory(tmp_path)
    reporter = Reporter(config, run, world, UNUSED, metrics, Unheard(), 100, iteration - 1, None)
    rollouts = rollouts_with([2, 2], [3, 5])
    report = IterationReport(iteration, {"timing/iteration_s": 16.0}, (), rollouts, {}, torch.zeros(2))
    reporter(report)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    paces = {name: line[name] for name in line if name.startswith("perf/") and name != "perf/memory_gib"}
    assert paces == {
        "perf/step_s": 16.0,
        "perf/tokens_per_s": 0.5,
        "perf/tokens_per_s_per_rank": 0.25,
        "perf/samples_per_s": 0.125,
    }
    assert line["train/tokens"] == 108


def test_a_run_whose_last_iteration_had_no_reward_ends(tmp_path: Path, caplog):
    """An older release trained on a reward of 1e300; its runs waited for their result for ever."""
    run = RunDirectory(tmp_path)
    run.create()
    with MetricsWriter(run.metrics) as metrics:
        metrics.write(1, {"rlhf/reward_mean": 0.5, "rlhf/entropy": 1.0})
        with pytest.raises(ArtefactError, match="expected rlhf/reward_mean of the last iteration, 2"):
            last_figures(run, 2)
        metrics.write(2, {"rlhf/reward_mean": math.inf, "rlhf/entropy": 1.0})
        assert last_figures(run, 2) == {"rlhf/entropy": 1.0}
    assert "iteration 2: rlhf/reward_mean: not finite" in caplog.text
