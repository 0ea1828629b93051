"""Checkpoints of adapters: they hold the trained factors alone and name the checkpoint of the frozen base.

state.json has an entry `adapters`: rank, alpha and targets, the base as an absolute path and as a path from the
checkpoint (a work directory may move), and the SHA-256 of the base's manifest, which has the hashes of its files. The
base may hold adapters itself; then it is merged first.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.config.stage import LoraConfig
from dist_lm.errors import ArtefactError, UserError
from dist_lm.training import checkpoint_files as files


def record_of(config: AdaptedModelConfig, directory: Path) -> dict[str, Any]:
    """Returns the entry `adapters` of state.json.

    Args:
        directory: the final directory of the checkpoint.
    """
    return {
        "lora": asdict(config.lora),
        "base": config.base,
        "base_from_here": os.path.relpath(config.base, directory.resolve()),
        "base_sha256": config.base_sha256,
    }


def adapted_model(directory: Path) -> AdaptedModelConfig:
    """Returns the model of a checkpoint of adapters, with the directory where its base is now: beside the checkpoint,
    else at the recorded path. No file of tensors is read.

    Raises:
        ArtefactError: the base is gone or has changed, or the checkpoint cannot be read or does not describe adapters.
    """
    model, record = files.read_state(directory)[1], files.read_adapters(directory)
    assert record is not None
    lora = _lora_of(directory, record)
    try:
        base_sha256 = str(record["base_sha256"])
        config = AdaptedModelConfig.of(ModelConfig(**model), lora, base_sha256=base_sha256)
        recorded_path = Path(str(record["base"]))
        moved_path = Path(os.path.normpath(directory.resolve() / str(record["base_from_here"])))
    except (KeyError, TypeError, UserError) as error:
        raise ArtefactError(f"checkpoint {directory}: {files.STATE} does not describe adapters ({error})") from error

    # A copied work directory has both; the base beside this checkpoint comes first.
    bases = [path for path in (moved_path, recorded_path) if (path / files.MANIFEST).is_file()]
    if not bases:
        raise ArtefactError(
            f"checkpoint {directory} holds adapters of the model {recorded_path}, which is gone: put that checkpoint "
            "back"
        )
    # The hash decides: a path may hold another checkpoint by now.
    for base in bases:
        if files.fingerprint(base) == base_sha256:
            config.base = str(base)
            return config
    raise ArtefactError(
        f"checkpoint {directory} holds adapters of the model {bases[0]}, which has changed since: its {files.MANIFEST} "
        f"has SHA-256 {files.fingerprint(bases[0])[:12]}, expected {base_sha256[:12]}: put the checkpoint back that "
        "was there"
    )


def check_same_adapters(directory: Path, model: ModelConfig) -> None:
    """Refuses a checkpoint whose adapters have other settings than `model`.

    Raises:
        ArtefactError: names the checkpoint and both settings, or the checkpoint does not describe adapters.
    """
    record = files.read_adapters(directory)
    saved = None if record is None else _lora_of(directory, record)
    if saved != model.lora:
        was, now = (f"stage.lora={vars(lora) if lora else 'off'}" for lora in (saved, model.lora))
        raise ArtefactError(f"checkpoint {directory} has {was}, not {now}: give the same, or choose another run_id")


def _lora_of(directory: Path, record: dict[str, Any]) -> LoraConfig:
    """Returns the settings of adapters in the entry `adapters` of a checkpoint.

    Raises:
        ArtefactError: they are missing, or adapters cannot have them.
    """
    try:
        return LoraConfig(**record["lora"])
    except (KeyError, TypeError, UserError) as error:
        raise ArtefactError(f"checkpoint {directory}: {files.STATE} does not describe adapters ({error})") from error
