"""Models as transformers builds them from their own options, with odd values: they come in, compute and write the same,
and go out with the same tensors.

`hf_models` begins with a model of ours and finds what an export forgets; here a key of config.json that an import reads
otherwise than transformers shows.
"""

from typing import Any

import pytest
import torch

from dist_lm.errors import ArtefactError
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.interop.architectures import Architecture, architecture_of, hf_config, model_of
from dist_lm.interop.weights import ALIASES, converted
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

SIZES = {
    **{"vocab_size": 301, "hidden_size": 60, "intermediate_size": 77, "num_hidden_layers": 3},
    **{"max_position_embeddings": 200, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None},
}
ONE_KEY = {"num_attention_heads": 6, "num_key_value_heads": 1}  # heads of width 10
WIDE = {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 18}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 3.0, "original_max_position_embeddings": 50}
LAYERS = ["full_attention", "sliding_attention", "full_attention"]
# name -> (family, options)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "a window of one token": ("Mistral", {**ONE_KEY, "sliding_window": 1}),
    "a window of 33 tokens": ("Mistral", {**WIDE, "sliding_window": 33}),
    "the window of Mistral by default": ("Mistral", ONE_KEY),
    "one layer slides": ("Ministral", {**WIDE, "sliding_window": 5, "layer_types": LAYERS}),
    "all layers of Ministral slide": ("Ministral", {**WIDE, "sliding_window": 21}),
    "the last layer slides": (
        "Qwen2",
        {**ONE_KEY, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "no layer slides": ("Qwen2", {**ONE_KEY, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 9}),
    "windows and biases": (
        "Qwen3",
        {**WIDE, "attention_bias": True, "use_sliding_window": True, "sliding_window": 6, "layer_types": LAYERS},
    ),
    "Qwen3 with YaRN": ("Qwen3", {**WIDE, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}}),
    "YaRN without whole pairs": (
        "Llama",
        {**ONE_KEY, "rope_parameters": {**YARN, "truncate": False, "beta_fast": 9.0}},
    ),
    "YaRN in a part of heads": (
        "GPTNeoX",
        {"num_attention_heads": 6, "rope_parameters": {**YARN, "partial_rotary_factor": 0.4, "attention_factor": 1.3}},
    ),
    "biases of the network alone": ("Llama", {**ONE_KEY, "mlp_bias": True, "hidden_act": "gelu_new"}),
    "GPT-NeoX by tanh": ("GPTNeoX", {"num_attention_heads": 6, "attention_bias": False, "hidden_act": "gelu_new"}),
    "Phi-3 in a part of heads": (
        "Phi3",
        {**ONE_KEY, "sliding_window": 8, "rope_parameters": {"rope_theta": 900.0, "partial_rotary_factor": 0.6}},
    ),
    "Phi-3 with one key head": ("Phi3", ONE_KEY),
    "StarCoder2 without biases": ("Starcoder2", {**ONE_KEY, "use_bias": False, "sliding_window": 12}),
    "StarCoder2 with a head for each query": ("Starcoder2", {"num_attention_heads": 6, "num_key_value_heads": 6}),
    "SmolLM3 with windows": (
        "SmolLM3",
        {**ONE_KEY, "use_sliding_window": True, "sliding_window": 9, "no_rope_layers": [1, 0, 0]},
    ),
    "every second layer without RoPE": ("SmolLM3", {**ONE_KEY, "no_rope_layer_interval": 2, "attention_bias": True}),
    "Granite with all constants": (
        "Granite",
        {
            **{**ONE_KEY, "embedding_multiplier": 7.0, "residual_multiplier": 0.22, "attention_multiplier": 0.11},
            **{"logits_scaling": 5.0, "attention_bias": True, "tie_word_embeddings": True},
        },
    ),
    "Granite by default": ("Granite", ONE_KEY),
    "OLMo 2 with one key head": ("Olmo2", {**ONE_KEY, "attention_bias": True, "tie_word_embeddings": True}),
}


def their_model(family: str, options: dict[str, Any]) -> Any:
    """A model with random weights, and norms and biases that are not 1 and 0."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter) * (1 if "norm" in name else 3))
    return model.requires_grad_(requires_grad=False)


@pytest.mark.heavy
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_it_comes_in_computes_writes_and_goes_out_the_same(name: str):
    family, options = MODELS[name]
    theirs = their_model(family, options)
    config, found = model_of(
        theirs.config.to_dict() | {"architectures": [f"{family}ForCausalLM"]}, "one", "config.json"
    )
    state = {ALIASES.get(key, key) if family == "GPTNeoX" else key: x for key, x in theirs.named_parameters()}

    # In.
    ours = Transformer(config)
    conversions = converted(found, parameter_shapes(config))
    assert {tensor.name for tensor in conversions} == state.keys()
    loaded = {key: tensor.to_ours(state[tensor.name], i) for tensor in conversions for i, key in enumerate(tensor.ours)}
    ours.load_state_dict(loaded)

    # Out: the same class, and the same tensors.
    again = architecture_of(config)
    assert isinstance(again, Architecture)
    assert again.family == family
    for tensor in converted(again, parameter_shapes(config)):
        assert torch.equal(tensor.to_theirs([loaded[key] for key in tensor.ours]), state[tensor.name])
    back = getattr(transformers, f"{family}Config")(**hf_config(config, again, "float32"), **IDS)
    reloaded = getattr(transformers, f"{family}ForCausalLM")(back).eval()
    reloaded.load_state_dict(theirs.state_dict())

    tokens = torch.randint(1, SIZES["vocab_size"], (2, 90), generator=torch.Generator().manual_seed(1))
    logits = theirs(tokens).logits
    scale = float(logits.abs().max())
    assert float((ours(tokens) - logits).abs().max()) < 1e-5 * scale
    assert float((reloaded(tokens).logits - logits).abs().max()) < 1e-6 * scale

    # The engine writes what transformers would: each of its tokens is the likeliest one there.
    prompt = tokens[0, :57].tolist()
    options_of_engine = EngineOptions(
        cache_tokens=512, page_tokens=16, max_sequences=2, piece_tokens=32, step_tokens=64
    )
    engine = Engine(config, dict(ours.named_parameters()), eot_id=0, options=options_of_engine)
    engine.submit(Request("one", prompt, SamplingParams(max_new_tokens=64, temperature=0.0, ignore_eot=True)))
    (answer,) = engine.run()
    assert isinstance(answer, Answer)
    written = torch.tensor([[*prompt, *answer.tokens]])
    assert theirs(written).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == list(answer.tokens)


IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        *(
            ({"model_type": kind}, f"model_type={kind}: expected one of")
            for kind in ("gpt2", "gemma2", "mixtral", "qwen3_moe")
        ),
        ({"model_type": "ministral3"}, "model_type=ministral3: expected one of"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: expected 1"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type=longrope"),
    ],
)
def test_what_is_not_held_is_refused_by_its_key(config: dict[str, Any], words: str):
    kind = {"llama": "Llama", "phi3": "Phi3"}.get(config["model_type"], "")
    classes = {"architectures": [f"{kind}ForCausalLM"]}
    with pytest.raises(ArtefactError, match=f"^the/config.json: .*{words}"):
        model_of({**SIZES, **ONE_KEY, **classes, **config}, "one", "the/config.json")
