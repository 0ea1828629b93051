"""The part of `dist-lm export` for a checkpoint of adapters: a folder that peft loads over the base.

peft adds `lora_alpha / r * lora_B lora_A` (with `use_rslora` `lora_alpha / sqrt(r)`) to a weight (out, in) of
transformers: lora_A is (r, in), lora_B (out, r). In GPT-NeoX queries, keys and values are one weight, in Phi-3 gate and
up too. Their adapters become one of the summed rank, with an alpha that keeps the scale: each takes its own rows of
lora_A, and its own columns and rows of lora_B; the rest of lora_B is 0.

Rows of stage.lora.tokens replace those of the embedding and the head (`trainable_token_indices`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_lm.config.model import AdaptedModelConfig
from dist_lm.config.root import read_groups
from dist_lm.generation.load import run_of
from dist_lm.interop.adapter_folder import CONFIG, PREFIX, WEIGHTS
from dist_lm.interop.architectures import Architecture
from dist_lm.interop.weights import ALIASES, Converted, converted
from dist_lm.model.lora import adapter_of
from dist_lm.model.size import TOKEN_WEIGHTS, Shape, parameter_shapes
from dist_lm.stages.exporting.tensors import DTYPES, Read, as_torch, made
from dist_lm.storage import durable
from dist_lm.training import checkpoint_files as files
from dist_lm.training.adapters import adapted_model
from dist_lm.training.checkpoint_tensors import stored_tensors, write_tensors

log = logging.getLogger(__name__)

GGUF = ".gguf"  # end of the name of a file for llama.cpp
# head -> peft's name of the task, and the modules that it stores whole, beside the adapters
TASKS = {"tokens": ("CAUSAL_LM", None), "scalar": ("SEQ_CLS", ["score"])}


def write_adapters(
    folder: Path,
    checkpoint: Path,
    architecture: Architecture,
    dtype: str,
    base: str,
    special_ids: Mapping[str, int],
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json into `folder`; one tensor is in memory at a time.

    Args:
        architecture: the one of transformers that holds the model.
        dtype: bf16 | fp32.
        base: folder or hub id of the base in transformers' form; empty: where it was imported from, or without such a
            source its run, which is then said.
        special_ids: ids of special tokens by name.

    Raises:
        ArtefactError: the base is gone or has changed.
        OSError: a file cannot be written.
    """
    model, stored = adapted_model(checkpoint), stored_tensors(checkpoint)
    token_ids = [special_ids[name] for name in model.lora.tokens]
    tensors = peft_tensors(architecture, model, lambda name: as_torch(stored[files.MODEL + name], name), token_ids)
    stored_dtype = DTYPES[dtype][0]
    parts = {name: made(stored_dtype, tensor.shape, tensor.make) for name, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS, parts, {"format": "pt"})

    base = base or source_of_base(Path(model.base))
    if not base:
        run = run_of(Path(model.base))
        base = str(run.path if run else model.base)
        log.warning(
            "%s names %s as the base, which peft cannot load: export the base too, by `dist-lm export %s FOLDER`, and "
            "the adapters again with --base FOLDER",
            CONFIG,
            base,
            base,
        )

    config = peft_config(architecture, model, base, token_ids)
    durable.write_json(folder / CONFIG, config)


def source_of_base(base: Path) -> str:
    """Returns the folder or hub id that a base was imported from, which transformers loads; empty if no such folder
    holds it: then the base has to be exported, too.

    Args:
        base: its checkpoint.

    Raises:
        ArtefactError: the configuration of the run cannot be read.
    """
    run = run_of(base)
    imported = read_groups(run.config).get("imported", {}) if run else {}
    source = imported.get("source")
    # Adapters that replace weights of their base, and an import that adds marks to the tokenizer, make a base that
    # differs from its source. Of a GGUF file transformers needs a folder, too.
    if source is None or "changed_by" in imported or str(source).endswith(GGUF):
        return ""
    source = str(source).removeprefix("hf:")
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else source


@dataclass(frozen=True)
class PeftTensor:
    """A tensor of adapter_model.safetensors."""

    shape: Shape
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Target:
    """A weight of transformers, with the adapters of those of our weights that it holds."""

    theirs: Converted
    adapters: tuple[tuple[int, str], ...]  # (index of our weight in it, beginning of the names of the factors)

    @property
    def module(self) -> str:
        return self.theirs.name.removesuffix(".weight")


