"""Adapters: low-rank changes of frozen weights (LoRA, Hu et al. 2021, arXiv 2106.09685, equation 3).

    y = W x + s B A x,   s = alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)

The product is never formed in training. Both factors have the rank as their first dimension and then the dimensions of
the weight, so a slice of heads or hidden units is a slice of dimension 1. With the initial B = 0 the model is its base.

Dimensions: B sequences, T tokens, R rank, I input (D, H K or F), O output (H K, D or F).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch import nn

from dist_lm.config.model import AdaptedModelConfig, ModelConfig
from dist_lm.model.keyed_random import SiteDropout, apply_dropout
from dist_lm.model.size import ADAPTERS, Shape, parameter_shapes

AdapterDropout = Mapping[str, SiteDropout] | None
INPUT_FIRST = "output"  # the weight that is stored as (input, output), the others are (output, input)


class Adapter(nn.Module):
    """Computes the change of one weight's output."""

    def __init__(self, a_shape: Shape, b_shape: Shape, scale: float) -> None:
        """
        Args:
            a_shape: (R, *input).
            b_shape: (R, *output).
        """
        super().__init__()
        self.a = nn.Parameter(torch.empty(a_shape))
        self.b = nn.Parameter(torch.empty(b_shape))
        self.scale = scale
        self.is_on = True  # False inside `without_adapters`

    def forward(self, x: torch.Tensor, dropout: SiteDropout | None = None) -> torch.Tensor:
        """Returns the change of the output, (B, T, *output), for an input (B, T, *input).

        Args:
            dropout: of the input; its channels are those of the unsplit input.
        """
        x_BTI = x.flatten(2)
        if dropout is not None:
            first = self.first_channel
            channel_I = dropout.channel_D[first : first + x_BTI.shape[-1]]
            x_BTI = apply_dropout(x_BTI, replace(dropout, channel_D=channel_I))

        # Two products through the small rank cost less than forming B A and multiplying once.
        a, b = self.factors()
        z_BTR = F.linear(x_BTI, a.flatten(1)) * self.scale
        return (z_BTR @ b.flatten(1)).unflatten(-1, b.shape[1:])

    @property
    def first_channel(self) -> int:
        """The channel of the unsplit input that the input of this rank begins with."""
        return 0

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the parts of A and B that this rank computes with; all of them in a model that is not split."""
        return self.a, self.b


def build_adapters(config: ModelConfig, part: str) -> nn.ModuleDict | None:
    """Returns new adapters of one part of a block, by the name of the weight, with factors that have no values yet;
    None if the model has no adapters.

    Args:
        part: attention | feed_forward.
    """
    if not isinstance(config, AdaptedModelConfig):
        return None
    shapes = parameter_shapes(config)
    prefix = f"blocks.0.{part}{ADAPTERS}"
    return nn.ModuleDict(
        {
            name: Adapter(shapes[f"{prefix}{name}.a"], shapes[f"{prefix}{name}.b"], config.scale)
            for name in config.adapted(part)
        }
    )


def adapted(
    y: torch.Tensor,
    x: torch.Tensor,
    adapters: nn.ModuleDict | None,
    name: str,
    dropout: AdapterDropout = None,
) -> torch.Tensor:
    """Returns `y`, the product of weight `name` with x, plus the change of it by the adapter of the weight, in its
    shape; y itself without an adapter, or if it is off.

    Args:
        dropout: of the inputs of adapters, by the name of the weight.
    """
    if adapters is None or name not in adapters or not adapters[name].is_on:
        return y
    return y + adapters[name](x, dropout and dropout[name])


def adapter_of(weight: str) -> str:
    """Returns the prefix of the names of a weight's factors: `blocks.0.feed_forward.adapters.up.` for
    `blocks.0.feed_forward.up.weight`."""
    module, _, name = weight.removesuffix(".weight").rpartition(".")
    return f"{module}{ADAPTERS}{name}."


def change(
    weight: str, a: torch.Tensor, b: torch.Tensor, scale: float, box: Sequence[slice] | None = None
) -> torch.Tensor:
    """Returns `scale * B A` with the dimensions of the weight, in fp32, on the device of the factors.

    Args:
        weight: name of the weight; one that ends in `output` is stored as (input, output).
        a, b: unsharded factors, with the rank as first dimension.
        box: the part of the weight that is computed, a slice for each of its dimensions; None: all of it.
    """
    first, second = (a, b) if weight.endswith(INPUT_FIRST) else (b, a)
    if box is not None:
        n_first_dims = first.dim() - 1  # without the rank
        first = first[(slice(None), *box[:n_first_dims])]
        second = second[(slice(None), *box[n_first_dims:])]

    product = first.flatten(1).float().t() @ second.flatten(1).float()
    return (product * scale).view(*first.shape[1:], *second.shape[1:])


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Turns all adapters of the model off inside the block, so it computes as its base; they are on afterwards, also
    after an error."""
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True
