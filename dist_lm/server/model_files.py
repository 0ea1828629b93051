"""Finds the models of a server, and which of them share the weights of one base.

Runs of adapters (LoRA) share one copy of their base if their checkpoints name the same base by its hash, and agree in
the model and the tokenizer; the base itself joins them if it is served too. A run that changes the base's own tensors
cannot share them: one with trained rows of tokens (`stage.lora.tokens`), or one whose base was in four bits
(`stage.lora.load_in_4bit`). What shares with nobody is loaded whole, with its adapters merged.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.errors import require
from dist_lm.generation.adapters import AdapterWeights
from dist_lm.generation.load import LoadedModel, load_model, model_config_of, run_of, tokenizer_of
from dist_lm.model.size import ADAPTERS
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files as files
from dist_lm.training.adapters import adapted_model
from dist_lm.training.checkpoint_tensors import as_fp32, model_weights, own_parameters

STEP_PREFIX = "step_"


@dataclass(frozen=True)
class ModelFiles:
    """A model that is not loaded yet."""

    path: Path  # as the user has written it
    checkpoint: Path
    config: ModelConfig  # without adapters
    name: str  # its name in responses
    aliases: tuple[str, ...] = ()
    adapted: AdaptedModelConfig | None = None  # with adapters and their base; None: a complete model

    @property
    def version(self) -> int:
        """Version of the weights: the step of the checkpoint, 0 if its name tells none."""
        step = self.checkpoint.name.removeprefix(STEP_PREFIX)
        return int(step) if step.isdigit() else 0


def find_models(paths: Sequence[Path], names: Sequence[str], follow: bool = False) -> list[ModelFiles]:
    """Returns the models to load. Each is called by run and checkpoint, `sft/default/step_00000400`.

    Args:
        paths: runs, folders of checkpoints, or checkpoints.
        names: further names of a single model; of several models one name for each, in their order.
        follow: whether checkpoints will change: models are called by their run alone.

    Raises:
        ConfigError: there are several models, and names for some; or a checkpoint is to be followed.
        ArtefactError: a path holds no checkpoint of a model, or the base of its adapters is gone or has changed.
    """
    is_single = len(paths) == 1
    accepted = f"none, or one for each of the {len(paths)} models"
    require(is_single or len(names) in (0, len(paths)), "--name", " ".join(names), accepted)

    models: list[ModelFiles] = []
    for number, path in enumerate(paths):
        checkpoint = files.find_checkpoint(path)
        run = run_of(checkpoint)
        config = model_config_of(checkpoint)
        if follow:
            can_follow = checkpoint.resolve() != path.resolve() and config.head == "tokens"
            require(can_follow, "--follow", path, "runs of language models, or folders of their checkpoints")

        name = "/".join((*run.path.parts[-2:], checkpoint.name)) if run else str(checkpoint)
        if follow:
            name = name.removesuffix(f"/{checkpoint.name}")
        aliases = tuple(names) if is_single else tuple(names[number : number + 1])
        adapted = adapted_model(checkpoint) if files.read_adapters(checkpoint) is not None else None
        models.append(ModelFiles(path, checkpoint, config, name, aliases, adapted))
    return models


def refuse_repeated(models: Sequence[ModelFiles]) -> None:
    """Refuses models that requests could not tell apart, before any of them is loaded.

    Raises:
        ConfigError: a checkpoint is named twice, or a further name is that of another model.
    """
    ids = [model.name for model in models]
    for model in models:
        expected = "each model once: requests name a model by its run and checkpoint"
        require(ids.count(model.name) == 1, "run", model.path, expected)

    names = [name for model in models for name in (model.name, *model.aliases)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    require(not repeated, "--name", ", ".join(repeated), "another name for each model")


def by_base(models: Sequence[ModelFiles]) -> list[list[ModelFiles]]:
    """Returns the models in groups that can share one copy of a base, each group and model in the order of `models`; a
    group of one is loaded whole."""
    groups: dict[tuple[str, ...], list[ModelFiles]] = {}
    for number, model in enumerate(models):
        groups.setdefault(_base_key(model) or (str(number),), []).append(model)

    # Models that are the same checkpoint twice have no adapter to share a base with.
    grouped: list[list[ModelFiles]] = []
    for group in groups.values():
        if any(model.adapted for model in group):
            grouped.append(group)
        else:
            grouped += [[model] for model in group]
    return grouped


def _base_key(model: ModelFiles) -> tuple[str, ...] | None:
    """Returns what models that share a base have in common (hash of the base, tokenizer, shape as JSON); None: the
    model shares none, because of its head, its tokenizer, trained tokens or weights in 4 bits.

    Raises:
        ArtefactError: the checkpoint is damaged.
    """
    tokenizer = files.read_state(model.checkpoint)[0].tokenizer
    if model.config.head != "tokens" or not tokenizer:
        return None
    base = files.fingerprint(model.checkpoint)
    if model.adapted:
        if model.adapted.lora.tokens or model.adapted.is_in_4bit:
            return None
        base = model.adapted.base_sha256
    # The name of a configuration says nothing about the model.
    shape = json.dumps(asdict(replace(model.config, name="")), sort_keys=True)
    return base, tokenizer, shape


def load_group(
    group: Sequence[ModelFiles], tokenizer: Path | None
) -> tuple[LoadedModel, list[AdapterWeights], list[Tokenizer]]:
    """Returns the weights that the models of a group share, the adapters beside them (both fp32, on the host), and the
    tokenizer of each model. A model alone is loaded whole, with its adapters merged.

    Args:
        group: as returned by `by_base`.
        tokenizer: file or folder of the tokenizer of all; None: that of each run.

    Raises:
        ArtefactError: a checkpoint or tokenizer is missing or damaged, or they do not fit.
        UserError: a tokenizer needs the package `tokenizers`, which is not installed.
    """
    if len(group) == 1:
        loaded = load_model(group[0].checkpoint, tokenizer)
        return loaded, [], [loaded.tokenizer]

    adapters: list[AdapterWeights] = []
    tokenizers: list[Tokenizer] = []
    for model in group:
        checkpoint = files.require_intact(model.checkpoint)
        tokenizers.append(tokenizer_of(checkpoint, tokenizer, run_of(checkpoint)))
        files.check_tokenizer(checkpoint, files.read_state(checkpoint)[0], tokenizers[-1].sha256)
        if model.adapted:
            factors = {
                name: torch.from_numpy(as_fp32(tensor))
                for name, tensor in own_parameters(checkpoint).items()
                if ADAPTERS in name
            }
            adapters.append(AdapterWeights(model.name, model.adapted, factors, model.version))

    adapted = next(model.adapted for model in group if model.adapted)
    base = files.require_intact(Path(adapted.base))
    weights = {name: torch.from_numpy(array) for name, array in model_weights(base).items()}
    return LoadedModel(str(base), adapted.plain, weights, tokenizers[0], run_of(base)), adapters, tokenizers
