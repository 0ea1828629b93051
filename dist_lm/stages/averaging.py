"""The program of `dist-lm checkpoint average`: averaged weights as a checkpoint, measured beside the plain ones.

    work/runs/STAGE/RUN_ID/averages/
      last_4_step_00000400/   mean of the last four checkpoints (LAWA, Kaddour 2022), the newest of step 400
      ema_step_00000400/      the exponential average of stage.ema_decay
        average.json          what was averaged, and metrics on val

One tensor is in memory at a time. The mean is computed in fp64 and stored in fp32.
"""

import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, require
from dist_lm.generation.load import model_config_of
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.guarded_gloo import guarded
from dist_lm.parallel.mesh import World
from dist_lm.stages.importing.whole_model import write_checkpoint
from dist_lm.stages.registry import load_config
from dist_lm.stages.training.arguments import DataArguments
from dist_lm.stages.training.stage import training_stage
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import ComputedTensor, StoredTensor, model_weights, stored_tensors
from dist_lm.training.optimizer import EMA

PLAIN = "newest checkpoint"


def average(run: RunDirectory, last: int, ema: bool, device: str, console: Console) -> Path:
    """Writes the mean of the last checkpoints, or the exponential average of the newest, as a checkpoint; returns its
    folder.

    It prints what was averaged and, with `device`, the metrics on val beside those of the newest checkpoint, if the
    stage of the run evaluates on val.

    Args:
        last: number of checkpoints; 0 with `ema`.
        device: auto | cpu | cuda; empty: do not evaluate.

    Raises:
        ConfigError: not exactly one of `last` and `ema`, an unknown device or one that is not there, fewer checkpoints
            than `last`, or a configuration that this version cannot read.
        ArtefactError: a checkpoint is missing or damaged, or has no exponential average; the folder exists or cannot be
            written; or tokenizer or corpora of the run are missing.
        UserError: as `evaluated`.
        StrangerError: another user has connected to a port of this process.
    """
    require(ema != (last > 0), "--last", last, "a positive number, or --ema instead")
    require(device in ("", "auto", "cpu", "cuda"), "--device", device, "auto, cpu or cuda")
    has_device = device != "cuda" or torch.cuda.is_available()
    require(has_device, "--device", device, "auto or cpu: this machine has no GPU that torch can use")

    newest = files.find_checkpoint(run.path)
    kind, prefix, checkpoints = "ema", "ema", [newest]
    if not ema:
        kind, prefix, checkpoints = "mean", f"last_{last}", files.steps_in(newest.parent)[-last:]
    accepted = f"at most {len(checkpoints)}, the checkpoints of the run (stage.keep_checkpoints sets how many are kept)"
    require(len(checkpoints) >= last, "--last", last, accepted)
    folder = run.averages / f"{prefix}_{newest.name}"
    if folder.exists():
        raise ArtefactError(f"{folder} exists: use it, or remove it first")
    # A damaged checkpoint would go unnoticed in the mean.
    for checkpoint in checkpoints:
        files.require_intact(checkpoint)

    tensors = exponential(newest) if ema else mean_of(checkpoints)
    write_average(folder, tensors, newest, model_config_of(newest))
    record = {"of": [checkpoint.name for checkpoint in checkpoints], "kind": kind, "metrics": {}}
    durable.write_sealed(folder / files.AVERAGE, record)
    console.print(f"{folder}: {kind} of {', '.join(record['of'])}", soft_wrap=True)

    if device and can_be_measured(run):
        metrics = evaluated(run, {PLAIN: newest, folder.name: folder}, device)
        durable.write_sealed(folder / files.AVERAGE, record | {"metrics": metrics[folder.name]})
        print_metrics(metrics, console)
    return folder


def mean_of(checkpoints: Sequence[Path]) -> dict[str, ComputedTensor]:
    """Returns the mean of each parameter over checkpoints, by name; computed in fp64 when it is written, stored in
    fp32.

    Raises:
        ArtefactError: a checkpoint is missing or damaged.
    """
    stored = [stored_tensors(checkpoint) for checkpoint in checkpoints]

    # fp64, since the mean of close numbers must not lose their differences.
    def mean(name: str) -> np.ndarray:
        total = np.zeros(stored[0][name].elements, np.float64)
        for tensors in stored:
            total += tensors[name].read().view(np.float32)
        return (total / len(stored)).astype(np.float32).view(np.uint8)

    names = [name for name in stored[0] if name.startswith(files.MODEL)]
    return {name.removeprefix(files.MODEL): _made(stored[0][name], partial(mean, name)) for name in names}


