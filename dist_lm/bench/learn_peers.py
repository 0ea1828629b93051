"""Learners of other libraries for `dist-lm bench learn`: their model, optimizer and schedule on our stream.

One is GPT-NeoX of Hugging Face with torch's AdamW and our schedule. The other is nanochat's model with the default
rates of its `setup_optimizer` and the schedule of its scripts/base_train.py, run from a checkout. Both attend over the
whole sequence.

Dimensions: B sequences, T tokens, V vocabulary.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.bench.learner import Recipe
from dist_lm.bench.models import neox_of, peer_optimizer
from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.errors import ConfigError
from dist_lm.interop.architectures import hf_config
from dist_lm.prepare.compose import compose_config
from dist_lm.training.optimizer import stage_rate

NEOX, NANOCHAT = "neox", "nanochat"
NAMES = {NEOX: "GPT-NeoX of transformers", NANOCHAT: NANOCHAT}
NEOX_INIT = "model.init_std=0.02"  # the default of GPTNeoXConfig
# Constants of nanochat's scripts/base_train.py, which is a script and cannot be imported.
WARM_UP_STEPS, WARM_DOWN, FINAL_RATE = 40, 0.65, 0.05
MOMENTUM_STEPS, MOMENTA = 400, (0.85, 0.97, 0.90)


def peer_recipe(name: str, words: Sequence[str], base: Sequence[str]) -> Recipe:
    """Returns a peer as a recipe. For nanochat its module is imported, see `_nanochat`.

    Args:
        name: neox or nanochat, then more words that name its row.
        words: overrides for this peer alone. For nanochat the first word is the path of a checkout; arguments of its
            `setup_optimizer`, and `warmup_steps`, may follow.
        base: the overrides of all recipes.

    Raises:
        ConfigError: the peer is unknown or not there, or does not know a word.
        ArtefactError, UserError: as `compose_config`.
        OSError: a file cannot be read.
    """
    kind = name.split()[0]
    if kind not in NAMES:
        raise ConfigError(f"--peer={name}: expected {NEOX} or {NANOCHAT}, and more words to name the row")
    row = NAMES[kind] if name == kind else name

    if kind == NEOX:
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError(f"--peer={name}: transformers is not installed; install the extra hf, or leave it out")
        config = compose_config([*base, NEOX_INIT, *words])
        neox_of(config.model, f"--peer={name}")
        return Recipe(row, config, NeoxLearner)

    checkout = Path(words[0]).resolve() if words else None
    if checkout is None or not (checkout / "nanochat" / "gpt.py").is_file():
        raise ConfigError(f"--peer={name}: {checkout}: expected the path of a checkout of nanochat")
    module = _nanochat(name, checkout)
    # A key with a dot is ours; any other belongs to nanochat's optimizer.
    overrides = [word for word in words[1:] if "." in word.partition("=")[0]]
    numbers = _numbers(name, [word for word in words[1:] if word not in overrides], module)
    return Recipe(row, compose_config([*base, *overrides]), partial(NanochatLearner, module, numbers))


def _nanochat(name: str, checkout: Path) -> Any:
    """Imports and returns the module nanochat.gpt of a checkout, whose folder becomes the first of `sys.path`.

    Raises:
        ConfigError: the module cannot be imported, or one of another checkout was imported before.
    """
    # A checkout is no installed package.
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        module = importlib.import_module("nanochat.gpt")
    except ImportError as error:
        raise ConfigError(f"--peer={name}: nanochat.gpt of {checkout} cannot be imported: {error}") from error
    if not Path(str(module.__file__)).is_relative_to(checkout):
        raise ConfigError(f"--peer={name}: {module.__file__} is loaded already: expected one checkout for all peers")
    return module


def _numbers(name: str, words: Sequence[str], module: Any) -> dict[str, float]:
    """Returns arguments of `setup_optimizer`, and `warmup_steps`, by name, from words KEY=NUMBER; the last of a key
    counts.

    Raises:
        ConfigError: a word is not KEY=NUMBER, or the key is unknown.
    """
    accepted = [*list(inspect.signature(module.GPT.setup_optimizer).parameters)[1:], "warmup_steps"]
    numbers = {}
    for word in words:
        key, _, number = word.partition("=")
        try:
            numbers[key] = float(number)
        except ValueError as error:
            raise ConfigError(f"--peer={name}: {word}: expected KEY=NUMBER") from error
        if key not in accepted:
            keys = ", ".join(accepted)
            raise ConfigError(f"--peer={name}: {word}: expected one of {keys}, or a key such as model.d_ff")
    return numbers


class _Peer:
    """The step of a peer: micro-batches, clipping and losses. A subclass has model, optimizer and rates."""

    model: Any  # torch.nn.Module
    grad_clip: float

    def step(self, number: int, micro_batches: Sequence[Batch]) -> None:
        """See `Learner`."""
        # The loss is a mean over all micro-batches, so each is divided by the count of all.
        count = sum(batch.loss_mask_BT.sum() for batch in micro_batches)
        for batch in micro_batches:
            ((self.token_losses(batch) * batch.loss_mask_BT).sum() / count).backward()
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.update(number)

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """See `Learner`."""
        raise NotImplementedError

    def update(self, number: int) -> None:
        """Sets the rates of this 0-based step and takes an optimizer step."""
        raise NotImplementedError

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


class NeoxLearner(_Peer):
    """GPTNeoXForCausalLM with its own initial values, and torch's AdamW: decay on matrices, one rate, our schedule."""

    def __init__(self, config: Config, steps: int, device: torch.device) -> None:
        transformers = importlib.import_module("transformers")
        from dist_lm.model.size import flops_per_token

        torch.manual_seed(config.seed)
        settings = hf_config(config.model, neox_of(config.model, NEOX), "float32")
        self.model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**settings)).to(device)

        self.stage = stage = replace(config.stage, steps=steps)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": stage.weight_decay}, {"params": vectors}]
        self.optimizer = peer_optimizer(groups, stage)
        self.grad_clip = stage.grad_clip
        self.flops_per_token = float(flops_per_token(config.model, stage.seq_len))

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """See `Learner`."""
        logits_BTV = self.model(input_ids=batch.tokens_BT, use_cache=False).logits.float()
        return F.cross_entropy(logits_BTV.transpose(1, 2), batch.targets_BT, reduction="none")

    def update(self, number: int) -> None:
        """See `_Peer`."""
        for group in self.optimizer.param_groups:
            group["lr"] = stage_rate(self.stage, number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class NanochatLearner(_Peer):
    """GPT of nanochat with MuonAdamW: our width, depth, heads and vocabulary, and full attention in every layer.

    It has the default rates of its `setup_optimizer` and the schedule of its scripts/base_train.py, with 40 steps of
    warm-up; `numbers` holds arguments of `setup_optimizer`, and `warmup_steps`, in place of the defaults.
    """

    grad_clip = 0.0

    def __init__(
        self, module: Any, numbers: Mapping[str, float], config: Config, steps: int, device: torch.device
    ) -> None:
        shape = config.model
        self.steps = steps
        rates = dict(numbers)
        self.warm_up = rates.pop("warmup_steps", WARM_UP_STEPS)

        torch.manual_seed(config.seed)
        self.model = module.GPT(
            module.GPTConfig(
                sequence_len=config.stage.seq_len,
                vocab_size=shape.vocab_size,
                n_layer=shape.n_layers,
                n_head=shape.n_heads,
                n_kv_head=shape.kv_heads,
                n_embd=shape.d_model,
                window_pattern="L",
            )
        )
        self.model.to(device).init_weights()

        self.optimizer = self.model.setup_optimizer(**rates)
        self.flops_per_token = float(self.model.estimate_flops())

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """See `Learner`."""
        losses_N = self.model(batch.tokens_BT, batch.targets_BT, loss_reduction="none")
        return losses_N.view(batch.targets_BT.shape)

    def update(self, number: int) -> None:
        """See `_Peer`."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.rate(number)
            if group["kind"] == "muon":
                group["momentum"] = self.momentum(number)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def rate(self, number: int) -> float:
        """Returns the rate of a 0-based step as a multiple of the peak (`get_lr_multiplier` of base_train.py)."""
        decay_steps = round(WARM_DOWN * self.steps)
        if number < self.warm_up:
            return (number + 1) / self.warm_up
        if number <= self.steps - decay_steps:
            return 1.0

        remaining = (self.steps - number) / decay_steps
        return remaining + (1 - remaining) * FINAL_RATE

    def momentum(self, number: int) -> float:
        """Returns the momentum of Muon at a 0-based step (`get_muon_momentum` of base_train.py)."""
        low, peak, end = MOMENTA
        decay_steps = round(WARM_DOWN * self.steps)
        if number < MOMENTUM_STEPS:
            return low + number / MOMENTUM_STEPS * (peak - low)
        if number < self.steps - decay_steps:
            return peak
        return peak + (number - self.steps + decay_steps) / decay_steps * (end - peak)
