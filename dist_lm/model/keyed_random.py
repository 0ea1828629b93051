"""Randomness as a pure function of keys: a hash of counters, dropout, and the initial values of parameters.

There is no generator and no state. Whether dropout keeps an element depends on (seed, step, sequence number, site,
token index, channel) alone. Any rank can compute any slice, so the numbers do not depend on the layout, and a resumed
run draws what the uninterrupted run would have drawn.

Initial values are keyed by (seed, parameter name): they do not depend on the other parameters, on the order of
creation, or on the sharding.

Dropout applies to the embeddings and to the two residual branches of each block, not to attention probabilities: fused
attention kernels draw those from a generator of their own, in an order that depends on the layout, and models of this
family are trained without it.

The 64-bit mixer is the finaliser of SplitMix64 (Steele, Lea, Flood 2014). The 32-bit mixer is a round of MurmurHash3's
finaliser (Appleby 2011). All arithmetic wraps.

Dimensions: B sequences, T tokens, D channels.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import torch

from dist_lm.config.model import ModelConfig
from dist_lm.config.stage import LORA_TARGETS
from dist_lm.model.size import ADAPTERS, VALUE_MIX, is_matrix

if TYPE_CHECKING:
    from dist_lm.model.transformer import Transformer

EMBEDDING_SITE = 0

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1

_ROUND_1 = 0x85EBCA6B - (1 << 32)
_ROUND_2 = 0xC2B2AE35 - (1 << 32)


def signed(word: int) -> int:
    """Returns the int64 with the same 64 bits."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts int64 logically to the right (the operator shifts arithmetically)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: int | torch.Tensor) -> int | torch.Tensor:
    """Returns the word with its 64 bits mixed: for an int one in [0, 2^64), for an int64 tensor a new one; both have
    the same bits."""
    if isinstance(x, int):
        x &= _WORD
        x = ((x ^ (x >> 30)) * _MIX_1) & _WORD
        x = ((x ^ (x >> 27)) * _MIX_2) & _WORD
        return x ^ (x >> 31)

    x = (x ^ _shift_right(x, 30)) * signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * signed(_MIX_2)
    return x ^ _shift_right(x, 31)


@overload
def hash_words(*words: int) -> int: ...
@overload
def hash_words(*words: int | torch.Tensor, state: int | torch.Tensor = 0) -> torch.Tensor: ...
def hash_words(*words: int | torch.Tensor, state: int | torch.Tensor = 0) -> int | torch.Tensor:
    """Hashes a sequence of words, ints or int64 tensors that broadcast, to 64 random bits.

    Ints cost nothing if they come first. A tensor of one value gives the same bits as the int.

    Args:
        state: hash of the words before these; 0: there are none.

    Returns:
        int64 tensor, or an int in [0, 2^64) if all words are ints.
    """
    for word in words:
        if isinstance(state, int) and isinstance(word, torch.Tensor):
            state = _mix(signed(state + _GOLDEN) ^ word)
        elif isinstance(state, int):
            assert isinstance(word, int)
            state = _mix((state + _GOLDEN) ^ (word & _WORD))
        else:
            state = _mix((state + signed(_GOLDEN)) ^ (signed(word) if isinstance(word, int) else word))
    return state


def hash_grid(row: torch.Tensor, column_C: torch.Tensor) -> torch.Tensor:
    """Returns 32 random bits for every pair of a row and a column, from one hash per row and one per column.

    Six cheap passes touch every element of the grid; the expensive mixing happens in the hashes of rows and columns.

    Args:
        row: int64 hashes of any shape (...).
        column_C: int64 hashes.

    Returns:
        int32 (..., C), uniform over all int32.
    """
    low, high = row.unsqueeze(-1).view(torch.int32).split(1, dim=-1)
    x = low ^ column_C.to(torch.int32)
    x = torch.add(high, x, alpha=_ROUND_1)
    # An arithmetic shift saves a pass: x and ~x share a hash, and the result stays uniform.
    x.bitwise_xor_(x >> 15)
    return x.mul_(_ROUND_2)


def residual_site(layer: int, branch: int) -> int:
    """Returns the dropout site of a residual branch: branch 0 is attention, branch 1 the feed-forward network."""
    return 1 + 2 * layer + branch


@dataclass(frozen=True)
class DropoutKey:
    """Determines all dropout masks of one forward pass."""

    rate: float  # probability that an element is dropped, in [0, 1)
    seed: int
    step: int  # optimizer step
    sequence_B: torch.Tensor | None = None  # int64; global sequence numbers; None until the batch is known
    adapter_rate: float = 0.0  # as `rate`, for the inputs of adapters


@dataclass(frozen=True)
class SiteDropout:
    """Dropout at one site. Values that change with the step or the layer are tensors, so one compiled block serves all
    steps and layers."""

    rate: float
    state: torch.Tensor  # int64 scalar; the hash of (seed, step, site)
    channel_D: torch.Tensor  # int64; hashes of the channels
    sequence_B: torch.Tensor
    first_index: int  # index, in its sequence, of the first token of the input


