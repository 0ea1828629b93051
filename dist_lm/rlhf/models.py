"""The models of reinforcement learning on one mesh: what is trained, and what is frozen.

All are made by `parallel.sharding.build_model`; who does so fills policy, reference and reward model from checkpoints,
and a new critic from one of them. None has dropout: nothing here binds it.
"""

from dataclasses import dataclass, replace

import torch

from dist_lm.config.model import ModelConfig
from dist_lm.config.rlhf import RlhfConfig
from dist_lm.errors import ConfigError
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.padding import shard_of
from dist_lm.parallel.sharding import reshard
from dist_lm.training.optimizer import ShardedAdamW, build_optimizer

SCALAR_HEAD = "scalar_head."


@dataclass(frozen=True)
class Trained:
    """A model with its optimizer."""

    model: Transformer
    optimizer: ShardedAdamW


@dataclass(frozen=True)
class RlhfModels:
    """Policy and critic are trained; reference and reward model are not."""

    policy: Trained
    critic: Trained | None = None  # of a scalar head; None: the algorithm has none
    reference: Transformer | None = None  # None: the policy may go anywhere
    reward: Transformer | None = None  # of a scalar head; None: rewards are rules


def scalar_config(model: ModelConfig) -> ModelConfig:
    """The shape of a critic of this policy's."""
    return replace(model, head="scalar")


def trained_policy(model: Transformer, config: RlhfConfig) -> Trained:
    """With a new optimizer at `rlhf.lr`."""
    return Trained(model, build_optimizer(model, config))


def trained_critic(model: Transformer, config: RlhfConfig) -> Trained:
    """With a new optimizer at `rlhf.value_lr`."""
    return Trained(model, build_optimizer(model, replace(config, lr=config.value_lr)))


def frozen(model: Transformer) -> Transformer:
    """The same model, which gets no gradients."""
    return model.requires_grad_(False)


@torch.no_grad()
def start_critic(critic: Transformer, source: Transformer, head: str) -> None:
    """Give a critic the trunk of another model of its shape and layout: a reward model's, or the policy's.

    Args:
        head: zero (it expects nothing: Huang et al. 2024, detail 6) | reward_model (that of `source`).

    Raises:
        ConfigError: `source` has no such head, or is another model.
    """
    for model in (critic, source):
        reshard(model)
    given = dict(source.named_parameters())
    for name, parameter in critic.named_parameters():
        if name.startswith(SCALAR_HEAD) and head == "zero":
            shard_of(parameter).zero_()
        elif name not in given:
            raise ConfigError("rlhf.value_head=reward_model: expected zero, as there is no reward model")
        elif given[name].shape != parameter.shape:
            raise ConfigError(
                f"a critic of shape {tuple(parameter.shape)} at {name} cannot begin as a model of shape "
                f"{tuple(given[name].shape)}: reward model and policy have to be of one shape"
            )
        else:
            shard_of(parameter).copy_(shard_of(given[name]))