def exponential(checkpoint: Path) -> dict[str, ComputedTensor]:
    """Returns the exponential average of each parameter in a checkpoint, by name; read when it is written.

    Raises:
        ArtefactError: it has none, or is missing or damaged.
    """
    suffix = f".{EMA}"
    averages = {
        name.removeprefix(files.OPTIMIZER).removesuffix(suffix): _made(tensor, tensor.read)
        for name, tensor in stored_tensors(checkpoint).items()
        if name.startswith(files.OPTIMIZER) and name.endswith(suffix)
    }
    if not averages:
        raise ArtefactError(f"checkpoint {checkpoint}: holds no exponential average: train with stage.ema_decay=0.999")
    return averages


def write_average(folder: Path, tensors: Mapping[str, ComputedTensor], newest: Path, model: ModelConfig) -> None:
    """Writes the checkpoint `folder` of the step of `newest`; it appears when it is complete.

    Raises:
        ArtefactError: it cannot be written.
    """
    # The average was never evaluated on the way, so it has no best loss.
    state = replace(files.read_state(newest)[0], best_val_loss=None, best_step=0)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        # the folder lies as deep in the run as a checkpoint, so the path to a base of adapters stays right
        write_checkpoint(temporary, tensors, model, state, files.read_adapters(newest))
        (temporary / files.step_name(state.step)).rename(folder)
        durable.fsync(folder.parent)
    except OSError as error:
        raise ArtefactError(f"{folder}: could not be written ({error}); free space or repair the folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def can_be_measured(run: RunDirectory) -> bool:
    """Returns whether the run has a configuration of a stage that evaluates on val.

    Raises:
        ConfigError: this version cannot read the configuration.
    """
    return run.config.is_file() and load_config(run.config).takes_sequences


def evaluated(run: RunDirectory, checkpoints: Mapping[str, Path], device: str) -> dict[str, dict[str, float]]:
    """Returns the metrics of each checkpoint on all of val, by label, computed in this process.

    It makes a process group of one rank and destroys it.

    Args:
        device: auto | cpu | cuda, which must be there.

    Raises:
        ArtefactError: tokenizer, corpora or a checkpoint are missing or damaged.
        ConfigError: this version cannot read the configuration of the run.
        UserError: as `open_data` of the stage.
        StrangerError: another user has connected to a port of this rank.
    """
    config, tokenizer = load_config(run.config), Tokenizer.load(run.tokenizer_model)
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    world = World(0, 1, 0, torch.device("cuda" if on_gpu else "cpu"))
    # Evaluators of stages sum over ranks: here there is one.
    with guarded():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert group is not None
        arguments = DataArguments(config, run, world, tokenizer, data_ranks=group, dp_rank=0, dp_size=1, position=0)
        evaluate = training_stage(config.stage.name).open_data(arguments).evaluate

        # One model takes the weights of one checkpoint after the other, so only one copy is in memory.
        model = Transformer(config.model).to(world.device)
        model.document_mask = config.stage.document_mask
        metrics = {}
        for label, checkpoint in checkpoints.items():
            weights = {name: torch.from_numpy(array) for name, array in model_weights(checkpoint).items()}
            model.load_state_dict(weights)
            metrics[label] = evaluate(model, True, lambda: None)
        return metrics
    finally:
        dist.destroy_process_group()


def print_metrics(metrics: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Prints a row per metric and a column for each set of weights."""
    table = Table("metric on val", *metrics)
    for name in metrics[PLAIN]:
        table.add_row(name, *(f"{of_weights[name]:.4f}" for of_weights in metrics.values()))
    console.print(table)


def _made(tensor: StoredTensor, make: Callable[[], np.ndarray]) -> ComputedTensor:
    return ComputedTensor(tensor.dtype, tensor.shape, tensor.bytes, make)
