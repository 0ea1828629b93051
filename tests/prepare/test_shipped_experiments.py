"""Shipped experiments of open models compose at the shapes that these models have."""

import json
from typing import Any

import pytest

from dist_lm.model.size import parameter_count
from dist_lm.prepare.command_file import command_file
from dist_lm.prepare.compose import compose_config, overrides_of
from dist_lm.prepare.conf_folders import choices
from dist_lm.prepare.plan import with_command_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936}
QWEN2 |= {"max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "use_sliding_window": False}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_position_embeddings": 40960}
QWEN3 |= {"head_dim": 128, "attention_bias": False}
# experiment -> family, width, hidden units, layers, heads, key heads, tied, parameters in millions
MODELS: dict[str, tuple[dict[str, Any], int, int, int, int, int, bool, float]] = {
    "smollm2_135m": (LLAMA, 576, 1536, 30, 9, 3, True, 134.5),
    "smollm2_360m": (LLAMA, 960, 2560, 32, 15, 5, True, 361.8),
    "smollm2_1.7b": (LLAMA, 2048, 8192, 24, 32, 32, True, 1711),
    "qwen2.5_coder_0.5b": (QWEN2, 896, 4864, 24, 14, 2, True, 494),
    "qwen2.5_coder_1.5b": (QWEN2, 1536, 8960, 28, 12, 2, True, 1544),
    "qwen2.5_coder_3b": (QWEN2, 2048, 11008, 36, 16, 2, True, 3086),
    "qwen2.5_coder_7b": (QWEN2 | {"vocab_size": 152064}, 3584, 18944, 28, 28, 4, False, 7616),
    "qwen3_0.6b": (QWEN3, 1024, 3072, 28, 16, 8, True, 596),
    "qwen3_1.7b": (QWEN3, 2048, 6144, 28, 16, 8, True, 1721),
    "qwen3_4b": (QWEN3, 2560, 9728, 36, 32, 8, True, 4022),
    "qwen3_8b": (QWEN3, 4096, 12288, 36, 32, 8, False, 8191),
}


def test_every_command_file_of_conf_has_its_shape_here():
    assert {name for name in choices("experiment") if command_file(name)} == {*MODELS, "long_context"}


def test_a_longer_context_composes_for_a_model_of_the_project():
    """Finds a key that the stage lacks, and positions that are scaled otherwise than the context grows."""
    command = with_command_file(["experiment=long_context", "model=large", "stage.init_from=work/runs/code/default"])
    config, before = (
        compose_config(overrides_of("code", "code", command)),
        compose_config(["stage=code", "model=large"]),
    )
    assert config.stage.seq_len == config.model.max_seq_len == 32768
    assert config.model.rope_original_len == before.model.max_seq_len
    assert config.model.rope_factor == config.model.max_seq_len / before.model.max_seq_len
    assert config.stage.seq_len % config.parallel.cp == 0


@pytest.mark.parametrize("name", MODELS)
def test_it_composes_at_the_shape_of_its_model(name, tmp_path):
    """Finds a key that the stage lacks, a sequence longer than the context, and the name of another model."""
    family, width, hidden, layers, heads, key_heads, tied, millions = MODELS[name]
    shape = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "tie_word_embeddings": tied}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family | shape | {"hidden_act": "silu"}))
    command = with_command_file([f"experiment={name}", f"stage.init_from=hf:{folder}", "tokenizer=train"])
    config = compose_config(overrides_of("sft", "sft", command))
    assert parameter_count(config.model) == pytest.approx(millions * 1e6, rel=0.002)
    size = name.rpartition("_")[2]
    (source,) = (text for text in command if text.startswith("stage.init_from=hf:") and str(folder) not in text)
    assert size in source.lower()
    assert bool(config.stage.lora.rank) == (millions > 3000)
    assert config.trained_shape.lora is None or config.stage.lr == pytest.approx(
        10 * (1e-5 if millions > 4000 else 2e-5)
    )
