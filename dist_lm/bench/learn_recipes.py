"""The rows of `dist-lm bench learn`: a recipe is a configuration and the learner that trains by it.

Dimensions: B sequences, T tokens.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.errors import ConfigError, UserError
from dist_lm.model.keyed_random import DropoutKey, initialise
from dist_lm.model.size import flops_per_token
from dist_lm.model.transformer import Transformer
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.registry import stage_named
from dist_lm.stages.text import TextStage
from dist_lm.stages.training.stage import training_stage
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.optimizer import (
    build_optimizer,
    muon_momentum,
    set_learning_rate,
    set_momentum,
    stage_rate,
)
from dist_lm.training.step import accumulate_gradients, update

ALONE = ("tracking=none", "prerequisites=fail", "stage.init_from=none")
# no peer keeps attention inside a document; positions that start again belong to that mask
BASE = (*ALONE, "stage.document_mask=false", "stage.reset_positions=false")


class Learner(Protocol):
    """A model in training."""

    @property
    def flops_per_token(self) -> float: ...

    @property
    def parameters(self) -> int: ...

    def step(self, number: int, micro_batches: Sequence[Batch]) -> None:
        """The optimizer step of this 0-based number."""
        ...

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy of every target, nats, (B, T)."""
        ...


@dataclass(frozen=True)
class Recipe:
    """One row of the table."""

    name: str
    config: Config
    build: Callable[[Config, int, torch.device], Learner]  # (config, its steps, device)


def recipes_of(
    overrides: Sequence[str], own: Sequence[str], peers: Sequence[str], defaults: Sequence[str] = BASE
) -> list[Recipe]:
    """The recipe of `overrides` alone, then `NAME: overrides` of each of `own`, then the peers.

    Args:
        defaults: overrides that come before `overrides`.

    Raises:
        ConfigError: a recipe without a name, an unknown peer, overrides that cannot be composed, a stage that does not
            learn the next token, a setting that no learner has.
    """
    stage = [] if any(one.startswith("stage=") for one in overrides) else ["stage=code", "model=nano"]
    base = [*stage, *defaults, *overrides]
    found = [Recipe("as configured", compose_config(base), OwnLearner)]
    for text in own:
        name, rest = _named(text, "--recipe")
        found.append(Recipe(name, compose_config([*base, *rest]), OwnLearner))
    if peers:
        from dist_lm.bench.learn_peers import peer_recipe

        found += [peer_recipe(*_named(text, "--peer"), base) for text in peers]
    names = [one.name for one in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--recipe or --peer {twice.pop()}: the name is taken; expected a name of its own")
    for one in found:
        _check(one, found[0].config.seed)
    return found


def _check(recipe: Recipe, seed: int) -> None:
    """Refuse what a learner would not do as configured."""
    stage, name = recipe.config.stage, recipe.name
    program = stage_named(stage.name)
    if not isinstance(program, TextStage):
        raise ConfigError(
            f"{name}: stage={stage.name}: the loss of the next token is measured: expected a stage that trains on it, "
            "such as language or code"
        )
    program.check(recipe.config)
    for key, found, expected in (
        ("seed", recipe.config.seed, seed),
        ("stage.ema_decay", stage.ema_decay, 0.0),
        ("stage.lora.rank", stage.lora.rank, 0),
        ("stage.init_from", stage.init_from, "none"),
        ("stage.branch_from", stage.branch_from, ""),
    ):
        if found != expected:
            raise ConfigError(
                f"{name}: {key}={found}: all recipes have the same seeds, begin with initial weights, and train and "
                f"measure all of them: expected {key}={expected}"
            )


def _named(text: str, option: str) -> tuple[str, list[str]]:
    name, colon, rest = text.partition(":")
    if not name.strip() or not colon:
        raise ConfigError(f"{option}={text}: expected NAME: KEY=VALUE ...")
    try:
        return name.strip(), shlex.split(rest)
    except ValueError as error:  # a quotation without an end
        raise ConfigError(f"{option}={text}: {error}") from error


class OwnLearner:
    """Our model, optimizer and schedule, as a run has them."""

    def __init__(self, config: Config, steps: int, device: torch.device) -> None:
        if steps <= config.stage.warmup_steps:
            raise ConfigError(
                f"stage.warmup_steps={config.stage.warmup_steps}: training has {steps} steps; expected fewer steps of "
                "warm-up, or a larger budget"
            )
        self.stage, self.seed = replace(config.stage, steps=steps), config.seed
        self.model = Transformer(config.model)
        initialise(self.model, config.seed)
        self.model.to(device)
        self.model.document_mask = config.stage.document_mask
        self.model.chunk_bytes = config.parallel.loss_chunk_mib << 20
        self.optimizer = build_optimizer(self.model, self.stage, self.stage.muon)
        self.objective = training_stage(config.stage.name).objective(config)
        self.flops_per_token = float(flops_per_token(config.model, config.stage.seq_len))
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, number: int, micro_batches: Sequence[Batch]) -> None:
        """See `Learner`."""
        set_learning_rate(self.optimizer, stage_rate(self.stage, number))
        set_momentum(self.optimizer, muon_momentum(self.stage, number))
        self.model.dropout = DropoutKey(self.stage.dropout, self.seed, number) if self.stage.dropout else None
        sums = accumulate_gradients(self.model, self.objective, micro_batches)
        self.model.dropout = None
        result = update(
            self.model, self.optimizer, sums, grad_clip=self.stage.grad_clip, counts=True, stop=StopRequest()
        )
        if not result.applied:
            raise UserError(f"step {number + 1}: the gradients are not finite; lower stage.lr={self.stage.lr}")

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """See `Learner`."""
        return self.model.token_losses(batch)
