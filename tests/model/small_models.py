"""Small models for the tests of the model."""

import torch

from dist_lm.config.model import ModelConfig
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer


def small_config(**changes) -> ModelConfig:
    """Two layers of five heads: no power of two, so that a mixed-up dimension shows."""
    values = {
        "name": "small",
        "d_model": 40,
        "n_layers": 2,
        "n_heads": 5,
        "d_ff": 72,
        "max_seq_len": 48,
        "vocab_size": 64,
        # large, so that attention is not uniform and an error shows in the logits
        "init_std": 0.2,
    }
    return ModelConfig(**(values | changes))


def small_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Initialised, with norms and biases moved off 1 and 0 so that a forgotten one shows."""
    model = Transformer(config)
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def small_tokens(config: ModelConfig, *shape: int) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
