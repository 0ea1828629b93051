"""What tests that start runs have in common."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from dist_lm.config.root import Config, save_config
from dist_lm.data.manifest import record_content
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.stage import run_of
from dist_lm.storage.process import MARK
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.metrics import read_metrics
from dist_lm.tracking.registry import metric_of, metrics_of
from dist_lm.training import checkpoint, checkpoint_files, checkpoint_saver
from dist_lm.training.state import TrainState
from tests.conftest import TINY
from tests.forked_run import run_forked
from tests.patience import patient

STEPS = 20
DEADLINE_S = patient(480)
SETTINGS = (
    *TINY,
    "model.init_std=0.1",  # with 0.02 the norm of the small attention gradients differs by 1.1e-5 between layouts
    f"stage.steps={STEPS}",
    "stage.global_batch=8",
    "stage.micro_batch=2",
    "stage.lr=1e-2",
    "stage.warmup_steps=5",
    "stage.dropout=0.1",
    "stage.checkpoint_every=5",
    "stage.eval_every=10",
    "stage.eval_sequences=8",
)
SMOOTHED = ("stage.label_smoothing=0.1",)
SAMPLED = (*SMOOTHED, "stage.sampling.samples_per_prompt=1", "stage.sampling.max_new_tokens=4")
OWN_SETTINGS = {"language": SAMPLED, "code": SAMPLED, "tools": (*SMOOTHED, "stage.questions.per_kind=4")}
TIMED = ("time", "timing/", "perf/", "checkpoint/", "rollout/tokens_per_s")


def numbers(run: RunDirectory) -> dict[int, dict[str, float]]:
    """Everything in the metrics file that is not a time, by step."""
    steps: dict[int, dict[str, float]] = {}
    for line in read_metrics(run.metrics):
        kept = {key: value for key, value in line.items() if not key.startswith(TIMED) and key != "step"}
        steps.setdefault(line["step"], {}).update(kept)
    return steps


def tolerance(name: str) -> float:
    """How closely layouts agree in a metric, relative. The gradient of a key's bias is rounding (attention does not see
    it), of which Adam makes steps all the same: they are part of an update's size."""
    return 1e-4 if name == "train/update_ratio" else 1e-5


def unwritten(run: RunDirectory, stage: str) -> set[str]:
    """Metrics that every run of a stage has, by the registry, and this one has not."""
    written = {metric_of(name) for line in read_metrics(run.metrics) for name in line.keys() - {"step", "time"}}
    return {metric.name for metric in metrics_of(stage) if not metric.only and metric not in written}


def linked(work: WorkDirectory, directory: Path) -> WorkDirectory:
    """A work directory with the tokenizer and the corpora of another, and no runs."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer", "corpora"):
        (directory / name).symlink_to(work.path / name)
    return WorkDirectory(directory)


def begun_run(config: Config, state: TrainState) -> RunDirectory:
    """A run with a checkpoint that has no tensors, as its first attempt records it."""
    run = run_of(config)
    run.create()
    save_config(config, run.config)
    record_content(run, config.corpus_names)
    directory = run.checkpoints / checkpoint_files.step_name(state.step)
    directory.mkdir()
    checkpoint_files.write_state(directory, state, asdict(config.model))
    checkpoint_files.write_pointer(run.checkpoints, checkpoint_files.LATEST, directory)
    return run


def write_untrained(work: WorkDirectory, stage: str, seed: int, run_id: str = "default") -> RunDirectory:
    """A run of a training stage, with a checkpoint of a model that has not learned, but has opinions."""
    config = compose_config([f"stage={stage}", *TINY, "model.init_std=0.15"])
    model = Transformer(config.model)
    initialise(model, seed)
    run = work.run(stage, run_id)
    run.create()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tensors = checkpoint.tensors_of(model, None, config.model)
        world = World(rank=0, size=1, local_rank=0, device=next(model.parameters()).device)
        checkpoint_saver.write(run.checkpoints, tensors, TrainState(step=5), config.model, world)
    finally:
        dist.destroy_process_group()
    return run


def prepare(work: WorkDirectory, run_id: str, *overrides: str, stage: str = "language") -> RunDirectory:
    own = OWN_SETTINGS.get(stage, ())
    config = compose_config(
        [f"stage={stage}", *SETTINGS, *own, f"work_dir={work.path}", f"run_id={run_id}", *overrides]
    )
    run = work.run(stage, run_id)
    run.create()
    save_config(config, run.config)
    return run


def start(run: RunDirectory, ranks: int, largest_file: int | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(("prlimit", f"--fsize={largest_file}") if largest_file else ()),
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), "-m", "dist_lm.train", str(run.path)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", MARK: "torchrun"},  # as many threads as forked ranks have
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> int:
    try:
        return process.wait(timeout=DEADLINE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def train(run: RunDirectory, ranks: int) -> dict:
    """The whole run, in forked ranks: as a user starts it, each of them costs seconds of imports."""
    assert run_forked(run, ranks) == 0, run.rank_log(0).read_text()
    return json.loads(run.result.read_text())


def copy_until(reference: RunDirectory, run: RunDirectory, step: int) -> None:
    """A run as it was when the checkpoint of `step` was its newest."""
    shutil.copytree(reference.path, run.path)
    run.result.unlink()
    for directory in checkpoint_files.steps_in(run.checkpoints):
        if directory.name > checkpoint_files.step_name(step):
            shutil.rmtree(directory)
    newest = run.checkpoints / checkpoint_files.step_name(step)
    checkpoint_files.write_pointer(run.checkpoints, checkpoint_files.LATEST, newest)
