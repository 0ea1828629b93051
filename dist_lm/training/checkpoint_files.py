"""A checkpoint as files: names, format, manifest, pointers, retention. No tensors here.

    checkpoints/
      step_00000100/  shard-*.safetensors  index.json  state.json  stage/... (files of the stage)
                      manifest.json (written last: size and SHA-256 of the other files)
      LATEST BEST     each holds the name of one checkpoint

A checkpoint is written under a name that starts with a dot, made durable, renamed, and then pointed at. So a plain name
means a complete checkpoint, and the manifest reveals later damage.

Files are read and never mapped. A mapped file that shrinks, or lies on a disk or a mount that fails, ends the process
with SIGBUS; a read raises an error, so that a server keeps its weights and ranks end together.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from io import BufferedReader
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.config.model import LAYER_LISTS, ModelConfig
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.training.state import TrainState

log = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step_[0-9]+")
LATEST, BEST = "LATEST", "BEST"
STATE, MANIFEST = "state.json", "manifest.json"
INDEX = "index.json"  # places of the parts of each tensor; checkpoints of earlier versions and imports have none
AVERAGE = "average.json"  # beside averaged weights: the averaged checkpoints, and the metrics on val
STAGE = "stage"  # folder for files of the stage: files of tensors in the checkpoint itself are read as parts of models
TENSORS = ".safetensors"  # suffix of a file of tensors
MODEL, OPTIMIZER = "model.", "optimizer."  # prefixes of tensor names
FORMAT = 2  # 2: norms of queries and keys as in Qwen3, conversations as ChatML


@dataclass(frozen=True)
class FileRecord:
    """Entry of the manifest for a file."""

    sha256: str
    bytes: int


Manifest = dict[str, FileRecord]  # the key is the file's name


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Returns the step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


def newest_step(checkpoints: Path) -> int:
    """Returns the step of the newest checkpoint of a run; 0 if there is none."""
    latest = read_pointer(checkpoints, LATEST)
    return step_of(latest) if latest else 0


def steps_in(checkpoints: Path) -> list[Path]:
    """Lists the complete checkpoints of a run, oldest first."""
    paths = checkpoints.glob("step_*")
    return sorted(path for path in paths if path.name.removeprefix("step_").isdecimal() and path.is_dir())


def read_pointer(checkpoints: Path, name: str) -> Path | None:
    """Returns the checkpoint that the pointer `name` (LATEST or BEST) names; None if the pointer or that checkpoint
    does not exist.

    A missing or damaged LATEST means the newest complete checkpoint, from which ranks continue; None if there is none.
    """
    target = _target(checkpoints / name)
    if target is not None:
        return target
    if name != LATEST:
        return None
    return next(reversed(steps_in(checkpoints)), None)


def names_nothing(checkpoints: Path, name: str) -> bool:
    """Returns whether the pointer `name` exists and names no checkpoint that is there: it is damaged, or the checkpoint
    is gone."""
    return (checkpoints / name).is_file() and _target(checkpoints / name) is None


def _target(pointer: Path) -> Path | None:
    """Returns the checkpoint that a pointer names; None without the pointer or the checkpoint."""
    if not pointer.is_file():
        return None
    # A damaged pointer may hold any bytes, and an empty one would name the folder itself.
    name = pointer.read_bytes().decode(errors="replace").strip()
    if _STEP_NAME.fullmatch(name) and (pointer.parent / name).is_dir():
        return pointer.parent / name
    return None


def write_pointer(checkpoints: Path, name: str, target: Path) -> None:
    durable.write_text(checkpoints / name, target.name + "\n")


def write_state(
    directory: Path, state: TrainState, model: dict[str, Any], adapters: Mapping[str, Any] | None = None
) -> None:
    """Records the state of the run and the configuration of the model.

    Args:
        adapters: settings and base of the adapters, if the checkpoint holds adapters alone.
    """
    content: dict[str, Any] = {"format": FORMAT, "state": asdict(state), "model": model}
    if adapters is not None:
        content["adapters"] = adapters
    durable.write_json(directory / STATE, content)


def read_state(directory: Path) -> tuple[TrainState, dict[str, Any]]:
    """Returns (state, model configuration by key), as `write_state` wrote them.

    Raises:
        ArtefactError: the file is missing, cannot be read or lacks an entry, or the checkpoint has another format.
    """
    try:
        content = json.loads((directory / STATE).read_text())
        written_format = content["format"]
        if written_format == FORMAT:
            return TrainState.from_json(content["state"]), content["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtefactError(f"checkpoint {directory}: {STATE} cannot be read ({error})") from error
    raise ArtefactError(
        f"checkpoint {directory}: format {written_format}, expected {FORMAT}: another version of dist_lm wrote it; "
        "train this model again under another run_id or work_dir, or load it with that version"
    )


def read_adapters(directory: Path) -> dict[str, Any] | None:
    """Returns settings and base of the adapters that a checkpoint holds; None if it holds a complete model.

    Call it after `read_state`, which refuses a file that cannot be read.
    """
    return json.loads((directory / STATE).read_text()).get("adapters")


def attach(directory: Path, contents: Mapping[str, bytes]) -> dict[str, str]:
    """Writes files of the stage into the new folder STAGE and flushes them to disk; returns SHA-256 by `STAGE/NAME`,
    for the manifest. Without files there is no folder.

    Raises:
        OSError: the folder exists, or a file cannot be written.
    """
    if not contents:
        return {}
    (directory / STAGE).mkdir()
    digests = {}
    for name, content in contents.items():
        path = directory / STAGE / name
        path.write_bytes(content)
        durable.fsync(path)
        digests[f"{STAGE}/{name}"] = durable.sha256_of(path)
    durable.fsync(directory / STAGE)
    return digests


def read_attached(directory: Path, name: str) -> bytes:
    """Reads the file that the stage attached under `name`.

    Raises:
        ArtefactError: the file is missing.
    """
    try:
        return (directory / STAGE / name).read_bytes()
    except OSError as error:
        raise ArtefactError(f"checkpoint {directory}: {STAGE}/{name} cannot be read ({error.strerror})") from error


def write_manifest(directory: Path, sha256: dict[str, str]) -> None:
    """Records size and SHA-256 of every file; `sha256` maps file name to digest."""
    files = {name: {"sha256": digest, "bytes": (directory / name).stat().st_size} for name, digest in sha256.items()}
    durable.write_json(directory / MANIFEST, files)


def fingerprint(directory: Path) -> str:
    """Returns the SHA-256 of the manifest of a checkpoint, which changes with any of its files.

    Raises:
        ArtefactError: it has no manifest.
    """
    read_manifest(directory)
    return durable.sha256_of(directory / MANIFEST)


def read_manifest(directory: Path) -> Manifest:
    """Returns the files of a checkpoint by name, as `write_manifest` wrote them.

    Raises:
        ArtefactError: the file cannot be read.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        return {name: FileRecord(str(file["sha256"]), int(file["bytes"])) for name, file in manifest.items()}
    # Without one of these, the ranks that wait for the first would wait on.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtefactError(f"checkpoint {directory}: {MANIFEST} cannot be read ({error})") from error


