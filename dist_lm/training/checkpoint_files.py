"""A checkpoint as files: names, manifest, pointers, retention. No tensors here.

    checkpoints/
      step_00000100/  shard-*.safetensors  state.json  manifest.json (last: sizes and SHA-256 of the others)
      LATEST BEST     the name of one of them

A checkpoint is written under a name that starts with a dot, made durable, renamed, then pointed at: what has a plain
name is whole, and what is damaged later is found by its manifest.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_lm import durable
from dist_lm.config import ModelConfig
from dist_lm.errors import ArtefactError
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)

LATEST, BEST = "LATEST", "BEST"
STATE, MANIFEST = "state.json", "manifest.json"
TENSORS = ".safetensors"  # what a file with tensors ends in
MODEL, OPTIMIZER = "model.", "optimizer."  # what names of tensors begin with
FORMAT = 1


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def steps_in(checkpoints: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in checkpoints.glob("step_*") if path.is_dir())


def read_pointer(checkpoints: Path, name: str) -> Path | None:
    """The checkpoint that LATEST or BEST points at, if there is one."""
    pointer = checkpoints / name
    if not pointer.exists():
        return None
    target = checkpoints / pointer.read_text().strip()
    return target if target.is_dir() else None


def write_pointer(checkpoints: Path, name: str, target: Path) -> None:
    durable.write_text(checkpoints / name, target.name + "\n")


def write_state(directory: Path, state: TrainState, model: dict[str, Any]) -> None:
    """Record where the run stands and which model the tensors belong to."""
    durable.write_json(directory / STATE, {"format": FORMAT, "state": asdict(state), "model": model})


def read_state(directory: Path) -> tuple[TrainState, dict[str, Any]]:
    """What `write_state` wrote: (state, model configuration)."""
    try:
        content = json.loads((directory / STATE).read_text())
        return TrainState(**content["state"]), content["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"checkpoint {directory}: {STATE} cannot be read ({error})") from error


def write_manifest(directory: Path, sha256: dict[str, str]) -> None:
    """Record size and checksum of every file; `sha256` maps file name to digest."""
    files = {name: {"sha256": digest, "bytes": (directory / name).stat().st_size} for name, digest in sha256.items()}
    durable.write_json(directory / MANIFEST, files)


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """What `write_manifest` wrote: `{sha256, bytes}` by file name."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        return {name: {"sha256": str(file["sha256"]), "bytes": int(file["bytes"])} for name, file in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"checkpoint {directory}: {MANIFEST} cannot be read ({error})") from error


def damage(directory: Path, contents: bool = True) -> Iterator[str]:
    """Compare every file of a checkpoint with the manifest, and name what is missing, changed or foreign.

    A foreign file counts if it ends in `.safetensors`: tensors are read from all files that do.

    Args:
        contents: read them too, not only their sizes.

    Raises:
        ArtefactError: the manifest cannot be read.
    """
    manifest = read_manifest(directory)
    for name, expected in sorted(manifest.items()):
        path = directory / name
        if not path.is_file():
            yield f"{name} is missing"
        elif (size := path.stat().st_size) != expected["bytes"]:
            yield f"{name} has {size} bytes, expected {expected['bytes']}"
        elif contents and durable.sha256_of(path) != expected["sha256"]:
            yield f"{name} is damaged (SHA-256 differs from {MANIFEST})"
    for path in sorted(directory.glob(f"*{TENSORS}")):
        if path.name not in manifest:
            yield f"{path.name} is not part of it (not in {MANIFEST})"


def verify(directory: Path, contents: bool = True) -> None:
    """Refuse a checkpoint with `damage`.

    Raises:
        ArtefactError: names the first file that is missing, cut short, changed or foreign.
    """
    for found in damage(directory, contents):
        raise ArtefactError(f"checkpoint {directory}: {found}")


def newest_intact(checkpoints: Path) -> Path | None:
    """The checkpoint to continue from: the newest whose files are whole. A damaged one is reported, loudly.

    Raises:
        ArtefactError: there are checkpoints and every one is damaged.
    """
    candidates = steps_in(checkpoints)
    damage: list[str] = []
    for directory in reversed(candidates):
        try:
            verify(directory)
        except ArtefactError as error:
            damage.append(str(error))
            log.error("%s; using the one before", error)
            continue
        return directory
    if damage:
        raise ArtefactError(
            f"no intact checkpoint in {checkpoints}: {damage[0]}; remove the run directory to start anew"
        )
    return None


def tidy(checkpoints: Path, state: TrainState, keep: int) -> None:
    """Point BEST at what `state` says (a kill may have come before the pointer), then `prune`."""
    best = checkpoints / step_name(state.best_step)
    if state.best_val_loss is not None and best.is_dir():
        write_pointer(checkpoints, BEST, best)
    prune(checkpoints, keep)


def prune(checkpoints: Path, keep: int) -> None:
    """Remove all but BEST and the newest `keep` checkpoints (0: all), and what a killed save left behind."""
    best = read_pointer(checkpoints, BEST)
    for directory in steps_in(checkpoints)[:-keep] if keep else []:
        if directory != best:
            _remove(directory)
    for leftover in checkpoints.glob(".step_*"):
        _remove(leftover)


def _remove(directory: Path) -> None:
    """Remove a checkpoint that is no longer wanted; one that a network file system still holds open may stay."""
    try:
        shutil.rmtree(directory)
    except OSError as error:
        log.warning("checkpoint %s could not be removed (%s); it can be deleted by hand", directory, error)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user names: a step directory, a `checkpoints` folder, or a run directory.

    Raises:
        ArtefactError: there is none.
    """
    if any((path / name).is_file() for name in (STATE, MANIFEST)):
        return path
    for checkpoints in (path, path / "checkpoints"):
        found = read_pointer(checkpoints, LATEST)
        if found is not None:
            return found
    raise ArtefactError(f"{path}: no checkpoint there (expected a run directory, or one of its checkpoints/step_*)")


def find_intact(path: Path) -> Path:
    """`find_checkpoint`, with every file verified.

    Raises:
        ArtefactError: there is none, or it is damaged.
    """
    found = find_checkpoint(path)
    try:
        verify(found)
    except ArtefactError as error:
        others = [step.name for step in steps_in(found.parent) if step != found]
        raise ArtefactError(f"{error}; others beside it: {', '.join(others) or 'none'}") from error
    return found


def check_same_model(checkpoint: Path, saved: dict[str, Any], model_config: ModelConfig) -> None:
    """Refuse a checkpoint whose model has other shapes or arithmetic.

    Raises:
        ArtefactError: names every key that differs, with both values.
    """
    own = asdict(model_config)
    ignored = {"name", "init_std", "max_seq_len"}
    different = [
        f"model.{key}={own[key]} (checkpoint: {saved.get(key)})"
        for key in own
        if key not in ignored and own[key] != saved.get(key)
    ]
    if different:
        raise ArtefactError(
            f"checkpoint {checkpoint} belongs to another model: {', '.join(different)}; "
            "use the same model, or stage.init_from=none to start anew"
        )
