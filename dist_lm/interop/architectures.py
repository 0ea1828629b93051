"""Finds the transformers architecture that can hold a model, and translates `config.json` in both directions.

    model.norm  model.ffn  model.bias  model.qkv_bias  model.qk_norm  architecture
    layernorm   gelu       true        any             false          GPTNeoX; Starcoder2 with grouped-query attention
    rmsnorm     gelu       any         as model.bias   false          Arcee, with hidden_act=gelu
    rmsnorm     relu2      any         as model.bias   false          Arcee
    rmsnorm     swiglu     any         as model.bias   false          Llama, with attention_bias and mlp_bias
    rmsnorm     swiglu     false       true            false          Qwen2
    rmsnorm     swiglu     false       false           true           Qwen3

No other combination has an architecture. `model.n_kv_heads`, `model.tie_embeddings`, `model.rope_scaling` and the sizes
are free. `model.head_width` is free in Llama, Arcee and Qwen3, `model.parallel_residual` and `model.rotary_fraction` in
GPTNeoX.

`model.head` chooses the class: ForCausalLM, or ForSequenceClassification, whose score has no bias. Such a score differs
from the model's by a constant, so comparisons of scores stay the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, ConfigError, shown_value

HEADS = {"tokens": "ForCausalLM", "scalar": "ForSequenceClassification"}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers and the fields of its config that the options of a model decide."""

    family: str  # key of FAMILIES, such as Llama
    head: str  # value of HEADS
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the class, such as LlamaForCausalLM."""
        return self.family + self.head


def architecture_of(model: ModelConfig) -> Architecture | str:
    """Returns the architecture that holds `model`; if there is none, the reason as a text, which begins with the
    option.

    Nothing is raised or written. The number of ranks and the dtype do not matter.
    """
    head = HEADS[model.head]
    if model.value_residual:
        return "model.value_residual=True: of these architectures of transformers none mixes values of layers"
    if model.logit_cap:
        return f"model.logit_cap={model.logit_cap}: of these architectures of transformers none caps its logits"

    # GPT-NeoX has LayerNorm, and alone has parallel residuals and partial rotation.
    in_neox = "of the architectures of transformers, GPT-NeoX alone has it"
    if model.norm == "layernorm":
        if model.ffn != "gelu":
            return f"model.ffn={model.ffn}: with model.norm=layernorm, transformers has gelu only"
        if not model.bias:
            return "model.bias=False: with model.norm=layernorm, transformers always has biases"
        if model.qk_norm:
            return "model.qk_norm=True: with model.norm=layernorm, transformers does not normalise queries and keys"
        if model.head_width not in (None, model.d_model // model.n_heads):
            return f"model.head_width={model.head_width}: with model.norm=layernorm, transformers has d_model / n_heads"
        if model.kv_heads == model.n_heads:
            fields = {"attention_bias": True, "use_parallel_residual": model.parallel_residual}
            return Architecture("GPTNeoX", head, {"hidden_act": "gelu", **fields})
        in_neox += f", and model.n_kv_heads={model.n_kv_heads} needs StarCoder2"

    if model.parallel_residual:
        return f"model.parallel_residual=True: {in_neox}"
    if model.rotary_fraction != 1:
        return f"model.rotary_fraction={model.rotary_fraction}: {in_neox}"
    if model.norm == "layernorm":
        return Architecture("Starcoder2", head, {"hidden_act": "gelu", "use_bias": True})

    # The others have RMSNorm. Arcee has a feed-forward network without a gate.
    if model.d_model % model.n_heads and not model.qk_norm:
        return f"model.n_heads={model.n_heads}: without model.qk_norm, transformers needs a divisor of model.d_model"
    biases = {"attention_bias": model.bias, "mlp_bias": model.bias}
    qkv_alone = model.has_qkv_bias and not model.bias
    if model.ffn != "swiglu":
        if model.qk_norm:
            return f"model.qk_norm=True: with model.ffn={model.ffn}, transformers does not normalise queries and keys"
        if qkv_alone:
            return f"model.qkv_bias=True: with model.ffn={model.ffn}, transformers has biases everywhere or nowhere"
        return Architecture("Arcee", head, {"hidden_act": model.ffn, **biases})

    # Qwen3 has norms of queries and keys, Llama all biases or none, Qwen2 those of queries, keys and values.
    if model.qk_norm:
        if model.bias:
            return "model.bias=True: with model.qk_norm=true, transformers has no biases in the feed-forward network"
        if qkv_alone:
            return "model.qkv_bias=True: with model.qk_norm=true, transformers has no biases for these alone"
        return Architecture("Qwen3", head, {"attention_bias": False})

    if not qkv_alone:
        return Architecture("Llama", head, biases)
    if model.head_width not in (None, model.d_model // model.n_heads):
        return f"model.head_width={model.head_width}: with model.qkv_bias=true, Qwen2 has d_model / n_heads"
    return Architecture("Qwen2", head, {})


# config.json


@dataclass(frozen=True)
class Family:
    """Describes how a family of transformers writes a model in config.json.

    Docs: https://huggingface.co/docs/transformers/model_doc/llama (and qwen3, gpt_neox, starcoder2, arcee).
    """

    model_type: str
    options: dict[str, Any]  # keys of our model that the family decides
    norm_eps: str  # their key for model.norm_eps
    fixed: dict[str, Any]  # keys with the only value that our model has
    defaults: dict[str, Any]  # values that transformers takes for missing keys of config.json, where not None
    biases: tuple[str, ...] = ()  # their keys for model.bias, which must agree
    further_options: dict[str, str] = field(default_factory=dict)  # options of our model -> their keys
    older_rope_names: dict[str, str] = field(default_factory=dict)  # keys of rotary positions: newer -> older
    any_head_width: bool = True  # False: hidden_size / num_attention_heads


_PLAIN = {"initializer_range": 0.02, "tie_word_embeddings": False}
_BIASES = ("attention_bias", "mlp_bias")
_NO_WINDOW = {"use_sliding_window": False}

# Llama shares these with the families that differ little from it.
_RMS_SWIGLU = {"norm": "rmsnorm", "ffn": "swiglu"}
_SILU = {"hidden_act": "silu"}
_LLAMA_DEFAULTS = _PLAIN | _SILU | {"rms_norm_eps": 1e-6} | dict.fromkeys(_BIASES, False)

FAMILIES = {
    "Llama": Family(
        "llama",
        _RMS_SWIGLU,
        "rms_norm_eps",
        _SILU,
        {**_LLAMA_DEFAULTS, "max_position_embeddings": 2048},
        biases=_BIASES,
    ),
    "Qwen2": Family(
        "qwen2",
        {**_RMS_SWIGLU, "bias": False, "qkv_bias": True},
        "rms_norm_eps",
        {**_SILU, **_NO_WINDOW},
        {**_LLAMA_DEFAULTS, **_NO_WINDOW, "max_position_embeddings": 32768, "num_key_value_heads": 32},
        any_head_width=False,
    ),
    "Qwen3": Family(
        "qwen3",
        {**_RMS_SWIGLU, "bias": False, "qk_norm": True},
        "rms_norm_eps",
        {**_SILU, **_NO_WINDOW, "attention_bias": False},
        {
            **_LLAMA_DEFAULTS,
            **_NO_WINDOW,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
    ),
    "Arcee": Family(
        "arcee",
        {"norm": "rmsnorm"},
        "rms_norm_eps",
        {},
        _PLAIN
        | {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
        | dict.fromkeys(_BIASES, False),
        biases=_BIASES,
        further_options={"ffn": "hidden_act"},
    ),
    "Starcoder2": Family(
        "starcoder2",
        {"norm": "layernorm", "ffn": "gelu", "bias": True},
        "norm_epsilon",
        {"hidden_act": "gelu", "use_bias": True, "sliding_window": None},
        {
            "hidden_act": "gelu_pytorch_tanh",
            "use_bias": True,
            "norm_epsilon": 1e-5,
            "max_position_embeddings": 4096,
            "initializer_range": 0.018042,
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
        },
        any_head_width=False,
    ),
    "GPTNeoX": Family(
        "gpt_neox",
        {"norm": "layernorm", "ffn": "gelu", "bias": True},
        "layer_norm_eps",
        {"hidden_act": "gelu", "attention_bias": True},
        {
            **_PLAIN,
            "hidden_act": "gelu",
            "use_parallel_residual": True,
            "attention_bias": True,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.25,
        },
        further_options={"parallel_residual": "use_parallel_residual"},
        older_rope_names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        any_head_width=False,
    ),
}
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
"""Keys of `model` -> their names in config.json."""
_FACTORS = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
}
_ORIGINAL = "original_max_position_embeddings"
SCALINGS = {
    "none": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {**_FACTORS, "rope_original_len": _ORIGINAL},
}
"""model.rope_scaling -> (keys of `model` -> their names in config.json) of the numbers that it has."""
LARGEST = {
    "vocab_size": 2**31,
    "hidden_size": 2**20,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "intermediate_size": 2**24,
    "max_position_embeddings": 2**31,
}
"""Sizes in config.json -> the largest one that is believed: far above every model, and small enough to count to."""
_FLAGS = (*_BIASES, "tie_word_embeddings", "use_bias", "use_parallel_residual", "use_sliding_window")
_NUMBERS = ("initializer_range", "rms_norm_eps", "norm_epsilon", "layer_norm_eps")
_ROPE_NUMBERS = ("rope_theta", "rotary_emb_base", "partial_rotary_factor", "rotary_pct", _ORIGINAL)
NEVER = ("quantization_config", "auto_map")  # keys that change how weights are read, or name code


def hf_config(model: ModelConfig, architecture: Architecture, dtype: str) -> dict[str, Any]:
    """Returns the content of config.json without token ids, ready for JSON. Nothing is checked.

    `vocab_size` is that of the model, without padding.

    Args:
        architecture: `architecture_of(model)`.
        dtype: type of the weights, such as bfloat16.
    """
    family = FAMILIES[architecture.family]
    config: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": family.model_type,
        **{theirs: getattr(model, ours) for ours, theirs in SIZES.items()},
        family.norm_eps: model.norm_eps,
        family.older_rope_names.get("rope_theta", "rope_theta"): model.rope_base,
        **family.fixed,
        **architecture.fields,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
    }

    # Only GPT-NeoX has rotary keys of its own, and neither grouped heads nor a free head width.
    if family.older_rope_names:
        config |= {"rotary_pct": model.rotary_fraction, "hidden_dropout": 0.0}
    else:
        config |= {"num_key_value_heads": model.kv_heads, "head_dim": model.d_head}

    if names := SCALINGS[model.rope_scaling]:
        numbers = {theirs: getattr(model, ours) for ours, theirs in names.items()}
        config["rope_scaling"] = {"rope_type": model.rope_scaling, **numbers}
    if model.head == "scalar":
        config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    return config


def model_of(config: Mapping[str, Any], name: str, where: str) -> tuple[ModelConfig, Architecture]:
    """Returns the model that a config.json describes, and the architecture whose tensor names its weights have.

    It is the inverse of `hf_config`.

    Args:
        config: the content of config.json; missing keys, and those with null, have the defaults of transformers.
        name: name of the model.
        where: path of the file, for messages.

    Raises:
        ArtefactError: names a key of config.json whose value our model lacks, or that is missing; or an option of ours
            that is out of bounds, or whose combination no architecture has.
    """
    family_names = {family.model_type: family_name for family_name, family in FAMILIES.items()}
    family_name = family_names.get(str(config.get("model_type")))
    if family_name is None:
        _refuse(where, "model_type", config.get("model_type"), f"one of {', '.join(sorted(family_names))}")
    family = FAMILIES[family_name]
    settings = {**family.defaults, **{key: setting for key, setting in config.items() if setting is not None}}

    _check_types(settings, where)

    # The class says what the head computes; a file without one could be of either kind.
    heads = {family_name + theirs: ours for ours, theirs in HEADS.items()}
    classes = settings.get("architectures") or [None]
    head = heads.get(str(classes[0]))
    if head is None:
        _refuse(where, "architectures", classes[0], f"one of {', '.join(heads)}")

    # Refuse what would change the computation and our model has no option for.
    for key in NEVER:
        if settings.get(key):
            _refuse(where, key, settings[key], "no such key: weights as they are, without code of their own")
    for key, accepted in family.fixed.items():
        if settings.get(key) != accepted:
            _refuse(where, key, settings.get(key), str(accepted))
    for layer_type in settings.get("layer_types", ()):
        if layer_type != "full_attention":
            _refuse(where, "layer_types", layer_type, "full_attention")
    for key in family.biases:
        if settings[key] != settings[family.biases[0]]:
            _refuse(where, key, settings[key], f"{family.biases[0]}={settings[family.biases[0]]} too")
    for key in SIZES.values():
        if key not in settings:
            _refuse(where, key, None, "a value")

    # Not every family has a key for the width of a head.
    n_heads = settings["num_attention_heads"]
    default_width = settings["hidden_size"] / n_heads
    head_width = settings.get("head_dim", default_width)
    if head_width != default_width and not family.any_head_width:
        _refuse(where, "head_dim", head_width, f"{default_width:g}, which is hidden_size / num_attention_heads")
    kv_heads = settings.get("num_key_value_heads", n_heads)
    bias = {"bias": settings[family.biases[0]]} if family.biases else {}

    # None lets these sizes follow from the others, so that another number of heads can be set.
    if kv_heads == n_heads:
        kv_heads = None
    if head_width == default_width:
        head_width = None

    try:
        model = ModelConfig(
            name=name,
            **{ours: settings[theirs] for ours, theirs in {**SIZES, **family.further_options}.items()},
            **{**family.options, **bias},
            norm_eps=settings[family.norm_eps],
            **_rope(settings, family, where),
            n_kv_heads=kv_heads,
            head_width=head_width,
            head=head,
        )
    except ConfigError as error:
        raise ArtefactError(f"{where}: {error}") from error

    # The options may be those of another family that computes the same; the names of tensors are the file's.
    architecture = architecture_of(model)
    if isinstance(architecture, str):
        raise ArtefactError(f"{where}: {architecture}")
    return model, Architecture(family_name, architecture.head, architecture.fields)


def _rope(settings: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Returns our options of rotary positions, from the keys of older or newer versions of transformers.

    The options are `rope_scaling`, `rope_base`, `rotary_fraction` and the numbers of the scaling.

    Args:
        settings: config.json with its defaults filled in.
        where: the file, with which messages begin.

    Raises:
        ArtefactError: an unknown scaling, a number of it that is missing, or a rotary fraction that the family lacks.
    """
    # Version 5 of transformers nests all keys of rotary positions, version 4 only those of the scaling.
    name = "rope_parameters" if settings.get("rope_parameters") else "rope_scaling"
    nested: Mapping[str, Any] = settings.get(name) or {}
    if not isinstance(nested, dict):
        _refuse(where, name, nested, "an object with rope_type")
    nested = {key: setting for key, setting in nested.items() if setting is not None}
    _check_numbers(nested, (*_ROPE_NUMBERS, *_FACTORS.values()), where, f"{name}.")
    rope_type = nested.get("rope_type", nested.get("type", "default"))
    scaling = "none" if rope_type == "default" else rope_type
    if not isinstance(scaling, str) or scaling not in SCALINGS or rope_type == "none":
        _refuse(where, f"{name}.rope_type", rope_type, "default, linear or llama3")

    options: dict[str, Any] = {"rope_scaling": scaling}
    for ours, key, default in (("rope_base", "rope_theta", 10000.0), ("rotary_fraction", "partial_rotary_factor", 1.0)):
        older = family.older_rope_names.get(key, key)
        options[ours] = float(nested.get(key, settings.get(older, settings.get(key, default))))
    if options["rotary_fraction"] != 1 and not family.older_rope_names:
        _refuse(where, "partial_rotary_factor", options["rotary_fraction"], "1: all of a head is rotated")

    # Without a key of its own, the original length is the present one.
    numbers = {_ORIGINAL: settings["max_position_embeddings"], **nested}
    if _ORIGINAL in settings:
        numbers[_ORIGINAL] = settings[_ORIGINAL]  # has precedence in transformers
    for ours, theirs in SCALINGS[scaling].items():
        if not isinstance(numbers.get(theirs), int | float):
            _refuse(where, f"{name}.{theirs}", numbers.get(theirs), "a number")
        options[ours] = numbers[theirs]
    return options


