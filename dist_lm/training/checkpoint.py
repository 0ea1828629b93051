"""Saving and loading tensors: every rank its own shards, as safetensors through torch's distributed checkpoint.

Tensors have their logical shapes, so any layout loads what any other saved. Nothing is pickled.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from dist_lm import durable
from dist_lm.config import ModelConfig
from dist_lm.errors import ArtefactError, UserError
from dist_lm.parallel.mesh import World
from dist_lm.training import checkpoint_files as files
from dist_lm.training.optimizer import named_state
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)


class CheckpointWriteError(UserError):
    """A checkpoint could not be written; the ones before are untouched."""


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its name there; loading writes into these very tensors."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    if optimizer is not None:
        tensors |= {f"optimizer.{name}": value for name, value in named_state(model, optimizer)}
    return tensors


def save(
    checkpoints: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    model_config: ModelConfig,
    world: World,
) -> Path:
    """Write a checkpoint of this step (collective) and point LATEST at it.

    Raises:
        CheckpointWriteError: on every rank, when any rank could not write (a full disk, say).
    """
    target = checkpoints / files.step_name(state.step)
    temporary = checkpoints / f".{target.name}"
    failure = None
    digests: dict[str, str] = {}
    if world.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    try:
        temporary.mkdir(exist_ok=True)
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(tensors_of(model, optimizer), storage_writer=writer)
        digests = _make_own_files_durable(temporary, world.rank)
    except CheckpointException as error:
        failure = "; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))
    except OSError as error:
        failure = str(error)
    gathered: list = [None] * world.size
    dist.all_gather_object(gathered, (digests, failure))
    failures = [message for _, message in gathered if message]
    outcome: list = [failures[0] if failures else None]
    if world.is_first and not failures:
        try:
            _finish(
                temporary,
                target,
                {k: v for part, _ in gathered for k, v in part.items()},
                state,
                model_config,
            )
        except OSError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome)
    if outcome[0]:
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        previous = files.read_pointer(checkpoints, files.LATEST)
        kept = f"{previous.name} is intact" if previous else "there was none before it"
        raise CheckpointWriteError(
            f"checkpoint {target} could not be written ({outcome[0]}); {kept}: free space or mend the folder, "
            "then run the same command again"
        )
    return target


def _make_own_files_durable(directory: Path, rank: int) -> dict[str, str]:
    own = sorted(directory.glob(f"shard-{rank + 1:05d}-*"))
    for path in own:
        durable.fsync_file(path)
    return {path.name: durable.sha256_of(path) for path in own}


def _finish(temporary: Path, target: Path, digests: dict[str, str], state: TrainState, config: ModelConfig) -> None:
    files.write_state(temporary, state, asdict(config))
    digests[files.STATE] = durable.sha256_of(temporary / files.STATE)
    files.write_manifest(temporary, digests)
    if target.exists():  # the same step saved again after a damaged checkpoint was passed over
        shutil.rmtree(target)
    temporary.rename(target)
    durable.fsync_directory(target.parent)
    files.write_pointer(target.parent, files.LATEST, target)


def load(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    model_config: ModelConfig,
) -> TrainState:
    """Fill `model` (and `optimizer`, unless None) from a checkpoint written at any layout (collective).

    Raises:
        ArtefactError: it belongs to another model; the message names the keys that differ.
    """
    state, saved_model = files.read_state(checkpoint)
    files.check_same_model(checkpoint, saved_model, model_config)
    tensors = tensors_of(model, optimizer)
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)))
    except CheckpointException as error:
        causes = "; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))
        raise ArtefactError(f"checkpoint {checkpoint} cannot be loaded: {causes}") from error
    if optimizer is not None:
        moved = [value for name, value in tensors.items() if name.endswith(".step")]
        assert all(float(value) == float(moved[0]) for value in moved), "optimizer step counters disagree"
    return state


def agree(choose: Callable[[], Path | None], world: World) -> Path | None:
    """The checkpoint all ranks load: chosen and verified by the first rank alone (collective).

    Raises:
        ArtefactError: on every rank, what `choose` raised on the first.
    """
    choice: list = [None, None]
    if world.is_first:
        try:
            choice[0] = choose()
        except ArtefactError as error:
            choice[1] = str(error)
    dist.broadcast_object_list(choice)
    if choice[1]:
        raise ArtefactError(choice[1])
    return choice[0]
