"""Learners of other libraries for `dist-lm bench learn`: their model, optimizer and schedule on our stream.

GPT-NeoX of Hugging Face with torch's AdamW and our schedule, and nanochat's model with its own optimizer and schedule,
run from a checkout of it. Both attend over the whole sequence.

Dimensions: B sequences, T tokens, V vocabulary.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses

from dist_lm.bench.learn import Learner, Recipe
from dist_lm.config.root import Config
from dist_lm.data.batch import Batch
from dist_lm.errors import ConfigError
from dist_lm.interop.architectures import Architecture, architecture_of, hf_config
from dist_lm.launcher.compose import compose_config
from dist_lm.training.optimizer import stage_rate

NEOX, NANOCHAT = "neox", "nanochat"
# scripts/base_train.py of nanochat, which cannot be imported
WARM_UP_STEPS, WARM_DOWN, FINAL_RATE = 40, 0.65, 0.05
MOMENTUM_STEPS, MOMENTA = 400, (0.85, 0.97, 0.90)


def peer_recipe(name: str, words: Sequence[str], base: Sequence[str]) -> Recipe:
    """A peer as a recipe.

    Args:
        name: neox | nanochat.
        words: overrides for the peer alone; of nanochat the path of a checkout first.
        base: the overrides of all recipes.

    Raises:
        ConfigError: an unknown or missing peer.
    """
    if name not in (NEOX, NANOCHAT):
        raise ConfigError(f"--peer={name}: expected {NEOX} or {NANOCHAT}")
    if name == NEOX:
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError(f"--peer={NEOX}: transformers is not installed; install the extra hf, or leave it out")
        config = compose_config([*base, *words])
        found = architecture_of(config.model)
        if not isinstance(found, Architecture) or found.family != "GPTNeoX":
            raise ConfigError(f"--peer={NEOX}: the model is {getattr(found, 'family', found)}; expected GPT-NeoX")
        return Recipe("GPT-NeoX of transformers", config, NeoxLearner)
    checkout = Path(words[0]) if words else None
    if checkout is None or not (checkout / "nanochat" / "gpt.py").is_file():
        raise ConfigError(f"--peer=nanochat: {checkout}: expected the path of a checkout of nanochat")
    rates = {key: float(value) for key, _, value in (word.partition("=") for word in words[1:]) if "." not in key}
    shape = [word for word in words[1:] if "." in word.partition("=")[0]]
    return Recipe(NANOCHAT, compose_config([*base, *shape]), partial(nanochat_learner, checkout, rates))


class _Peer:
    """Micro-batches, clipping and losses; a subclass has model, optimizer and rates."""

    model: Any  # a module
    grad_clip: float

    def step(self, number: int, micro_batches: Sequence[Batch]) -> None:
        """See `Learner`."""
        count = sum(batch.targets_BT.numel() for batch in micro_batches)
        for batch in micro_batches:
            (self.token_losses(batch).sum() / count).backward()
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.update(number)

    def token_losses(self, batch: Batch) -> torch.Tensor:
        """See `Learner`."""
        raise NotImplementedError

    def update(self, number: int) -> None:
        """Set the rates of this step, and step."""
        raise NotImplementedError

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


class NeoxLearner(_Peer):
    """GPTNeoXForCausalLM with its own initial values, and torch's AdamW: decay on matrices, one rate, our schedule."""

    def __init__(self, config: Config, steps: int, device: torch.device) -> None:
        transformers = importlib.import_module("transformers")
        from dist_lm.model.size import flops_per_token

        found = architecture_of(config.model)
        assert isinstance(found, Architecture)
        torch.manual_seed(config.seed)
        settings = hf_config(config.model, found, "float32")
        self.model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**settings)).to(device)
        self.stage = stage = replace(config.stage, steps=steps)
        matrices = [one for one in self.model.parameters() if one.dim() > 1]
        vectors = [one for one in self.model.parameters() if one.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": stage.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=stage.lr,
            betas=(stage.beta1, stage.beta2),
            eps=stage.adam_eps,
            fused=True,
        )
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


def nanochat_learner(
    checkout: Path, rates: dict[str, float], config: Config, steps: int, device: torch.device
) -> Learner:
    """nanochat's model of the same width, depth, heads and vocabulary, with full attention in every layer.

    Args:
        rates: arguments of its `setup_optimizer`; none: its defaults.
    """
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return NanochatLearner(importlib.import_module("nanochat.gpt"), rates, config, steps, device)


class NanochatLearner(_Peer):
    """GPT of nanochat with MuonAdamW and the schedule of its scripts/base_train.py."""

    grad_clip = 0.0

    def __init__(self, module: Any, rates: dict[str, float], config: Config, steps: int, device: torch.device) -> None:
        shape, self.steps = config.model, steps
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
        """Rate of a 0-based step as a multiple of the peak."""
        down = round(WARM_DOWN * self.steps)
        if number < WARM_UP_STEPS:
            return (number + 1) / WARM_UP_STEPS
        if number <= self.steps - down:
            return 1.0
        left = (self.steps - number) / down
        return left + (1 - left) * FINAL_RATE

    def momentum(self, number: int) -> float:
        """Momentum of Muon at a 0-based step."""
        low, peak, end = MOMENTA
        down = round(WARM_DOWN * self.steps)
        if number < MOMENTUM_STEPS:
            return low + number / MOMENTUM_STEPS * (peak - low)
        if number < self.steps - down:
            return peak
        return peak + (number - self.steps + down) / down * (end - peak)