def damage(
    directory: Path, contents: bool = True, share: tuple[int, int] = (0, 1), manifest: Manifest | None = None
) -> Iterator[str]:
    """Compares the files of a checkpoint with its manifest; yields a phrase (`NAME is missing`) for each missing,
    changed, unreadable or foreign file.

    A foreign file counts if it ends in `.safetensors` or is an index, because tensors are read from all such files.

    Args:
        contents: whether to compare contents too, not only sizes.
        share: (i, n): check every n-th file, starting at the i-th; foreign files are the part of the first share.
        manifest: of the checkpoint; None: read it.

    Raises:
        ArtefactError: the manifest cannot be read.
    """
    if manifest is None:
        manifest = read_manifest(directory)
    first, step = share
    for name, expected in sorted(manifest.items())[first::step]:
        if reason := _damage_of_file(directory / name, expected, contents):
            yield f"{name} {reason}"

    # One listing of the folder serves all shares.
    if first > 0:
        return
    for path in sorted([*directory.glob(f"*{TENSORS}"), *directory.glob(INDEX)]):
        if path.name not in manifest:
            yield f"{path.name} does not belong to it (not in {MANIFEST})"


def _damage_of_file(path: Path, expected: FileRecord, contents: bool) -> str | None:
    """Returns what is wrong with a file as the end of a sentence; None if it has the size and, if asked, the hash
    expected."""
    try:
        if not path.is_file():
            return "is missing"
        if (size := path.stat().st_size) != expected.bytes:
            return f"has {size} bytes, expected {expected.bytes}"
        if contents and durable.sha256_of(path) != expected.sha256:
            return f"is damaged (SHA-256 differs from {MANIFEST})"
    except OSError as error:  # a bad disk, a lost mount
        return f"cannot be read ({error.strerror})"
    return None


