"""A checkpoint as files: names, manifest, pointers, retention. No tensors here.

    checkpoints/
      step_00000100/  shard-*.safetensors  state.json  stage/... (what a stage attaches)
                      manifest.json (last: sizes and SHA-256 of the others)
      LATEST BEST     the name of one of them

A checkpoint is written under a name that starts with a dot, made durable, renamed, then pointed at: what has a plain
name is whole, and what is damaged later is found by its manifest.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)

LATEST, BEST = "LATEST", "BEST"
STATE, MANIFEST = "state.json", "manifest.json"
STAGE = "stage"  # folder of what a stage attaches: apart, for files with tensors are read as parts of the models
TENSORS = ".safetensors"  # what a file with tensors ends in
MODEL, OPTIMIZER = "model.", "optimizer."  # what names of tensors begin with
FORMAT = 1


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step_"))


def newest_step(checkpoints: Path) -> int:
    """The step of the newest checkpoint of a run; 0 without one."""
    latest = read_pointer(checkpoints, LATEST)
    return step_of(latest) if latest else 0


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
        return TrainState.from_json(content["state"]), content["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"checkpoint {directory}: {STATE} cannot be read ({error})") from error


def attach(directory: Path, contents: Mapping[str, bytes]) -> dict[str, str]:
    """Write files of the stage's own, durably; SHA-256 by name, for the manifest."""
    digests = {}
    if contents:
        (directory / STAGE).mkdir()
    for name, content in contents.items():
        path = directory / STAGE / name
        path.write_bytes(content)
        durable.fsync_file(path)
        digests[f"{STAGE}/{name}"] = durable.sha256_of(path)
    if contents:
        durable.fsync_directory(directory / STAGE)
    return digests


def read_attached(directory: Path, name: str) -> bytes:
    """What a stage attached under `name`.

    Raises:
        ArtefactError: it is not there.
    """
    try:
        return (directory / STAGE / name).read_bytes()
    except OSError as error:
        raise ArtefactError(f"checkpoint {directory}: {STAGE}/{name} cannot be read ({error.strerror})") from error


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


def damage(directory: Path, contents: bool = True, share: tuple[int, int] = (0, 1)) -> Iterator[str]:
    """Compare every file of a checkpoint with the manifest, and name what is missing, changed or foreign.

    A foreign file counts if it ends in `.safetensors`: tensors are read from all files that do.

    Args:
        contents: read them too, not only their sizes.
        share: (i, n): look at every n-th file alone, beginning with the i-th.

    Raises:
        ArtefactError: the manifest cannot be read.
    """
    manifest = read_manifest(directory)
    for name, expected in sorted(manifest.items())[slice(share[0], None, share[1])]:
        if reason := _damage_of_file(directory / name, expected, contents):
            yield f"{name} {reason}"
    for path in sorted(directory.glob(f"*{TENSORS}")):
        if path.name not in manifest:
            yield f"{path.name} is not part of it (not in {MANIFEST})"


def _damage_of_file(path: Path, expected: dict[str, Any], contents: bool) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"has {size} bytes, expected {expected['bytes']}"
        if contents and durable.sha256_of(path) != expected["sha256"]:
            return f"is damaged (SHA-256 differs from {MANIFEST})"
    except OSError as error:  # a bad disk, a lost mount
        return f"cannot be read ({error.strerror})"
    return None


def verify(directory: Path, contents: bool = True) -> None:
    """Refuse a checkpoint with `damage`.

    Raises:
        ArtefactError: names the first file that is missing, cut short, changed or foreign.
    """
    if found := first_damage(directory, contents):
        raise ArtefactError(found)


def first_damage(directory: Path, contents: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """The first `damage` of a checkpoint in a sentence, or None when it is whole."""
    try:
        return next((f"checkpoint {directory}: {found}" for found in damage(directory, contents, share)), None)
    except ArtefactError as error:
        return str(error)


def newest_intact(checkpoints: Sequence[Path], damage_of: Callable[[Path], str | None] = first_damage) -> Path | None:
    """The one of `checkpoints` (oldest first) to continue from: the newest that is whole. Damage is reported, loudly.

    Raises:
        ArtefactError: there are checkpoints and every one is damaged.
    """
    newest_damage = None
    for directory in reversed(checkpoints):
        found = damage_of(directory)
        if found is None:
            return directory
        newest_damage = newest_damage or found
        log.warning("%s; using the one before", found)
    if newest_damage:
        raise ArtefactError(
            f"no intact checkpoint in {checkpoints[0].parent}: {newest_damage}; remove the run directory to start anew"
        )
    return None


def tidy(checkpoints: Path, state: TrainState, keep: int) -> None:
    """Once `state` is saved: point BEST at what it says (a kill may have come before the pointer), then `prune`.

    Later checkpoints go first: the run went back behind them because they were damaged, and takes those steps again.
    """
    for directory in steps_in(checkpoints):
        if directory.name > step_name(state.step):
            _remove(directory)
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


def require_intact(checkpoint: Path, damage_of: Callable[[Path], str | None] = first_damage) -> Path:
    """`checkpoint`, with every file verified.

    Raises:
        ArtefactError: it is damaged; the message names others beside it.
    """
    if found := damage_of(checkpoint):
        others = [step.name for step in steps_in(checkpoint.parent) if step != checkpoint]
        raise ArtefactError(f"{found}; others beside it: {', '.join(others) or 'none'}")
    return checkpoint


def head_of(saved: dict[str, Any]) -> str:
    """What the model of a checkpoint gives: checkpoints from before there was another head do not say."""
    return saved.get("head", "tokens")


def check_start(checkpoint: Path, saved: dict[str, Any], model_config: ModelConfig) -> None:
    """Refuse a checkpoint that a model cannot start from. One of scores may start from one of tokens.

    Raises:
        ArtefactError: names every key that differs, with both values.
    """
    new_head = model_config.head == "scalar" and head_of(saved) == "tokens"
    # a model of scores has no head of tokens, so it is all the same whether that was tied
    check_same_model(checkpoint, saved, model_config, but=("head", "tie_embeddings") if new_head else ())


def check_same_model(
    checkpoint: Path,
    saved: dict[str, Any],
    model_config: ModelConfig,
    way_out: str = "use the same model, or stage.init_from=none to start anew",
    but: Sequence[str] = (),
) -> None:
    """Refuse a checkpoint whose model has other shapes or arithmetic.

    Args:
        but: keys that may differ.

    Raises:
        ArtefactError: names every key that differs, with both values.
    """
    own = asdict(model_config)
    # none means as many as query heads
    own, saved = ({**model, "n_kv_heads": model.get("n_kv_heads") or model.get("n_heads")} for model in (own, saved))
    saved = {**saved, "head": head_of(saved)}
    ignored = {"name", "init_std", "max_seq_len", *but}
    different = [
        f"model.{key}={own[key]} (checkpoint: {saved.get(key)})"
        for key in own
        if key not in ignored and own[key] != saved.get(key)
    ]
    if different:
        raise ArtefactError(f"checkpoint {checkpoint} belongs to another model: {', '.join(different)}; {way_out}")
