"""Reads a folder of adapters that peft saved: its base, the scale of each adapter, and weights that it replaces whole.

peft adds `scale * lora_B lora_A` to a weight (out, in) of transformers. The scale is alpha / r, or alpha / sqrt(r) with
rsLoRA (Kalajdzievski 2023, arXiv 2312.03732), and may differ from weight to weight. Modules of `modules_to_save`, and
embeddings of new tokens, lie whole beside the adapters.

Nothing here reads weights: `described_adapters` gets the configuration and the names of the tensors, and runs in the
process with limits.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, shown_value
from dist_lm.interop.foreign_files import json_object
from dist_lm.interop.snapshot_files import content_in, file_in, parsed, tensor_entries

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # begins the names in the file of weights
FACTORS = {".lora_A.weight": "a", ".lora_B.weight": "b"}  # ends of the names of a weight's factors
EMBEDDINGS, SCORE = ("model.embed_tokens.weight", "gpt_neox.embed_in.weight"), "score.weight"  # names in transformers
# Keys that change what peft computes, in ways that our adapters lack.
REFUSED = {
    "use_dora": "false: our adapters have no magnitudes (DoRA); merge it by peft (merge_and_unload), and import that",
    **dict.fromkeys(("lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora"), "false"),
    **dict.fromkeys(("layer_replication", "target_parameters", "trainable_token_indices"), "null"),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"), "null"),
}
INITIAL_VALUES = (True, False, "gaussian", "eva", "orthogonal")  # others change the base as well, as PiSSA does


@dataclass(frozen=True)
class AdapterFolder:
    """Content of the files of a folder of adapters."""

    base: str  # folder or hub id, with `@revision` if one is named
    scales: dict[str, float]  # weight of transformers with an adapter -> factor of the product
    ranks: dict[str, int]  # weight of transformers with an adapter -> rows of its factor A
    whole_weights: dict[str, tuple[int, ...]]  # weight of transformers that is replaced -> its shape


def holds_adapters(folder: Path) -> bool:
    """Returns whether a folder holds adapters of peft, which need a base."""
    return (folder / CONFIG).exists()


def adapters_in(folder: Path) -> AdapterFolder:
    """Returns what the folder says; reads the header of its weights alone.

    Raises:
        ArtefactError: a file is missing, damaged, or a link that leaves the folder, or an option is one that our
            adapters lack; names the key or the tensor.
        UserError: as `parsed`.
    """
    config, weights = content_in(folder, CONFIG), file_in(folder, WEIGHTS)
    if weights is None:
        raise ArtefactError(f"{folder}: {WEIGHTS} is missing: adapters are read from a safetensors file only")
    shapes = {name: shape for name, _, shape, _ in tensor_entries(weights)}
    base, scales, ranks, whole_weights = parsed(str(folder / CONFIG), described_adapters, config, shapes, str(folder))
    return AdapterFolder(base, scales, ranks, {name: tuple(shape) for name, shape in whole_weights.items()})


def with_whole_weights(model: ModelConfig, adapters: AdapterFolder) -> ModelConfig:
    """Returns the model of a base with what the adapters hold whole: more rows of an embedding, or a scalar head."""
    for name in EMBEDDINGS:
        if name in adapters.whole_weights:
            model = replace(model, vocab_size=adapters.whole_weights[name][0])
    if SCORE in adapters.whole_weights:
        model = replace(model, head="scalar")
    return model


def described_adapters(
    content: bytes, shapes: Mapping[str, Sequence[int]], folder: str
) -> tuple[str, dict[str, float], dict[str, int], dict[str, Sequence[int]]]:
    """Returns the fields of `AdapterFolder`: the base (empty if none is named), the scale and the rank by weight, and
    the shapes of the whole weights.

    Args:
        content: that of adapter_config.json.
        shapes: of the tensors in adapter_model.safetensors, by name.
        folder: path, for messages.

    Raises:
        ArtefactError: see `adapters_in`.
    """
    where = f"{folder}/{CONFIG}"
    config = json_object(content, where)
    _check(config, where)

    factors: dict[str, dict[str, Sequence[int]]] = {}  # their weight -> factor -> shape
    whole_weights: dict[str, Sequence[int]] = {}
    for name, shape in shapes.items():
        module = name.removeprefix(PREFIX)
        ending = next((ending for ending in FACTORS if module.endswith(ending)), None)
        if module == name:
            _refuse(f"{folder}/{WEIGHTS}", shown_value(name), shape, f"a name that begins with {PREFIX}")
        elif ending:
            factors.setdefault(f"{module.removesuffix(ending)}.weight", {})[FACTORS[ending]] = shape
        # Factors of other kinds, such as one of an embedding, would else count as whole weights.
        elif "lora_" in module:
            _refuse(f"{folder}/{WEIGHTS}", shown_value(name), shape, "the factors lora_A and lora_B of linear layers")
        else:
            whole_weights[module] = shape

    ranks: dict[str, int] = {}
    for weight, of_weight in factors.items():
        a, b = of_weight.get("a", ()), of_weight.get("b", ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1:
            _refuse(f"{folder}/{WEIGHTS}", weight, (a, b), "factors (r, in) and (out, r)")
        ranks[weight] = a[0]
    if not factors:
        raise ArtefactError(f"{folder}/{WEIGHTS}: it holds no adapter: expected tensors lora_A and lora_B")

    base = str(config.get("base_model_name_or_path") or "")
    if config.get("revision"):
        base += f"@{config['revision']}"
    return base, {weight: _scale(config, weight, rank) for weight, rank in ranks.items()}, ranks, whole_weights


def _check(config: Mapping[str, Any], where: str) -> None:
    """Refuses other kinds of adapters than LoRA, and options of it that our adapters lack.

    Raises:
        ArtefactError: names the key.
    """
    if config.get("peft_type") != "LORA":
        _refuse(where, "peft_type", config.get("peft_type"), "LORA")
    for key, accepted in REFUSED.items():
        if config.get(key):
            _refuse(where, key, config[key], accepted)
    if config.get("bias", "none") != "none":
        _refuse(where, "bias", config["bias"], "none: our adapters leave biases as they are")
    initial = config.get("init_lora_weights", True)
    if initial not in INITIAL_VALUES:
        accepted = f"one of {', '.join(map(str, INITIAL_VALUES))}: others change the base too; merge it by peft"
        _refuse(where, "init_lora_weights", initial, accepted)

    alphas = {"lora_alpha": config.get("lora_alpha"), **(config.get("alpha_pattern") or {})}
    for key, alpha in alphas.items():
        if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            _refuse(where, key, alpha, "a positive number")


def _scale(config: Mapping[str, Any], weight: str, rank: int) -> float:
    """Returns the factor of B A: of `alpha_pattern`, as peft finds it, else of `lora_alpha`."""
    module = weight.removesuffix(".weight")
    alpha = config["lora_alpha"]
    for pattern, alpha_of_pattern in (config.get("alpha_pattern") or {}).items():
        # A pattern may search for ever; the limits of this process end that.
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = alpha_of_pattern
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _refuse(where: str, key: str, value: Any, accepted: str) -> NoReturn:
    raise ArtefactError(f"{where}: {key}={shown_value(value)}: expected {accepted}")