class ShortFileError(Exception):
    """A file ends before the tensors that its header announces."""


def read_exactly(file: BufferedReader, start: int, target: memoryview) -> None:
    """Fills a buffer of bytes from a file, from the byte offset `start` on.

    Raises:
        ShortFileError: the file ends before.
        OSError: the file cannot be read.
    """
    position = 0
    # The kernel reads at most 2 GiB at once.
    while position < target.nbytes:
        n_read = os.preadv(file.fileno(), [target[position:]], start + position)
        if n_read == 0:
            raise ShortFileError(f"{file.name} is shorter than its header says: it ends before byte {start + position}")
        position += n_read


def verify(directory: Path, contents: bool = True) -> None:
    """Refuses a damaged checkpoint; `contents` as in `damage`.

    Raises:
        ArtefactError: names the first missing, truncated, changed or foreign file, or the manifest that cannot be read.
    """
    if problem := first_damage(directory, contents):
        raise ArtefactError(problem)


def verify_state(directory: Path) -> None:
    """Refuses a checkpoint whose STATE differs from the manifest.

    Raises:
        ArtefactError: it does, or the manifest cannot be read.
    """
    expected = read_manifest(directory).get(STATE)
    if expected and (reason := _damage_of_file(directory / STATE, expected, contents=True)):
        raise ArtefactError(f"checkpoint {directory}: {STATE} {reason}")


def are_tiles(begin_PD: np.ndarray, end_PD: np.ndarray, box_begin_D: np.ndarray, box_end_D: np.ndarray) -> bool:
    """Returns whether P parts of D dimensions hold every entry of a box once, and no entry outside; P log P steps
    for each of 2^D corners.

    Args:
        begin_PD: first indices of the parts, int64; `end_PD` has those after their last ones.
        box_begin_D: first indices of the box, int64; `box_end_D` has those after its last ones.
    """
    # How often each entry is covered follows from the corners of the parts alone: each counts +1, or -1 if an odd
    # number of its coordinates are ends. The sums of the parts at all corners must be those of the box.
    begins = np.vstack([begin_PD, box_begin_D])
    ends = np.vstack([end_PD, box_end_D])
    signs = np.ones(len(begins), dtype=np.int64)
    signs[-1] = -1

    corners, counts = [], []
    for is_end_D in product((False, True), repeat=len(box_begin_D)):
        corners.append(np.where(np.array(is_end_D, dtype=bool), ends, begins))
        counts.append(signs * (-1) ** sum(is_end_D))
    corners_CD, counts_C = np.concatenate(corners), np.concatenate(counts)

    # Equal corners get the same number. To sort one dimension after the other is ten times faster than to sort rows.
    numbers_C = np.zeros(len(corners_CD), dtype=np.int64)
    for coordinates_C in corners_CD.T:
        _, places_C = np.unique(coordinates_C, return_inverse=True)
        _, numbers_C = np.unique(numbers_C * len(corners_CD) + places_C, return_inverse=True)
    return not np.bincount(numbers_C, counts_C).any()


