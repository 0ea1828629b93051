"""Layer normalisation. PyTorch computes the statistics in fp32 whatever the dtype of the input."""

from torch import nn

from dist_lm.config.model import ModelConfig


def build_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the residual stream."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
