"""Finds the transformers architecture that can hold a model, and translates `config.json` in both directions.

`FAMILIES` says which options each family has. A model is exported as the first family of the table that has all of its
options, or as that of `model.export_as`, which an import sets where its family is not the first: Phi-3 without a
sliding window computes what Llama does, with other names of tensors.

`model.head` chooses the class: ForCausalLM, or ForSequenceClassification, whose score has no bias. Such a score differs
from the model's by a constant, so comparisons of scores stay the same.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, ConfigError, shown_value

FULL, SLIDING = "full_attention", "sliding_attention"  # values of layer_types in config.json
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


@dataclass(frozen=True)
class Family:
    """Describes which options a family of transformers has, and how it writes them in config.json.

    Docs: https://huggingface.co/docs/transformers/model_doc/llama (and qwen3, gpt_neox, starcoder2, arcee ...).
    """

    model_type: str
    norm: str  # value of model.norm
    activations: Mapping[str, str]  # their names -> values of model.ffn; of several names of one value the first
    norm_eps: str  # their key for model.norm_eps
    defaults: dict[str, Any]  # values that transformers takes for missing keys of config.json, where not None
    # Biases of all projections of attention, and of the feed-forward network: their key, or the only value.
    attention_bias: str | bool = False
    ffn_bias: str | bool = False
    qkv_bias: bool = False  # queries, keys and values alone have biases
    qk_norm: str | None = None  # value of model.qk_norm_span; None: no norm
    norm_place: str = "before"
    any_head_width: bool = False  # False: hidden_size / num_attention_heads
    heads_divide: bool = False  # num_attention_heads must divide hidden_size, whatever the width of a head
    grouped: bool = True  # may have fewer heads of keys and values
    partial_rotation: bool = False
    parallel_residual: str | None = None  # their key for model.parallel_residual
    windows: str = ""  # layers with a sliding window: all | layers (any of them); empty: none
    window_switch: bool = False  # use_sliding_window says whether there is a window
    first_windowed: str | None = None  # their key for the first layer with a window
    older_rope_names: dict[str, str] = field(default_factory=dict)  # keys of rotary positions: newer -> older
    scalings: tuple[str, ...] = ("none", "linear", "llama3", "yarn")  # values of model.rope_scaling
    has_scales: bool = False  # the factors of `SCALES`
    heads: tuple[str, ...] = ("tokens", "scalar")  # values of model.head
    rope_free_layers: bool = False  # layers may have no RoPE
    rope_theta: float = 10000.0  # the default where config.json has none


SCALES = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention_scale": "attention_multiplier",
    "logit_divisor": "logits_scaling",
}
"""Keys of `model` -> their names in config.json."""
_BIASES = ("attention_bias", "mlp_bias")
_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}
_UNGATED = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu2": "relu2"}
_PLAIN = {"initializer_range": 0.02, "tie_word_embeddings": False}
_GATED_DEFAULTS = _PLAIN | {"hidden_act": "silu", "rms_norm_eps": 1e-6}
_NO_BIASES = dict.fromkeys(_BIASES, False)

FAMILIES = {
    "GPTNeoX": Family(
        "gpt_neox",
        "layernorm",
        _UNGATED,
        "layer_norm_eps",
        {
            **_PLAIN,
            "hidden_act": "gelu",
            "use_parallel_residual": True,
            "attention_bias": True,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.25,
        },
        attention_bias="attention_bias",
        ffn_bias=True,
        grouped=False,
        partial_rotation=True,
        parallel_residual="use_parallel_residual",
        older_rope_names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    ),
    "Starcoder2": Family(
        "starcoder2",
        "layernorm",
        _UNGATED,
        "norm_epsilon",
        {
            "hidden_act": "gelu_pytorch_tanh",
            "use_bias": True,
            "norm_epsilon": 1e-5,
            "max_position_embeddings": 4096,
            "initializer_range": 0.018042,
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
        },
        attention_bias="use_bias",
        ffn_bias="use_bias",
        windows="all",
    ),
    "Arcee": Family(
        "arcee",
        "rmsnorm",
        _UNGATED,
        "rms_norm_eps",
        _PLAIN | {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096} | _NO_BIASES,
        attention_bias="attention_bias",
        ffn_bias="mlp_bias",
        any_head_width=True,
        heads_divide=True,
    ),
    "Llama": Family(
        "llama",
        "rmsnorm",
        _GATED,
        "rms_norm_eps",
        _GATED_DEFAULTS | _NO_BIASES | {"max_position_embeddings": 2048},
        attention_bias="attention_bias",
        ffn_bias="mlp_bias",
        any_head_width=True,
        heads_divide=True,
    ),
    "Qwen2": Family(
        "qwen2",
        "rmsnorm",
        _GATED,
        "rms_norm_eps",
        _GATED_DEFAULTS | {**_QWEN_WINDOWS, "max_position_embeddings": 32768, "num_key_value_heads": 32},
        qkv_bias=True,
        windows="layers",
        window_switch=True,
        first_windowed="max_window_layers",
    ),
    "Qwen3": Family(
        "qwen3",
        "rmsnorm",
        _GATED,
        "rms_norm_eps",
        {
            **_GATED_DEFAULTS,
            **_QWEN_WINDOWS,
            "attention_bias": False,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
        attention_bias="attention_bias",
        qk_norm="head",
        any_head_width=True,
        windows="layers",
        window_switch=True,
        first_windowed="max_window_layers",
    ),
    "Mistral": Family(
        "mistral",
        "rmsnorm",
        _GATED,
        "rms_norm_eps",
        _GATED_DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        any_head_width=True,
        windows="all",
    ),
    "Ministral": Family(
        "ministral",
        "rmsnorm",
        _GATED,
        "rms_norm_eps",
        _GATED_DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        any_head_width=True,
        windows="layers",
    ),
    "SmolLM3": Family(
        "smollm3",
        "rmsnorm",
        _GATED,
        "rms_norm_eps",
        {
            **_GATED_DEFAULTS,
            **_NO_BIASES,
            "use_sliding_window": False,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        attention_bias="attention_bias",
        ffn_bias="mlp_bias",
        windows="layers",
        window_switch=True,
        rope_free_layers=True,
        rope_theta=2000000.0,
    ),
    "Granite": Family(
        "granite",
        "rmsnorm",
        _GATED,
        "rms_norm_eps",
        _GATED_DEFAULTS | {**_NO_BIASES, **dict.fromkeys(SCALES.values(), 1.0), "max_position_embeddings": 2048},
        attention_bias="attention_bias",
        ffn_bias="mlp_bias",
        has_scales=True,
        heads=("tokens",),
    ),
    "Olmo2": Family(
        "olmo2",
        "rmsnorm",
        _GATED,
        "rms_norm_eps",
        _GATED_DEFAULTS | {"attention_bias": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
        attention_bias="attention_bias",
        qk_norm="all",
        norm_place="after",
    ),
    "Phi3": Family(
        "phi3",
        "rmsnorm",
        _GATED,
        "rms_norm_eps",
        _GATED_DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        partial_rotation=True,
        windows="all",
        scalings=("none",),
    ),
}
"""Families by the names of their classes, in the order in which an export chooses among them."""


def architecture_of(model: ModelConfig) -> Architecture | str:
    """Returns the architecture that holds `model`; if there is none, the reason as a text, which begins with the
    option and ends with the value that the nearest family has.

    Nothing is raised or written. The number of ranks and the dtype do not matter.
    """
    families = FAMILIES
    if model.export_as is not None:
        families = {name: family for name, family in FAMILIES.items() if family.model_type == model.export_as}

    misfits = {name: [*_misfits(model, family)] for name, family in families.items()}
    nearest = min(misfits, key=lambda name: len(misfits[name]))  # the first of several
    if misfits[nearest]:
        key, accepted = misfits[nearest][0]
        return f"model.{key}={getattr(model, key)}: {nearest} of transformers, which is nearest, has {accepted}"
    return Architecture(nearest, HEADS[model.head], _fields(model, FAMILIES[nearest]))


def _misfits(model: ModelConfig, family: Family) -> Iterator[tuple[str, Any]]:
    """Yields (option, accepted) for each option of `model` whose value `family` lacks.

    `accepted` is a value that the family has or, for `n_heads`, words for its values: it is meant for a message.
    """
    if model.value_residual:
        yield "value_residual", False
    if model.logit_cap:
        yield "logit_cap", 0.0
    if model.norm != family.norm:
        yield "norm", family.norm
    if model.ffn not in family.activations.values():
        yield "ffn", next(iter(family.activations.values()))
    yield from _misfit_biases(model, family)

    if model.norm_place != family.norm_place:
        yield "norm_place", family.norm_place
    if model.qk_norm != (family.qk_norm is not None):
        yield "qk_norm", family.qk_norm is not None
    elif model.qk_norm and model.qk_norm_span != family.qk_norm:
        yield "qk_norm_span", family.qk_norm
    if not family.any_head_width and model.head_width not in (None, model.d_model / model.n_heads):
        yield "head_width", None
    if family.heads_divide and model.d_model % model.n_heads:
        yield "n_heads", f"a divisor of model.d_model={model.d_model}"
    if not family.grouped and model.kv_heads != model.n_heads:
        yield "n_kv_heads", None
    if model.parallel_residual and not family.parallel_residual:
        yield "parallel_residual", False
    if model.rotary_fraction != 1 and not family.partial_rotation:
        yield "rotary_fraction", 1.0
    if model.rope_scaling not in family.scalings:
        yield "rope_scaling", "none"
    if model.window is not None and not family.windows:
        yield "window", None
    if model.full_layers and family.windows != "layers":
        yield "full_layers", []
    if model.head not in family.heads:
        yield "head", "tokens"
    for key in SCALES:
        default = getattr(ModelConfig, key)
        if getattr(model, key) != default and not family.has_scales:
            yield key, default
    if model.rope_free_layers and not family.rope_free_layers:
        yield "rope_free_layers", []


def _misfit_biases(model: ModelConfig, family: Family) -> Iterator[tuple[str, bool]]:
    """Yields what `_misfits` does for the biases."""
    # LayerNorm has a bias in all families.
    if family.norm == "layernorm" and model.norm == "layernorm" and not model.bias:
        yield "bias", True
    if isinstance(family.attention_bias, bool) and model.has_output_bias != family.attention_bias:
        yield "attention_bias", family.attention_bias
    if model.qkv_bias and not (model.has_output_bias or family.qkv_bias):
        yield "qkv_bias", False
    if family.qkv_bias and not model.has_qkv_bias:
        yield "qkv_bias", True

    # Some families have one key for all linear layers.
    ffn_bias = family.ffn_bias
    if ffn_bias == family.attention_bias:
        ffn_bias = model.has_output_bias
    if isinstance(ffn_bias, bool) and model.has_ffn_bias != ffn_bias:
        yield "ffn_bias", ffn_bias


def _fields(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Returns the fields of config.json that the options of a model decide, for a family that has them."""
    fields: dict[str, Any] = {"hidden_act": next(key for key, ffn in family.activations.items() if ffn == model.ffn)}
    for key, is_used in ((family.attention_bias, model.has_output_bias), (family.ffn_bias, model.has_ffn_bias)):
        if isinstance(key, str):
            fields[key] = is_used
    if family.parallel_residual:
        fields[family.parallel_residual] = model.parallel_residual
    if family.rope_free_layers:
        fields["no_rope_layers"] = [int(layer not in model.rope_free_layers) for layer in range(model.n_layers)]
    if family.has_scales:
        fields |= {theirs: getattr(model, ours) for ours, theirs in SCALES.items()}
        # config.json has a number also where ours follows from the width of a head.
        fields[SCALES["attention_scale"]] = model.score_scale
    return fields | _window_fields(model, family)