def first_damage(
    directory: Path, contents: bool = True, share: tuple[int, int] = (0, 1), manifest: Manifest | None = None
) -> str | None:
    """Returns the first damage of a checkpoint as a sentence; None if it is intact. Arguments as in `damage`."""
    try:
        phrase = next(damage(directory, contents, share, manifest), None)
        return phrase and f"checkpoint {directory}: {phrase}"
    except ArtefactError as error:
        return str(error)


def newest_intact(checkpoints: Sequence[Path], damage_of: Callable[[Path], str | None] = first_damage) -> Path | None:
    """Returns the newest intact checkpoint; None if there are no checkpoints.

    It logs a warning for every damaged checkpoint that it skips.

    Args:
        checkpoints: oldest first.

    Raises:
        ArtefactError: all checkpoints are damaged.
    """
    newest_damage = None
    for directory in reversed(checkpoints):
        problem = damage_of(directory)
        if problem is None:
            return directory
        newest_damage = newest_damage or problem
        log.warning("%s; using the checkpoint before it", problem)
    if newest_damage:
        raise ArtefactError(
            f"no intact checkpoint in {checkpoints[0].parent}: {newest_damage}; remove the run directory to start again"
        )
    return None


def tidy(checkpoints: Path, state: TrainState, keep: int) -> None:
    """Cleans up after saving `state`: removes checkpoints of later steps, points BEST at its best step if that
    checkpoint exists, then calls `prune`.

    Raises:
        OSError: BEST cannot be written; `prune` is not called then.
    """
    # Checkpoints of later steps were damaged, so the run went back and repeats their steps.
    for directory in steps_in(checkpoints):
        if directory.name > step_name(state.step):
            _remove(directory)

    best = checkpoints / step_name(state.best_step)
    if state.best_val_loss is not None and best.is_dir():
        write_pointer(checkpoints, BEST, best)
    prune(checkpoints, keep)


def prune(checkpoints: Path, keep: int) -> None:
    """Removes all checkpoints but BEST and the newest `keep` (0: keep all), and the leftovers of killed saves. What
    cannot be removed is logged."""
    # BEST may be older than the newest ones.
    best = read_pointer(checkpoints, BEST)
    if keep:
        for directory in steps_in(checkpoints)[:-keep]:
            if directory != best:
                _remove(directory)
    for leftover in checkpoints.glob(".step_*"):
        _remove(leftover)


def _remove(directory: Path) -> None:
    """Removes a checkpoint; one that a network file system still holds open may stay."""
    try:
        shutil.rmtree(directory)
    except OSError as error:
        log.warning("checkpoint %s could not be removed (%s); delete it by hand", directory, error)


def find_checkpoint(path: Path) -> Path:
    """Returns the checkpoint that a user names: a step directory, a `checkpoints` folder, a run directory, or RUN@STEP.

    A folder or a run means its LATEST. The files are not verified.

    Raises:
        ArtefactError: there is no checkpoint.
    """
    # A damaged checkpoint may lack one of the two files and must still be recognised.
    if any((path / name).is_file() for name in (STATE, MANIFEST)):
        return path

    run, at, step = str(path).rpartition("@")
    if at and step.isdecimal() and not path.exists():
        return _checkpoint_of_step(path, Path(run), step)

    for checkpoints in (path, path / "checkpoints"):
        checkpoint = read_pointer(checkpoints, LATEST)
        if checkpoint is not None:
            return checkpoint

    way_out = ""
    if path.suffix == ".gguf" or (path / "config.json").is_file():
        way_out = "; `dist-lm import` makes a run of a model of transformers or llama.cpp"
    raise ArtefactError(
        f"{path}: no checkpoint there (expected a run directory, RUN@STEP, or one of its checkpoints/step_*){way_out}"
    )


