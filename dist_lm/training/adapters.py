"""Checkpoints of adapters: they hold the trained factors alone and name the checkpoint of the frozen base.

state.json has an entry `adapters`: rank, alpha and targets, the base as an absolute path and as a path from the
checkpoint (a work directory may move), and the SHA-256 of the base's manifest, which has the hashes of its files. The
base may hold adapters itself; then it is merged first.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.config.stage import LoraConfig, TrainingGroup
from dist_lm.errors import ArtefactError, UserError
from dist_lm.model.lora import adapter_of, change
from dist_lm.model.size import ADAPTERS, parameter_shapes
from dist_lm.parallel.adapters import add_changes
from dist_lm.parallel.mesh import World
from dist_lm.training import checkpoint
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_files import fingerprint
from dist_lm.training.checkpoint_tensors import MadeTensor, StoredTensor, model_tensors, stored_tensors


def record_of(config: AdaptedModelConfig, directory: Path) -> dict[str, Any]:
    """The entry `adapters` of state.json.

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
    """The model of a checkpoint of adapters, with the directory where its base is now.

    Raises:
        ArtefactError: the base is gone or has changed, or the checkpoint does not describe adapters.
    """
    model, record = files.read_state(directory)[1], files.read_adapters(directory)
    try:
        assert record is not None
        lora, expected = LoraConfig(**record["lora"]), str(record["base_sha256"])
        from_here = os.path.normpath(directory.resolve() / str(record["base_from_here"]))
        places = [Path(from_here), Path(str(record["base"]))]
        config = AdaptedModelConfig.of(ModelConfig(**model), lora, base_sha256=expected)
    except (KeyError, TypeError, UserError) as error:
        raise ArtefactError(f"checkpoint {directory}: {files.STATE} does not describe adapters ({error})") from error
    found = [place for place in places if (place / files.MANIFEST).is_file()]
    if not found:
        raise ArtefactError(
            f"checkpoint {directory} holds adapters of the model {places[1]}, which is gone: put that checkpoint back"
        )
    for place in found:
        if fingerprint(place) == expected:
            config.base = str(place)
            return config
    raise ArtefactError(
        f"checkpoint {directory} holds adapters of the model {found[0]}, which has changed since: its {files.MANIFEST} "
        f"has SHA-256 {fingerprint(found[0])[:12]}, expected {expected[:12]}: put the checkpoint back that was there"
    )


def with_base(model: ModelConfig, checkpoints: Path, stage: TrainingGroup, world: World) -> AdaptedModelConfig:
    """The model of a run of adapters, with its base: that of its newest checkpoint or of stage.branch_from, else
    stage.init_from (collective).

    Raises:
        ArtefactError: the base is missing, damaged or has changed, or the run has other adapters.
    """
    assert isinstance(model, AdaptedModelConfig)
    own = checkpoint.newest_intact(checkpoints, world)
    if own is None and stage.branch_from:
        own = checkpoint.find_intact(Path(stage.branch_from), world)
    if own is None:
        base = checkpoint.find_intact(Path(stage.init_from), world).resolve()
        return AdaptedModelConfig.of(model, model.lora, str(base), fingerprint(base))
    check_same_adapters(own, model)
    found = adapted_model(own)
    checkpoint.find_intact(Path(found.base), world)
    return AdaptedModelConfig.of(model, model.lora, found.base, found.base_sha256)


def check_same_adapters(directory: Path, model: ModelConfig) -> None:
    """Refuse a checkpoint of other adapters than those of `model`.

    Raises:
        ArtefactError: names the checkpoint and both settings.
    """
    record = files.read_adapters(directory)
    saved = None if record is None else LoraConfig(**record["lora"])
    if saved != model.lora:
        was, now = (f"stage.lora={vars(lora) if lora else 'off'}" for lora in (saved, model.lora))
        raise ArtefactError(f"checkpoint {directory} has {was}, not {now}: give the same, or choose another run_id")


def load_merged(directory: Path, model: nn.Module, model_config: ModelConfig) -> None:
    """Fill the parameters of `model`, but not its adapters, with those of the base of a checkpoint of adapters, these
    merged (collective).

    Raises:
        ArtefactError: a checkpoint is missing, damaged, or belongs to another model.
    """
    adapted = adapted_model(directory)
    checkpoint.load_weights(Path(adapted.base), model, model_config)
    factors = {name: torch.from_numpy(_floats(tensor)) for name, tensor in _own(directory).items() if ADAPTERS in name}
    add_changes(model, adapted, parameter_shapes(model_config), factors)
    if model_config.head == adapted.head == "scalar":
        tensors = checkpoint.weights_of(model, model_config)
        head = {name: value for name, value in tensors.items() if name.startswith(f"{files.MODEL}scalar_head.")}
        checkpoint.read(directory, head)


def merged_tensors(directory: Path) -> dict[str, StoredTensor | MadeTensor]:
    """The parameters of the merged model by name; each is computed when it is read.

    Raises:
        ArtefactError: the base is missing, damaged or has changed.
    """
    adapted, own = adapted_model(directory), _own(directory)
    weights = model_tensors(files.require_intact(Path(adapted.base)))
    merged: dict[str, StoredTensor | MadeTensor] = {}
    for name, shape in parameter_shapes(adapted.plain).items():
        a, b = (own.get(f"{adapter_of(name)}{factor}") for factor in ("a", "b"))
        merged[name] = own[name] if name in own else weights[name]
        if a is not None and b is not None:
            make = partial(_merge, name, weights[name], a, b, adapted.scale)
            merged[name] = MadeTensor("F32", shape, weights[name].bytes, make)
    return merged


def _merge(name: str, weight: StoredTensor | MadeTensor, a: StoredTensor, b: StoredTensor, scale: float) -> np.ndarray:
    added = change(name, torch.from_numpy(_floats(a)), torch.from_numpy(_floats(b)), scale)
    whole = torch.from_numpy(_floats(weight).copy()).add_(added)
    return whole.flatten().view(torch.uint8).numpy()


def _own(directory: Path) -> Mapping[str, StoredTensor]:
    """The parameters that a checkpoint holds itself, by name."""
    return {
        name.removeprefix(files.MODEL): tensor
        for name, tensor in stored_tensors(directory).items()
        if name.startswith(files.MODEL)
    }


def _floats(tensor: StoredTensor | MadeTensor) -> np.ndarray:
    return tensor.read().view(np.float32).reshape(tensor.shape)
