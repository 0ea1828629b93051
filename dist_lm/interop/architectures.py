"""The transformers architecture that can hold a model, or the option for which there is none; and `config.json`.

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

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, ConfigError

HEADS = {"tokens": "ForCausalLM", "scalar": "ForSequenceClassification"}


@dataclass(frozen=True)
class Architecture:
    """A class of transformers and the fields of its config that the options of a model decide."""

    family: str  # such as Llama
    head: str  # a value of HEADS
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        """The class, such as LlamaForCausalLM."""
        return self.family + self.head


def architecture_of(model: ModelConfig) -> Architecture | str:
    """The architecture that holds `model`; if there is none, the reason, which names the option."""
    head = HEADS[model.head]
    if model.value_residual:
        return "model.value_residual=True: of these architectures of transformers none mixes values of layers"
    if model.logit_cap:
        return f"model.logit_cap={model.logit_cap}: of these architectures of transformers none caps its logits"
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
    """How a family of transformers describes a model in config.json.

    Docs: https://huggingface.co/docs/transformers/model_doc/llama (and qwen3, gpt_neox, starcoder2, arcee).
    """

    model_type: str
    options: dict[str, Any]  # keys of our model that the family decides
    norm_eps: str  # their key of model.norm_eps
    fixed: dict[str, Any]  # keys with the only value that our model has
    defaults: dict[str, Any]  # what transformers takes for a key that config.json lacks, where it is not None
    biases: tuple[str, ...] = ()  # keys that must agree: model.bias
    own: dict[str, str] = field(default_factory=dict)  # further options of our model by their keys
    own_rope: dict[str, str] = field(default_factory=dict)  # older keys of rotary positions by their newer names
    any_head_width: bool = True  # False: hidden_size / num_attention_heads


_PLAIN = {"initializer_range": 0.02, "tie_word_embeddings": False}
_BIASES = ("attention_bias", "mlp_bias")
_NO_WINDOW = {"use_sliding_window": False}


def _like_llama(model_type: str, options: dict, fixed: dict, defaults: dict, **more: Any) -> Family:
    """A family with RMSNorm. The arguments say what differs from Llama."""
    silu = {"hidden_act": "silu"}
    return Family(
        model_type,
        {"norm": "rmsnorm", "ffn": "swiglu"} | options,
        "rms_norm_eps",
        silu | fixed,
        _PLAIN | silu | {"rms_norm_eps": 1e-6} | dict.fromkeys(_BIASES, False) | defaults,
        **more,
    )


FAMILIES = {
    "Llama": _like_llama("llama", {}, {}, {"max_position_embeddings": 2048}, biases=_BIASES),
    "Qwen2": _like_llama(
        "qwen2",
        {"bias": False, "qkv_bias": True},
        _NO_WINDOW,
        {**_NO_WINDOW, "max_position_embeddings": 32768, "num_key_value_heads": 32},
        any_head_width=False,
    ),
    "Qwen3": _like_llama(
        "qwen3",
        {"bias": False, "qk_norm": True},
        {**_NO_WINDOW, "attention_bias": False},
        {**_NO_WINDOW, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
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
        own={"ffn": "hidden_act"},
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
        own={"parallel_residual": "use_parallel_residual"},
        own_rope={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
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
}  # keys of `model` by name, and what config.json calls them
_FACTORS = {f"rope_{key}": key for key in ("factor", "low_freq_factor", "high_freq_factor")}
_ORIGINAL = "original_max_position_embeddings"
SCALINGS = {
    "none": {},
    "linear": {"rope_factor": "factor"},
    "llama3": {**_FACTORS, "rope_original_len": _ORIGINAL},
}  # numbers of each model.rope_scaling: keys of `model`, and what config.json calls them
NEVER = ("quantization_config", "auto_map")  # keys that change how weights are read, or name code


def hf_config(model: ModelConfig, found: Architecture, dtype: str) -> dict[str, Any]:
    """config.json without token ids.

    Args:
        found: `architecture_of(model)`.
        dtype: of the weights, such as bfloat16.
    """
    family = FAMILIES[found.family]
    config: dict[str, Any] = {
        "architectures": [found.name],
        "model_type": family.model_type,
        **{theirs: getattr(model, ours) for ours, theirs in SIZES.items()},
        family.norm_eps: model.norm_eps,
        family.own_rope.get("rope_theta", "rope_theta"): model.rope_base,
        **family.fixed,
        **found.fields,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
    }
    if family.own_rope:
        config |= {"rotary_pct": model.rotary_fraction, "hidden_dropout": 0.0}
    else:
        config |= {"num_key_value_heads": model.kv_heads, "head_dim": model.d_head}
    if numbers := SCALINGS[model.rope_scaling]:
        values = {theirs: getattr(model, ours) for ours, theirs in numbers.items()}
        config["rope_scaling"] = {"rope_type": model.rope_scaling, **values}
    if model.head == "scalar":
        config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}, "problem_type": "regression"}
    return config


def model_of(config: Mapping[str, Any], name: str, place: str) -> tuple[ModelConfig, Architecture]:
    """The model that a config.json describes: the inverse of `hf_config`.

    Args:
        name: of the model.
        place: the file, for messages.

    Raises:
        ArtefactError: names a key of config.json whose value our model lacks.
    """
    families = {family.model_type: known for known, family in FAMILIES.items()}
    known = families.get(config.get("model_type", ""))
    if known is None:
        _refuse(place, "model_type", config.get("model_type"), f"one of {', '.join(sorted(families))}")
    family = FAMILIES[known]
    values = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    heads = {known + theirs: ours for ours, theirs in HEADS.items()}
    classes = values.get("architectures") or [None]
    head = heads.get(str(classes[0]))
    if head is None:
        _refuse(place, "architectures", classes[0], f"one of {', '.join(heads)}")
    for key in NEVER:
        if values.get(key):
            _refuse(place, key, values[key], "no such key: weights as they are, without code of their own")
    for key, value in family.fixed.items():
        if values.get(key) != value:
            _refuse(place, key, values.get(key), str(value))
    if windows := {*values.get("layer_types", ())} - {"full_attention"}:
        _refuse(place, "layer_types", windows.pop(), "full_attention")
    for key in family.biases:
        if values[key] != values[family.biases[0]]:
            _refuse(place, key, values[key], f"{family.biases[0]}={values[family.biases[0]]} too")
    for key in SIZES.values():
        if key not in values:
            _refuse(place, key, None, "a value")
    width = values["hidden_size"] / values["num_attention_heads"]
    head_width = values.get("head_dim", width)
    if head_width != width and not family.any_head_width:
        _refuse(place, "head_dim", head_width, f"{width:g}, which is hidden_size / num_attention_heads")
    bias = {"bias": values[family.biases[0]]} if family.biases else {}
    kv_heads = values.get("num_key_value_heads", values["num_attention_heads"])
    try:
        model = ModelConfig(
            name=name,
            **{ours: values[theirs] for ours, theirs in {**SIZES, **family.own}.items()},
            **{**family.options, **bias},
            norm_eps=values[family.norm_eps],
            **_rope(values, family, place),
            n_kv_heads=None if kv_heads == values["num_attention_heads"] else kv_heads,
            head_width=None if head_width == width else head_width,
            head=head,
        )
    except ConfigError as error:
        raise ArtefactError(f"{place}: {error}") from error
    found = architecture_of(model)
    if isinstance(found, str):
        raise ArtefactError(f"{place}: {found}")
    return model, Architecture(known, found.head, found.fields)


def _rope(values: Mapping[str, Any], family: Family, place: str) -> dict[str, Any]:
    """Our options of rotary positions, from the keys of older or newer versions of transformers."""
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    nested: Mapping[str, Any] = values.get(name) or {}
    kind = nested.get("rope_type", nested.get("type", "default"))
    scaling = "none" if kind == "default" else kind
    if scaling not in SCALINGS or kind == "none":
        _refuse(place, f"{name}.rope_type", kind, "default, linear or llama3")
    found: dict[str, Any] = {"rope_scaling": scaling}
    for ours, key, default in (("rope_base", "rope_theta", 10000.0), ("rotary_fraction", "partial_rotary_factor", 1.0)):
        older = family.own_rope.get(key, key)
        found[ours] = float(nested.get(key, values.get(older, values.get(key, default))))
    if found["rotary_fraction"] != 1 and not family.own_rope:
        _refuse(place, "partial_rotary_factor", found["rotary_fraction"], "1: all of a head is rotated")
    given = {_ORIGINAL: values["max_position_embeddings"], **nested}
    given |= {key: values[key] for key in (_ORIGINAL,) if key in values}  # has precedence in transformers
    for ours, theirs in SCALINGS[scaling].items():
        if not isinstance(given.get(theirs), int | float):
            _refuse(place, f"{name}.{theirs}", given.get(theirs), "a number")
        found[ours] = given[theirs]
    return found


def _refuse(place: str, key: str, value: Any, accepted: str) -> NoReturn:
    raise ArtefactError(f"{place}: {key}={value}: expected {accepted}")