def _checkpoint_of_step(path: Path, run: Path, step: str) -> Path:
    """Returns the checkpoint of `step` in the folder `run` or its `checkpoints`; `path` is what the user wrote.

    Raises:
        ArtefactError: there is none; the message lists the steps that have one.
    """
    folders = (run, run / "checkpoints")
    for folder in folders:
        checkpoint = folder / step_name(int(step))
        if checkpoint.is_dir():
            return checkpoint
    steps = ", ".join(str(step_of(checkpoint)) for folder in folders for checkpoint in steps_in(folder))
    raise ArtefactError(f"{path}: no checkpoint of step {step} there; steps with a checkpoint: {steps or 'none'}")


def require_intact(checkpoint: Path, damage_of: Callable[[Path], str | None] = first_damage) -> Path:
    """Returns `checkpoint` after verifying all of its files.

    Raises:
        ArtefactError: it is damaged; the message names the other checkpoints of the run.
    """
    if problem := damage_of(checkpoint):
        alternatives = [step.name for step in steps_in(checkpoint.parent) if step != checkpoint]
        raise ArtefactError(f"{problem}; other checkpoints of the run: {', '.join(alternatives) or 'none'}")
    return checkpoint


SCALED_POSITIONS = (
    *("rope_base", "rope_scaling", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"),
    *("rope_original_len", "rope_beta_fast", "rope_beta_slow", "rope_truncate", "rope_attention_factor"),
)


def check_start(checkpoint: Path, saved: dict[str, Any], model_config: ModelConfig) -> None:
    """Refuses a checkpoint that a model cannot start from.

    A model with a scalar head may start from a model with a token head. A model for longer contexts may scale its
    positions where the checkpoint does not, or scales them in another way.

    Args:
        saved: configuration of the model in the checkpoint.

    Raises:
        ArtefactError: names every key that differs, with both values.
    """
    may_differ: tuple[str, ...] = ()
    if model_config.head == "scalar" and saved["head"] == "tokens":
        # Without a token head, it does not matter whether the token head was tied.
        may_differ = ("head", "tie_embeddings")
    if model_config.rope_scaling != "none" and model_config.max_seq_len > saved["max_seq_len"]:
        may_differ += SCALED_POSITIONS
    check_same_model(checkpoint, saved, model_config, but=may_differ)


def check_tokenizer(checkpoint: Path, state: TrainState, sha256: str) -> None:
    """Refuses a checkpoint that was trained with a tokenizer whose hash is not `sha256`.

    Raises:
        ArtefactError: names both hashes. Checkpoints of earlier versions have none.
    """
    if state.tokenizer not in ("", sha256):
        raise ArtefactError(
            f"checkpoint {checkpoint}: trained with tokenizer {state.tokenizer[:12]}, not {sha256[:12]}: use the "
            "tokenizer of its work directory (tokenizer=PATH)"
        )


def check_same_model(
    checkpoint: Path,
    saved: dict[str, Any],
    model_config: ModelConfig,
    way_out: str = "use the same model, or stage.init_from=none to start from new weights",
    but: Sequence[str] = (),
) -> None:
    """Refuses a checkpoint whose model has other shapes or arithmetic; name, initial values and max_seq_len may differ.

    Args:
        saved: configuration of the model in the checkpoint; keys that it lacks have their defaults.
        way_out: what the user can do, the end of the message.
        but: further keys that may differ.

    Raises:
        ArtefactError: names every key that differs, with both values.
    """
    expected = asdict(model_config.plain)
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    saved = defaults | {key: [] for key in LAYER_LISTS} | saved  # newer options are off

    # None means one key/value head per query head.
    for model in (expected, saved):
        model["n_kv_heads"] = model.get("n_kv_heads") or model.get("n_heads")

    # These keys change neither shapes nor arithmetic of a trained model, beyond its rounding.
    ignored = {"name", "init_std", "residual_init", "base_width", "max_seq_len", "export_as", "head_dtype", *but}
    different = [
        f"model.{key}={expected[key]} (checkpoint: {saved.get(key)})"
        for key in expected
        if key not in ignored and expected[key] != saved.get(key)
    ]
    if different:
        raise ArtefactError(f"checkpoint {checkpoint} belongs to another model: {', '.join(different)}; {way_out}")
