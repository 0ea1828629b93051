"""The rows of `dist-lm bench learn`: our learner, and the recipes that a command line names.

Dimensions: B sequences, T tokens.
"""

import shlex
from collections.abc import Sequence
from dataclasses import replace

import torch

from dist_lm.bench.learner import Recipe
from dist_lm.bench.models import initial_model
from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.errors import ConfigError, UserError
from dist_lm.model.keyed_random import DropoutKey
from dist_lm.model.size import flops_per_token
from dist_lm.prepare.compose import compose_config, target_stage
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
# No peer keeps attention inside a document, and positions that start again belong to that mask.
BASE = (*ALONE, "stage.document_mask=false", "stage.reset_positions=false")


def recipes_of(
    overrides: Sequence[str], named: Sequence[str], peers: Sequence[str], defaults: Sequence[str] = BASE
) -> list[Recipe]:
    """Returns the recipe of `overrides` alone, then the named ones, then the peers.

    All begin with the same overrides: stage=code and model=nano if `overrides` names no stage, then `defaults`, then
    `overrides`.

    Args:
        named: `NAME: KEY=VALUE ...` of each further recipe of ours.
        peers: `NAME: WORDS` of each peer, see `peer_recipe`.
        defaults: overrides of the benchmark.

    Raises:
        ConfigError: a recipe without a name or with that of another one, an unknown peer, overrides that cannot be
            composed, a stage that does not learn the next token, a setting that no learner has.
        ArtefactError, UserError: as `compose_config`.
    """
    names_stage = any(override.startswith("stage=") for override in overrides)
    default_stage = [] if names_stage else ["stage=code", "model=nano"]
    base = [*default_stage, *defaults, *overrides]

    recipes = [_own_recipe("as configured", base)]
    for text in named:
        name, words = _split_name(text, "--recipe")
        recipes.append(_own_recipe(name, [*base, *words]))
    if peers:
        # Only comparisons with peers import transformers or a checkout of nanochat.
        from dist_lm.bench.learn_peers import peer_recipe

        recipes += [peer_recipe(*_split_name(text, "--peer"), base) for text in peers]

    # Rows of the table and lines of the drawing are told apart by name.
    names = [recipe.name for recipe in recipes]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--recipe or --peer {duplicates.pop()}: the name is taken; expected a name of its own")
    for recipe in recipes:
        _check(recipe, recipes[0].config.seed)
    return recipes


def _own_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """Returns a recipe of ours, of our learner with the composed configuration.

    Raises:
        ConfigError: the stage has no next-token loss, or as `compose_config`.
        ArtefactError, UserError: as `compose_config`.
    """
    # Before composing, since the defaults have keys that only stages with this loss know.
    _require_text_stage(name, target_stage(overrides))
    return Recipe(name, compose_config(overrides), OwnLearner)


def _require_text_stage(recipe_name: str, stage_name: str) -> TextStage:
    """Returns the stage; raises ConfigError, which names the recipe, if it does not train on next-token loss."""
    stage = stage_named(stage_name)
    if not isinstance(stage, TextStage):
        raise ConfigError(
            f"{recipe_name}: stage={stage_name}: the loss of the next token is measured: expected a stage that trains "
            "on it, such as language or code"
        )
    return stage


def _check(recipe: Recipe, seed: int) -> None:
    """Refuses settings that a learner would not follow, since a row must show what its configuration says: another
    seed, averages, adapters, a start from a checkpoint, and what the stage itself refuses.

    Args:
        seed: the seed that all recipes must have, that of the first.

    Raises:
        ConfigError: names the recipe and the key, or the stage does not learn the next token.
    """
    stage, name = recipe.config.stage, recipe.name
    _require_text_stage(name, stage.name).check(recipe.config)

    for key, setting, expected in (
        ("seed", recipe.config.seed, seed),
        ("stage.ema_decay", stage.ema_decay, 0.0),
        ("stage.lora.rank", stage.lora.rank, 0),
        ("stage.init_from", stage.init_from, "none"),
        ("stage.branch_from", stage.branch_from, ""),
    ):
        if setting != expected:
            raise ConfigError(
                f"{name}: {key}={setting}: all recipes have the same seeds, begin with initial weights, and train and "
                f"measure all of them: expected {key}={expected}"
            )


def _split_name(text: str, option: str) -> tuple[str, list[str]]:
    """Returns the name and the words of `NAME: WORD WORD ...`, split as a shell would; there may be no words.

    Raises:
        ConfigError: names `option`; the name or the colon is missing, or a quotation does not end.
    """
    name, colon, rest = text.partition(":")
    if not name.strip() or not colon:
        raise ConfigError(f"{option}={text}: expected NAME: KEY=VALUE ...")
    try:
        return name.strip(), shlex.split(rest)
    except ValueError as error:
        # A quotation does not end.
        raise ConfigError(f"{option}={text}: {error}") from error


class OwnLearner:
    """Our model, optimizer and schedule, as a run has them."""

    def __init__(self, config: Config, steps: int, device: torch.device) -> None:
        """Builds the model with its initial weights on `device`, and the optimizer.

        Args:
            steps: steps of this training; they replace stage.steps.

        Raises:
            ConfigError: the warm-up takes all steps.
        """
        if steps <= config.stage.warmup_steps:
            raise ConfigError(
                f"stage.warmup_steps={config.stage.warmup_steps}: training has {steps} steps; expected fewer steps of "
                "warm-up, or a larger budget"
            )
        self.stage = replace(config.stage, steps=steps)
        self.seed = config.seed

        self.model = initial_model(config).to(device)
        self.model.document_mask = config.stage.document_mask
        self.model.chunk_bytes = config.parallel.loss_chunk_mib << 20

        self.optimizer = build_optimizer(self.model, self.stage, self.stage.muon)
        self.objective = training_stage(config.stage.name).objective(config)
        self.flops_per_token = float(flops_per_token(config.model, config.stage.seq_len))
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def step(self, number: int, micro_batches: Sequence[Batch]) -> None:
        """Takes the step of this 0-based number (sums over the process group), with the rates of the schedule.

        Raises:
            UserError: the gradients are not finite; names the step. The weights have not changed then.
        """
        set_learning_rate(self.optimizer, stage_rate(self.stage, number))
        set_momentum(self.optimizer, muon_momentum(self.stage, number))

        if self.stage.dropout:
            self.model.dropout = DropoutKey(self.stage.dropout, self.seed, number)
        sums = accumulate_gradients(self.model, self.objective, micro_batches)
        self.model.dropout = None
        step = update(
            self.model, self.optimizer, sums, grad_clip=self.stage.grad_clip, adds_sums=True, stop=StopRequest()
        )
        if not step.applied:
            raise UserError(f"step {number + 1}: the gradients are not finite; lower stage.lr={self.stage.lr}")

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """See `Learner`."""
        return self.model.token_losses(batch)
