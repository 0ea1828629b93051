"""A trained model in one process: from a run or a checkpoint, whatever layout wrote it, without process groups."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, UserError
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import model_weights

DEPTH = 3  # of a run in its work directory


@dataclass(frozen=True)
class LoadedModel:
    """All that it takes to answer."""

    name: str  # of the checkpoint, with its run: `code/default/step_00000400`
    config: ModelConfig
    weights: dict[str, torch.Tensor]  # by the names of the model's parameters, in host memory
    tokenizer: Tokenizer
    run: RunDirectory | None  # the checkpoint's, where it lies in one


def load_model(path: Path, tokenizer: Path | None = None) -> LoadedModel:
    """The model of the checkpoint that `path` names: a run, a folder of checkpoints, or one of them.

    Args:
        tokenizer: its file or folder; by default that of the work directory in which the run lies.

    Raises:
        ArtefactError: checkpoint or tokenizer are missing, damaged, or do not belong together.
    """
    checkpoint = files.require_intact(files.find_checkpoint(path))
    config = _model_config(checkpoint)
    run = _run_of(checkpoint)
    if config.head != "tokens":
        raise ArtefactError(f"checkpoint {checkpoint}: its model gives scores (model.head={config.head}), no text")
    found = _tokenizer(checkpoint, tokenizer, run)
    if found.vocab_size != config.vocab_size:
        raise ArtefactError(
            f"checkpoint {checkpoint}: its model knows {config.vocab_size} tokens, the tokenizer has "
            f"{found.vocab_size}: name the one that it was trained with by --tokenizer=PATH"
        )
    weights = {name: torch.from_numpy(value) for name, value in model_weights(checkpoint).items()}
    name = "/".join((*run.path.parts[-2:], checkpoint.name)) if run else str(checkpoint)
    return LoadedModel(name, config, weights, found, run)


def _model_config(checkpoint: Path) -> ModelConfig:
    _, model = files.read_state(checkpoint)
    values: dict[str, Any] = dict(model)
    try:
        return ModelConfig(**values)
    except (TypeError, UserError) as error:
        raise ArtefactError(f"checkpoint {checkpoint}: {files.STATE} describes no model of ours ({error})") from error


def _run_of(checkpoint: Path) -> RunDirectory | None:
    """The run that a checkpoint lies in."""
    places = [checkpoint.absolute(), checkpoint.resolve()]  # a run, or the folder of all runs, may be a link
    runs = [
        RunDirectory(place.parents[1])
        for place in places
        if place.parent.name == "checkpoints" and len(place.parents) >= 2 + DEPTH
    ]
    runs = [run for run in runs if run.config.is_file()]
    return next((run for run in runs if run.work.tokenizer_model.is_file()), runs[0] if runs else None)


def _tokenizer(checkpoint: Path, named: Path | None, run: RunDirectory | None) -> Tokenizer:
    if named is not None:
        file = named / WorkDirectory(named).tokenizer_model.name if named.is_dir() else named
        if not file.is_file():
            raise ArtefactError(f"--tokenizer={named}: no tokenizer there; expected work/tokenizer/tokenizer.model")
        return Tokenizer.load(file)
    if run is None:
        raise ArtefactError(
            f"checkpoint {checkpoint}: it lies in no run, so its tokenizer is not known: give --tokenizer=PATH"
        )
    path = run.work.tokenizer_model
    if not path.is_file():
        raise ArtefactError(f"{path}: no tokenizer there: give the run's own by --tokenizer=PATH")
    return Tokenizer.load(path)
