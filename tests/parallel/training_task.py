"""The training that layouts are compared on: parameters, batches and what is recorded, the same for every run.

Everything is on that could depend on the layout: dropout, label smoothing, z-loss, a document mask, positions that
restart, a loss mask, clipping, weight decay.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dist_lm.config.model import ModelConfig
from dist_lm.config.stage import StageConfig
from dist_lm.data.batch import Batch
from dist_lm.model.keyed_random import DropoutKey, initial_value
from dist_lm.model.transformer import Transformer
from dist_lm.training.objective import LossSum, Objective, next_token
from dist_lm.training.optimizer import MOMENTS, VARIANCE, named_state

SEED = 7
BATCH, SEQ_LEN = 8, 16
VOCABULARY = 500  # about: what a scalar head's targets are divided by
STAGE = StageConfig(
    name="parity",
    lr=1e-2,
    # AdamW divides by |gradient| + eps in its first step: a small eps would turn the rounding of entries near 0 into
    # whole steps of either sign, whatever the layout
    adam_eps=1e-3,
    dropout=0.1,
    label_smoothing=0.1,
    z_loss=1e-3,
    grad_clip=1.0,
)

Tensors = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]


@dataclass
class Trajectory:
    """What some steps left behind, with logical shapes."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of the gradient, before clipping
    gradients: Arrays = field(default_factory=dict)  # of the last step, clipped
    end: Arrays = field(default_factory=dict)  # parameters and moments after the last step


def parameter_value(name: str, shape: tuple[int, ...], model: ModelConfig) -> torch.Tensor:
    """Initial values; norms, biases and B of adapters moved off 1 and 0, so that a forgotten or doubled one shows."""
    value = initial_value(name, shape, model, SEED)
    if not name.endswith(("norm.weight", "bias", ".b", "value_mix")):
        return value
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))
    return value + 0.05 * torch.randn(shape, generator=generator)


def batch_of(model: ModelConfig, step: int) -> Batch:
    """The global batch of a step: several documents a sequence, some targets that do not count."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, model.vocab_size, (BATCH, SEQ_LEN + 1), generator=generator)
    starts = torch.rand(BATCH, SEQ_LEN, generator=generator) < 0.15
    starts[:, 0] = True
    index = torch.arange(SEQ_LEN).expand(BATCH, -1)
    return Batch(
        tokens_BT=tokens[:, :-1],
        targets_BT=tokens[:, 1:],
        loss_mask_BT=(torch.rand(BATCH, SEQ_LEN, generator=generator) < 0.8).float(),
        document_BT=starts.long().cumsum(1) - 1,
        position_BT=index - torch.where(starts, index, 0).cummax(1).values,
        sequence_B=step * BATCH + torch.arange(BATCH),
    )


def rows(batch: Batch, part: slice) -> Batch:
    """Some sequences of a batch, whose logits are computed only where targets count."""
    values = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
    own = {name: value[part] for name, value in values.items() if value is not None and "_B" in name}
    return Batch(**own, logit_index_N=own["loss_mask_BT"].flatten().nonzero().flatten())


def objective_of(model: ModelConfig) -> Objective:
    """Next tokens; of a scalar head, scores that should be the tokens to come, as numbers."""
    if model.head == "tokens":
        return next_token(STAGE.label_smoothing, STAGE.z_loss)

    def squares(model: Transformer, batch: Batch) -> LossSum:
        miss_BT = model.scores(batch) - batch.targets_BT / VOCABULARY
        return LossSum((miss_BT.square() * batch.loss_mask_BT).sum(), batch.loss_mask_BT.sum())

    return squares


def dropout_key(step: int, model: ModelConfig, sequence_B: torch.Tensor | None = None) -> DropoutKey:
    adapter_rate = model.lora.dropout if model.lora else 0.0
    return DropoutKey(STAGE.dropout, SEED, step, sequence_B, adapter_rate)


def trained_tokens_of(model: ModelConfig) -> torch.Tensor | None:
    """The ids that stage.lora.tokens stands for here: the names are numbers."""
    if model.lora is None or not model.lora.tokens:
        return None
    return torch.tensor([int(name) for name in model.lora.tokens])


def gradients(model: nn.Module) -> Tensors:
    """Whole gradients, with their padding (collective)."""
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None}


def parameters_and_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Whole parameters and moments, with their padding (collective)."""
    kept = (*MOMENTS, VARIANCE)
    moments = {name: value for name, value in named_state(model, optimizer) if name.endswith(kept)}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name: whole(value) for name, value in [*trained, *moments.items()]}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
