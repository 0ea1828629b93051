"""The reference: the same training in one process, in plain PyTorch, and how far another run is from it.

It shares nothing with the runs it judges but the module definitions: whole parameters, whole batches,
`F.cross_entropy`, autograd.
"""

import pickle
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch import nn

from dist_lm.config.model import ModelConfig
from dist_lm.config.stage import MuonConfig
from dist_lm.model.size import is_trained
from dist_lm.model.transformer import Transformer
from dist_lm.training.optimizer import build_optimizer
from tests.parallel.training_task import (
    STAGE,
    VOCABULARY,
    Arrays,
    Trajectory,
    batch_of,
    dropout_key,
    gradients,
    parameter_value,
    parameters_and_moments,
    trained_tokens_of,
)

ROUNDING = 1e-13  # of fp64 sums


def expected_of(model: ModelConfig, steps: int = 1, muon: MuonConfig | None = None) -> Trajectory:
    """`steps` steps in float64: what all layouts round. Each is computed once."""
    return _expected_of(pickle.dumps((model, muon)), steps)


def _losses(model: Transformer, x_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    if model.scalar_head is not None:
        return (model.scalar_head(x_ND)[:, 0] - targets_N / VOCABULARY).square()
    logits_NV = model.head(x_ND)
    loss_N = F.cross_entropy(logits_NV, targets_N, reduction="none", label_smoothing=STAGE.label_smoothing)
    return loss_N + STAGE.z_loss * logits_NV.logsumexp(-1).square()


@cache
def _expected_of(pickled: bytes, steps: int) -> Trajectory:
    model_config: ModelConfig
    muon: MuonConfig | None
    model_config, muon = pickle.loads(pickled)
    model = Transformer(model_config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter_value(name, tuple(parameter.shape), model_config))
            parameter.requires_grad_(is_trained(name, model_config))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(model, STAGE, muon)
    outcome = Trajectory()
    for step in range(steps):
        batch = batch_of(model_config, step)
        optimizer.zero_grad()
        x_ND = model.hidden(
            batch.tokens_BT,
            document_BT=batch.document_BT,
            position_BT=batch.position_BT,
            dropout=dropout_key(step, model_config, batch.sequence_B),
        ).flatten(0, 1)
        loss_N = _losses(model, x_ND, batch.targets_BT.flatten())
        mask_N = batch.loss_mask_BT.flatten()
        loss = (loss_N * mask_N).sum() / mask_N.sum()
        loss.backward()
        if (ids := trained_tokens_of(model_config)) is not None:
            frozen = [token for token in range(model_config.vocab_size) if token not in ids.tolist()]
            for name, parameter in model.named_parameters():
                if name in ("embedding.weight", "lm_head.weight") and parameter.grad is not None:
                    parameter.grad[frozen] = 0
        norm = nn.utils.get_total_norm([p.grad for p in learning if p.grad is not None]).item()
        for parameter in learning:
            assert parameter.grad is not None
            parameter.grad *= min(1.0, STAGE.grad_clip / norm)  # clip_grad_norm_ adds 1e-6 to the norm
        outcome.losses.append(loss.item())
        outcome.norms.append(norm)
        outcome.gradients = {name: value.numpy() for name, value in gradients(model).items()}
        optimizer.step()
    outcome.end = {name: value.numpy() for name, value in parameters_and_moments(model, optimizer).items()}
    return outcome


def error(found: Arrays, expected: Arrays) -> float:
    """All tensors as one vector: L2 norm of the difference, relative to that of the expected one."""
    differences = sum(float(np.square(found[name] - value).sum()) for name, value in expected.items())
    return (differences / sum(float(np.square(value).sum()) for value in expected.values())) ** 0.5


def entries_off(found: Arrays, expected: Arrays, limit: float) -> dict[str, float]:
    """Tensors whose largest difference, relative to their own largest entry, is not within `limit`.

    A gradient may be 0 but for the rounding of the reference, such as that of a key bias without RoPE, which adds the
    same to all scores of a query: then the largest entry of all tensors is the scale.
    """
    assert found.keys() == expected.keys()
    largest_of = {name: float(np.abs(value).max()) for name, value in expected.items()}
    largest = max(largest_of.values())
    scale_of = {name: own if own > ROUNDING * largest else largest for name, own in largest_of.items()}
    errors = {name: float(np.abs(found[name] - value).max() / scale_of[name]) for name, value in expected.items()}
    return {name: value for name, value in errors.items() if not value <= limit}