def _window_fields(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Returns what `_fields` does for sliding windows."""
    if not family.windows:
        return {}
    if model.window is None:
        return {"use_sliding_window": False} if family.window_switch else {"sliding_window": None}

    fields: dict[str, Any] = {"sliding_window": model.window}
    is_windowed = [window is not None for window in model.windows]
    if family.windows == "layers":
        fields["layer_types"] = [SLIDING if windowed else FULL for windowed in is_windowed]
    if family.window_switch:
        fields["use_sliding_window"] = True
    if family.first_windowed:
        fields[family.first_windowed] = is_windowed.index(True)  # older versions of transformers read this key alone
    return fields


# config.json


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
    "yarn": {"rope_factor": "factor", "rope_original_len": _ORIGINAL},
}
"""model.rope_scaling -> (keys of `model` -> their names in config.json) of the numbers that it has."""
YARN = {"rope_beta_fast": "beta_fast", "rope_beta_slow": "beta_slow", "rope_truncate": "truncate"}
"""Further keys of `model` -> their names in config.json, which may lack them; the defaults are the same."""
_MSCALES = ("mscale", "mscale_all_dim")
LARGEST = {
    "vocab_size": 2**31,
    "hidden_size": 2**20,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "intermediate_size": 2**24,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
    "max_window_layers": 2**31,
    "no_rope_layer_interval": 2**31,
}
"""Sizes in config.json -> the largest one that is believed: far above every model, and small enough to count to."""
_FLAGS = (*_BIASES, "tie_word_embeddings", "use_bias", "use_parallel_residual", "use_sliding_window")
_NUMBERS = (*SCALES.values(), "initializer_range", "rms_norm_eps", "norm_epsilon", "layer_norm_eps")
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
        **architecture.fields,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
    }

    if family.grouped:
        config |= {"num_key_value_heads": model.kv_heads, "head_dim": model.d_head}
    else:  # GPT-NeoX
        config |= {"hidden_dropout": 0.0}
    if family.partial_rotation:
        key = family.older_rope_names.get("partial_rotary_factor", "partial_rotary_factor")
        config[key] = model.rotary_fraction

    if names := SCALINGS[model.rope_scaling]:
        numbers = {theirs: getattr(model, ours) for ours, theirs in names.items()}
        if model.rope_scaling == "yarn":
            numbers |= {theirs: getattr(model, ours) for ours, theirs in YARN.items()}
            numbers["attention_factor"] = model.attention_factor
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
    # Without a window, the key is null and not missing.
    if "sliding_window" in config:
        settings["sliding_window"] = config["sliding_window"]

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
    if settings["hidden_act"] not in family.activations:
        _refuse(where, "hidden_act", settings["hidden_act"], f"one of {', '.join(family.activations)}")
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

    # None lets these sizes follow from the others, so that another number of heads can be set.
    if kv_heads == n_heads:
        kv_heads = None
    if head_width == default_width:
        head_width = None

    rope_free_layers = _rope_free_layers(settings, family, where)
    options = {ours: settings[theirs] for ours, theirs in SIZES.items()}
    if family.has_scales:
        options |= {ours: settings[theirs] for ours, theirs in SCALES.items()}
        # None lets the usual scale follow from the width of a head.
        if options["attention_scale"] == (head_width or default_width) ** -0.5:
            options["attention_scale"] = None
    if family.parallel_residual:
        options["parallel_residual"] = settings[family.parallel_residual]
    try:
        model = ModelConfig(
            name=name,
            **options,
            norm=family.norm,
            ffn=family.activations[settings["hidden_act"]],
            **_biases(settings, family),
            qk_norm=family.qk_norm is not None,
            qk_norm_span=family.qk_norm or "head",
            norm_place=family.norm_place,
            norm_eps=settings[family.norm_eps],
            **_rope(settings, family, where),
            **_windows(settings, family, rope_free_layers, where),
            rope_free_layers=rope_free_layers,
            n_kv_heads=kv_heads,
            head_width=head_width,
            head=head,
        )
    except ConfigError as error:
        raise ArtefactError(f"{where}: {error}") from error

    # Another family may compute the same; the names of tensors are the file's, and those of an export too.
    architecture = architecture_of(model)
    if not isinstance(architecture, Architecture) or architecture.family != family_name:
        model = replace(model, export_as=family.model_type)
        architecture = architecture_of(model)
    if isinstance(architecture, str):
        raise ArtefactError(f"{where}: {architecture}")
    return model, architecture


def _biases(settings: Mapping[str, Any], family: Family) -> dict[str, bool | None]:
    """Returns our options of biases; those of parts are null where they are as `bias`.

    Args:
        settings: config.json with its defaults filled in.
    """
    attention, ffn = (
        settings[key] if isinstance(key, str) else key for key in (family.attention_bias, family.ffn_bias)
    )
    bias = family.norm == "layernorm" or ffn
    return {
        "bias": bias,
        "attention_bias": None if attention == bias else attention,
        "ffn_bias": None if ffn == bias else ffn,
        "qkv_bias": family.qkv_bias,
    }


def _rope_free_layers(settings: Mapping[str, Any], family: Family, where: str) -> list[int]:
    """Returns `model.rope_free_layers`. Arguments are those of `_windows`.

    Raises:
        ArtefactError: no_rope_layers is no list of 0 and 1 for each layer.
    """
    if not family.rope_free_layers:
        return []
    n_layers = settings["num_hidden_layers"]
    uses_rope = settings.get("no_rope_layers")
    if uses_rope is None:
        # Without a list, the last layer of each interval has no RoPE.
        return [*range(n_layers)][settings["no_rope_layer_interval"] - 1 :: settings["no_rope_layer_interval"]]
    if not isinstance(uses_rope, list) or len(uses_rope) != n_layers:
        _refuse(where, "no_rope_layers", uses_rope, f"a list of {n_layers} numbers, num_hidden_layers")
    for number in uses_rope:
        if type(number) is not int or number not in (0, 1):
            _refuse(where, "no_rope_layers", number, "0 or 1")
    return [layer for layer, number in enumerate(uses_rope) if not number]


def _windows(
    settings: Mapping[str, Any], family: Family, rope_free_layers: Sequence[int], where: str
) -> dict[str, Any]:
    """Returns our options of sliding windows.

    Args:
        settings: config.json with its defaults filled in.
        rope_free_layers: layers without RoPE, which have the window in SmolLM3.
        where: the file, with which messages begin.

    Raises:
        ArtefactError: layer_types has another number of layers, another kind, or one that the family lacks.
    """
    n_layers = settings["num_hidden_layers"]
    window = settings.get("sliding_window") if family.windows else None
    if family.window_switch and not settings["use_sliding_window"]:
        window = None
    layer_types = settings.get("layer_types")
    if layer_types is None:
        slides = [*range(n_layers)]
        if family.first_windowed:
            slides = slides[settings[family.first_windowed] :]
        elif family.rope_free_layers:
            slides = rope_free_layers
        layer_types = [SLIDING if window is not None and layer in slides else FULL for layer in range(n_layers)]

    # A family whose layers are alike has one kind.
    accepted = (FULL, SLIDING) if window is not None else (FULL,)
    if family.windows == "all":
        accepted = accepted[-1:]
    for layer_type in layer_types:
        if layer_type not in accepted:
            _refuse(where, "layer_types", layer_type, " or ".join(accepted))
    if len(layer_types) != n_layers:
        _refuse(where, "layer_types", layer_types, f"{n_layers} names, num_hidden_layers")

    full_layers = [layer for layer, layer_type in enumerate(layer_types) if layer_type == FULL]
    if window is None or len(full_layers) == n_layers:
        return {}
    return {"window": window, "full_layers": full_layers}


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
    keys = (*_ROPE_NUMBERS, *_FACTORS.values(), *_MSCALES, "beta_fast", "beta_slow", "attention_factor")
    _check_numbers(nested, keys, where, f"{name}.")
    rope_type = nested.get("rope_type", nested.get("type", "default"))
    scaling = "none" if rope_type == "default" else rope_type
    if not isinstance(scaling, str) or scaling not in family.scalings or rope_type == "none":
        _refuse(where, f"{name}.rope_type", rope_type, ", ".join(("default", *family.scalings[1:])))

    options: dict[str, Any] = {"rope_scaling": scaling}
    for ours, key, default in (
        ("rope_base", "rope_theta", family.rope_theta),
        ("rotary_fraction", "partial_rotary_factor", 1.0),
    ):
        older = family.older_rope_names.get(key, key)
        options[ours] = float(nested.get(key, settings.get(older, settings.get(key, default))))
    if options["rotary_fraction"] != 1 and not family.partial_rotation:
        _refuse(where, "partial_rotary_factor", options["rotary_fraction"], "1: all of a head is rotated")

    # Without a key of its own, the original length is the present one.
    numbers = {_ORIGINAL: settings["max_position_embeddings"], **nested}
    if _ORIGINAL in settings:
        numbers[_ORIGINAL] = settings[_ORIGINAL]  # has precedence in transformers
    for ours, theirs in SCALINGS[scaling].items():
        if not isinstance(numbers.get(theirs), int | float):
            _refuse(where, f"{name}.{theirs}", numbers.get(theirs), "a number")
        options[ours] = numbers[theirs]
    if scaling == "yarn":
        options |= _yarn(nested, where, name)
    return options


def _yarn(nested: Mapping[str, Any], where: str, name: str) -> dict[str, Any]:
    """Returns our options that `yarn` alone has.

    Args:
        nested: the content of `name` in the file `where`, with a factor.

    Raises:
        ArtefactError: truncate is neither true nor false.
    """
    options: dict[str, Any] = {ours: nested[theirs] for ours, theirs in YARN.items() if theirs in nested}
    if type(options.get("rope_truncate", True)) is not bool:
        _refuse(where, f"{name}.truncate", options["rope_truncate"], "true or false")

    # Without a factor of attention, one follows from the scaling, or from two weights of it (DeepSeek-V2).
    factor = nested.get("attention_factor")
    if factor is None and all(nested.get(key) for key in _MSCALES):
        growth = max(0.0, 0.1 * math.log(nested["factor"]))
        upper, lower = (nested[key] * growth + 1 for key in _MSCALES)
        factor = upper / lower
    if factor is not None and factor != 0.1 * math.log(nested["factor"]) + 1:
        options["rope_attention_factor"] = float(factor)
    return options


def _check_types(settings: Mapping[str, Any], where: str) -> None:
    """Refuses values of keys that `model_of` reads if they have another type than transformers gives them, or are sizes
    of no model.

    Raises:
        ArtefactError: names the key.
    """
    for key in LARGEST:
        smallest = 0 if key == "max_window_layers" else 1
        if key != "sliding_window" or settings.get(key) is not None:  # null: none
            _check_size(settings, key, smallest, where)
    for key in _FLAGS:
        if key in settings and type(settings[key]) is not bool:
            _refuse(where, key, settings[key], "true or false")
    _check_numbers(settings, (*_NUMBERS, *_ROPE_NUMBERS), where)
    for key in ("architectures", "layer_types"):
        if not isinstance(settings.get(key, []), list):
            _refuse(where, key, settings[key], "a list of names")
    if not isinstance(settings.get("hidden_act", ""), str):
        _refuse(where, "hidden_act", settings["hidden_act"], "a name")


def _check_size(settings: Mapping[str, Any], key: str, smallest: int, where: str) -> None:
    """Refuses a value that is there and no integer from `smallest` to that of LARGEST.

    Raises:
        ArtefactError: names the key.
    """
    size = settings.get(key, smallest)
    if type(size) is not int or not smallest <= size <= LARGEST[key]:
        _refuse(where, key, size, f"an integer from {smallest} to {LARGEST[key]}")


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