def dropout_sites(
    key: DropoutKey | None, n_layers: int, d_model: int, first_index: int = 0
) -> list[SiteDropout | None]:
    """Returns the dropout of every site of a model, by its number: EMBEDDING_SITE, then `residual_site`s. Every entry
    is None without a key or with rate 0.

    Args:
        key: must have its sequence numbers, unless the rate is 0.
        first_index: index, in its sequence, of the first token of the input.
    """
    n_sites = residual_site(n_layers, 0)
    if key is None or key.rate == 0:
        return [None] * n_sites
    assert key.sequence_B is not None

    # Sites, channels and rows are hashed separately, so the large (B, T, D) grid costs one cheap mix per element.
    device = key.sequence_B.device
    state_S = hash_words(key.seed, key.step, torch.arange(n_sites, device=device))
    channel_D = hash_words(key.seed, torch.arange(d_model, device=device))
    return [SiteDropout(key.rate, state, channel_D, key.sequence_B, first_index) for state in state_S]


def adapter_sites(
    key: DropoutKey | None, n_layers: int, width: int, first_index: int = 0
) -> list[dict[str, SiteDropout] | None]:
    """Returns the dropout of the inputs of a layer's adapters, by the name of the weight, for every layer. Every entry
    is None without a key or with rate 0.

    The sites follow those of `dropout_sites`. Tensor-parallel ranks have the same tokens of an input.

    Args:
        width: channels of the widest input of an adapter.
        first_index: index, in its sequence, of the first token of the input.
    """
    if key is None or key.adapter_rate == 0:
        return [None] * n_layers
    assert key.sequence_B is not None

    device = key.sequence_B.device
    weights = [weight for part in LORA_TARGETS.values() for weight in part]
    first_site = residual_site(n_layers, 0)
    site_LW = torch.arange(first_site, first_site + n_layers * len(weights), device=device).view(n_layers, -1)
    state_LW = hash_words(key.seed, key.step, site_LW)
    channel_C = hash_words(key.seed, torch.arange(width, device=device))
    return [
        {
            weight: SiteDropout(key.adapter_rate, state, channel_C, key.sequence_B, first_index)
            for weight, state in zip(weights, state_W, strict=True)
        }
        for state_W in state_LW
    ]


def apply_dropout(x_BTD: torch.Tensor, site: SiteDropout | None) -> torch.Tensor:
    """Returns `x` with dropped elements 0 and the rest scaled by `1 / (1 - rate)`; `x` itself without a site."""
    if site is None:
        return x_BTD
    token_T = torch.arange(site.first_index, site.first_index + x_BTD.shape[1], device=x_BTD.device)
    return x_BTD * keep_mask(site, token_T) * (1 / (1 - site.rate))


def keep_mask(site: SiteDropout, token_T: torch.Tensor) -> torch.Tensor:
    """Returns the mask of the elements that are not dropped.

    Args:
        token_T: int64; indices of the tokens in their sequence.

    Returns:
        bool (B, T, D), True with probability `1 - rate` (to 2^-32).
    """
    row_BT = hash_words(site.sequence_B[:, None], token_T[None, :], state=site.state)
    threshold = round(site.rate * (1 << 32)) - (1 << 31)
    return hash_grid(row_BT, site.channel_D) >= threshold


RESIDUAL_PROJECTIONS = ("attention.output", "feed_forward.down.weight")
"""Projections onto the residual stream, two per layer: their scale falls with depth (Radford et al. 2019, 2.3)."""

SCALAR_HEAD, TOKEN_HEAD = "scalar_head.weight", "lm_head.weight"


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """Returns the unsharded initial value of one parameter, fp32 on the CPU, of logical `shape`.

    A function of (seed, name, shape, config) alone. For adapters see `initial_factor`. Biases are 0, norm weights
    1, the scalars of `value_residual` 0.5. Other parameters are normal with standard deviation `init_std`, divided by
    sqrt(2 n_layers) for projections onto the residual stream (or these are 0); a scalar head has 1 / sqrt(d_model + 1)
    (Stiennon et al. 2020). With `base_width`, the deviation of matrices inside blocks falls with the root of the width,
    and that of the head with the width (Yang & Hu 2022, table 3).
    """
    if ADAPTERS in name:
        return initial_factor(name, shape, seed)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(VALUE_MIX):
        return torch.full(shape, 0.5)

    std = config.init_std
    if name.endswith(RESIDUAL_PROJECTIONS):
        if config.residual_init == "zero":
            return torch.zeros(shape)
        std /= math.sqrt(2 * config.n_layers)
    if is_matrix(name):
        std /= math.sqrt(config.relative_width)
    if name == TOKEN_HEAD:
        std /= config.relative_width
    if name == SCALAR_HEAD:
        std = 1 / math.sqrt(config.d_model + 1)

    # The name in the key: adding or removing a parameter does not change the values of the rest.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(0, std, generator=generator)


def initial_factor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Returns the unsharded initial A or B, fp32 on the CPU: B is 0, A uniform within 1 / sqrt(input), as in peft."""
    if name.endswith(".b"):
        return torch.zeros(shape)

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def initialise(model: "Transformer", seed: int) -> None:
    """Fills the parameters of an unsharded model in place with `initial_value`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, tuple(parameter.shape), model.config, seed))
