"""GRPO on the toy of `bench rlhf`: our learner and TRL's trainer, with a reward function and no reference model.

Each iteration draws a group of `GROUP` completions for each of its prompts. Both loops divide the loss by completions,
clip alike and sample alike.
"""

import tempfile
from collections.abc import Sequence
from importlib import import_module
from typing import ClassVar

import torch

from dist_lm.bench.models import word_tokenizer
from dist_lm.bench.rlhf_loops import CLIP, ITERATIONS, RATE, Peer, causal, trl_settings, words_of
from dist_lm.config.root import Config
from dist_lm.rlhf.config import RewardPartConfig, RlhfConfig

GROUP = 8


def share_of_low_tokens(prompt: str, completion: str) -> float:
    """Returns the share of the completion's words below t21; 0 for no words."""
    words = completion.split()
    return sum(int(word[1:]) < 21 for word in words) / max(1, len(words))


def grpo_config(config: Config, epochs: int) -> RlhfConfig:
    """Configures GRPO as TRL runs it by default: `stage.global_batch` completions of one length, `epochs` passes.

    Raises:
        ConfigError: settings of the stage that rlhf does not accept, such as a batch below GROUP.
    """
    return RlhfConfig(
        algorithm="grpo",
        prompts=config.stage.global_batch // GROUP,
        samples=GROUP,
        max_new_tokens=config.stage.seq_len,
        ignore_eot=True,
        epochs=epochs,
        lr=RATE,
        clip=CLIP,
        kl_coefficient=0.0,
        importance_cap=0.0,
        rewards={"low": RewardPartConfig(kind="function", function=f"{__name__}:share_of_low_tokens")},
    )


class TrlGrpo(Peer):
    """Runs `GRPOTrainer` of TRL."""

    packages: ClassVar[Sequence[str]] = ("trl", "accelerate", "transformers", "datasets")

    def __init__(self, config: Config, prompt_BP: torch.Tensor, epochs: int) -> None:
        trl, datasets = import_module("trl"), import_module("datasets")
        self._folder = tempfile.TemporaryDirectory(prefix="dlm-bench-")
        arguments = trl.GRPOConfig(
            num_generations=GROUP,
            num_iterations=epochs,
            max_steps=ITERATIONS * epochs,
            max_completion_length=config.stage.seq_len,
            generation_kwargs={"min_new_tokens": config.stage.seq_len},
            loss_type="grpo",
            epsilon=CLIP,
            beta=0.0,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            **trl_settings(config, self._folder.name),
        )

        def reward(prompts: Sequence[str], completions: Sequence[str], **rest: object) -> list[float]:
            return [share_of_low_tokens(*texts) for texts in zip(prompts, completions, strict=True)]

        self._trainer = trl.GRPOTrainer(
            model=causal(config),
            reward_funcs=reward,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": [words_of(row) for row in prompt_BP.tolist()]}),
            processing_class=word_tokenizer(words_of(range(config.model.vocab_size)).split()),
        )

    def run(self) -> float:
        self._trainer.train()
        return 0.0
