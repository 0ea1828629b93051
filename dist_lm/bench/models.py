"""Models that several benchmarks share: ours with its initial values, the same in transformers, and what trains it."""

import tempfile
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dist_lm.config.model import ModelConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import StageConfig
from dist_lm.errors import ConfigError
from dist_lm.interop.architectures import Architecture, architecture_of
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.stages.exporting.files import write_model


def initial_model(config: Config) -> Transformer:
    """Returns our model with its initial values, fp32 on the CPU; all variants of a case begin with them."""
    model = Transformer(config.model)
    initialise(model, config.seed)
    return model


def neox_of(model: ModelConfig, peer: str) -> Architecture:
    """Returns the architecture of a GPT-NeoX, the one family that the peers have too.

    Raises:
        ConfigError: the model is of another family; the message begins with `peer`.
    """
    architecture = architecture_of(model)
    if not isinstance(architecture, Architecture) or architecture.family != "GPTNeoX":
        family = getattr(architecture, "family", architecture)
        raise ConfigError(f"{peer}: the model is {family}; expected GPT-NeoX")
    return architecture


def in_transformers(model: Transformer, kind: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """Returns a copy of the model as the class `kind` of transformers, with `options` of its `from_pretrained`, fp32 on
    the CPU.

    Raises:
        ConfigError: no architecture of transformers holds the model.
        OSError: a file cannot be written.
    """
    # The peer loads our export, so that both have the same weights.
    with tempfile.TemporaryDirectory(prefix="dlm-bench-") as folder:
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
        write_model(Path(folder), model.config, dict(model.named_parameters()).__getitem__, "fp32", ids)
        return getattr(import_module("transformers"), kind).from_pretrained(folder, **options)


def peer_optimizer(parameters: Iterable[Any], stage: StageConfig) -> torch.optim.AdamW:
    """Builds torch's fused AdamW of parameters or groups of them, with our settings at their peak rate; weight decay is
    0 unless a group has its own."""
    return torch.optim.AdamW(
        parameters, lr=stage.lr, betas=(stage.beta1, stage.beta2), eps=stage.adam_eps, weight_decay=0.0, fused=True
    )


def word_tokenizer(words: Sequence[str]) -> Any:
    """Returns a tokenizer of transformers with one of `words` per token, in the order of their ids; the first two end
    and pad a text, and the first also stands for unknown words. TRL needs one for padding."""
    transformers, tokenizers = import_module("transformers"), import_module("tokenizers")
    end, pad, *_ = words
    vocabulary = {word: token_id for token_id, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=end))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=pad)