def _check_types(settings: Mapping[str, Any], where: str) -> None:
    """Refuses values of keys that `model_of` reads if they have another type than transformers gives them, or are sizes
    of no model.

    Raises:
        ArtefactError: names the key.
    """
    for key, largest in LARGEST.items():
        size = settings.get(key, 1)
        if type(size) is not int or not 1 <= size <= largest:
            _refuse(where, key, size, f"an integer from 1 to {largest}")
    for key in _FLAGS:
        if key in settings and type(settings[key]) is not bool:
            _refuse(where, key, settings[key], "true or false")
    _check_numbers(settings, (*_NUMBERS, *_ROPE_NUMBERS), where)
    for key in ("architectures", "layer_types"):
        if not isinstance(settings.get(key, []), list):
            _refuse(where, key, settings[key], "a list of names")
    if not isinstance(settings.get("hidden_act", ""), str):
        _refuse(where, "hidden_act", settings["hidden_act"], "a name")


def _check_numbers(settings: Mapping[str, Any], keys: Sequence[str], where: str, prefix: str = "") -> None:
    """Refuses values of keys that are there and no finite positive numbers of fp64.

    Raises:
        ArtefactError: names the key, with `prefix` before it.
    """
    for key in keys:
        number = settings.get(key, 1)
        is_number = type(number) in (int, float) and 0 < number <= 1e30
        if not is_number:
            _refuse(where, prefix + key, number, "a positive number")


def _refuse(where: str, key: str, setting: Any, accepted: str) -> NoReturn:
    """Raises ArtefactError for `key=setting` in the file `where`; the message says what would be accepted."""
    raise ArtefactError(f"{where}: {key}={shown_value(setting)}: expected {accepted}")