def peft_tensors(
    architecture: Architecture, model: AdaptedModelConfig, read: Read, token_ids: Sequence[int] = ()
) -> dict[str, PeftTensor]:
    """Returns the tensors of adapter_model.safetensors by name, with shapes; they are computed when they are written.

    Args:
        read: gives the trained parameters, whole and unpadded.
        token_ids: those of stage.lora.tokens.
    """
    tensors: dict[str, PeftTensor] = {}
    for target in _targets(architecture, model):
        rank, (out, into) = model.lora.rank * len(target.adapters), target.theirs.shape
        name = f"{PREFIX}{target.module}"
        tensors[f"{name}.lora_A.weight"] = PeftTensor((rank, into), partial(_lora_a, target, read))
        tensors[f"{name}.lora_B.weight"] = PeftTensor((out, rank), partial(_lora_b, target, model.lora.rank, read))
    for ours, module in _token_modules(architecture, model).items():
        rows = PeftTensor((len(token_ids), model.d_model), partial(_rows, ours, read, token_ids))
        tensors[f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"] = rows
    if model.head == "scalar":
        tensors[f"{PREFIX}score.weight"] = PeftTensor((1, model.d_model), partial(read, "scalar_head.weight"))
    return tensors


def peft_config(
    architecture: Architecture, model: AdaptedModelConfig, base: str, token_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """Returns the content of adapter_config.json.

    Args:
        base: folder or hub id of the base in transformers' form.
        token_ids: those of stage.lora.tokens.
    """
    targets = _targets(architecture, model)
    # A fused weight of theirs gets the sum of the ranks of ours, and alpha grows so that the scale stays.
    fused = {target.module.rpartition(".")[2]: len(target.adapters) for target in targets if len(target.adapters) > 1}
    rank, alpha = model.lora.rank, model.lora.alpha
    task, whole_modules = TASKS[model.head]
    growth_of_alpha = 0.5 if model.lora.rslora else 1.0
    token_modules = [module.rpartition(".")[2] for module in _token_modules(architecture, model).values()]

    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: rank * count for name, count in fused.items()},
        "alpha_pattern": {name: alpha * count**growth_of_alpha for name, count in fused.items()},
        "use_rslora": model.lora.rslora,
        "target_modules": sorted({target.module.rpartition(".")[2] for target in targets}),
        "modules_to_save": whole_modules,
        "trainable_token_indices": {module: list(token_ids) for module in token_modules} or None,
        "lora_dropout": model.lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _token_modules(architecture: Architecture, model: AdaptedModelConfig) -> dict[str, str]:
    """Returns the modules of transformers whose rows are trained, by our parameter: the embedding, and a head that is
    not tied to it; empty without stage.lora.tokens."""
    if not model.lora.tokens:
        return {}
    conversions = converted(architecture, parameter_shapes(model.plain))
    # peft looks for modules, whose names are those of the installed transformers, not those of files.
    newer_names = {name: newer for newer, name in ALIASES.items()}
    return {
        conversion.ours[0]: newer_names.get(conversion.name, conversion.name).removesuffix(".weight")
        for conversion in conversions
        if conversion.ours[0] in TOKEN_WEIGHTS
    }


def _rows(name: str, read: Read, token_ids: Sequence[int]) -> torch.Tensor:
    return read(name)[list(token_ids)]


def _targets(architecture: Architecture, model: AdaptedModelConfig) -> list[_Target]:
    """Returns the weights of transformers that have adapters, each with our adapters in it."""
    shapes = parameter_shapes(model)
    targets = []
    for conversion in converted(architecture, parameter_shapes(model.plain)):
        prefixes = ((index, adapter_of(name)) for index, name in enumerate(conversion.ours))
        adapters = tuple((index, prefix) for index, prefix in prefixes if f"{prefix}a" in shapes)
        if adapters:
            targets.append(_Target(conversion, adapters))
    return targets


def _lora_a(target: _Target, read: Read) -> torch.Tensor:
    return torch.cat([read(f"{prefix}a").flatten(1) for _, prefix in target.adapters])


def _lora_b(target: _Target, rank: int, read: Read) -> torch.Tensor:
    """Returns peft's lora_B (out, rank times the number of our weights in it); blocks of other weights are 0."""
    factors = [read(f"{prefix}b") for _, prefix in target.adapters]
    if len(target.theirs.ours) == 1:
        return factors[0].flatten(1).t()

    # The adapters of one fused weight of theirs stand in blocks of one wider factor.
    columns = [slice(number * rank, (number + 1) * rank) for number in range(len(factors))]
    if not target.theirs.interleaved:
        fused_OR = torch.zeros(target.theirs.shape[0], rank * len(factors))
        for (index, _), factor, column in zip(target.adapters, factors, columns, strict=True):
            fused_OR[target.theirs.rows(index), column] = factor.flatten(1).t()
        return fused_OR

    heads, width = target.theirs.shapes[0][:2]
    fused_HNKR = torch.zeros(heads, len(target.theirs.ours), width, rank * len(factors))  # N weights: see `Converted`
    for (index, _), b_RHK, column in zip(target.adapters, factors, columns, strict=True):
        fused_HNKR[:, index, :, column] = b_RHK.permute(1, 2, 0)
    return fused_HNKR.flatten(0, 2)
