"""PPO of others on the toy of `bench rlhf`, with models of the same shape: policy, critic, reference, reward model.

Dimensions: B completions, P tokens of a prompt, T new tokens, V vocabulary.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch

from dist_lm.bench.rlhf_toy import EPOCHS, ITERATIONS, KL_COEFFICIENT, RATE
from dist_lm.config.root import Config
from dist_lm.interop.gpt_neox import save_gpt_neox
from dist_lm.model.initialise import initialise
from dist_lm.model.transformer import Transformer

GAMMA, LAM, CLIP = 1.0, 0.95, 0.2
END, PAD = 0, 1


class Peer(ABC):
    """Another PPO."""

    packages: ClassVar[Sequence[str]]

    @abstractmethod
    def __init__(self, config: Config, prompt_BP: torch.Tensor) -> None:
        """Make the models and all else that is not timed."""

    @abstractmethod
    def run(self) -> float:
        """`ITERATIONS` iterations."""


class Trl(Peer):
    """`PPOTrainer` of TRL, which has it among its experiments up to 1.12."""

    packages: ClassVar[Sequence[str]] = ("trl", "accelerate", "transformers")

    def __init__(self, config: Config, prompt_BP: torch.Tensor) -> None:
        ppo = import_module("trl.experimental.ppo")
        datasets, batch = import_module("datasets"), config.stage.global_batch
        self._folder = tempfile.TemporaryDirectory(prefix="dlm-bench-")
        arguments = ppo.PPOConfig(
            output_dir=self._folder.name,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=EPOCHS,
            total_episodes=ITERATIONS * batch,
            response_length=config.stage.seq_len,
            local_rollout_forward_batch_size=batch,
            num_sample_generations=0,
            temperature=1.0,
            kl_coef=KL_COEFFICIENT,
            learning_rate=RATE,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        prompts = datasets.Dataset.from_dict({"input_ids": prompt_BP.tolist()})
        policy, reference = (_causal(config) for _ in range(2))
        value, reward = (_scored(config) for _ in range(2))
        self._trainer = ppo.PPOTrainer(
            args=arguments,
            processing_class=_tokenizer(config),
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=prompts,
            eval_dataset=prompts,
        )

    def run(self) -> float:
        self._trainer.train()
        return 0.0


class BareLoop(Peer):
    """PPO in the fewest lines over `generate` of transformers: what a person writes who needs nothing else."""

    packages: ClassVar[Sequence[str]] = ("transformers",)

    def __init__(self, config: Config, prompt_BP: torch.Tensor) -> None:
        self._prompt_BP, self._new = prompt_BP, config.stage.seq_len
        self._policy, self._reference = (_causal(config) for _ in range(2))
        self._critic, self._reward = (_scored(config) for _ in range(2))
        for model in (self._policy, self._reference, self._critic, self._reward):
            model.eval()  # no dropout
        parameters = [*self._policy.parameters(), *self._critic.parameters()]
        self._optimizer = torch.optim.AdamW(parameters, lr=RATE, eps=1e-5, fused=True)

    def run(self) -> float:
        return [self._iteration() for _ in range(ITERATIONS)][-1]

    def _iteration(self) -> float:
        with torch.no_grad():
            token_BN = self._policy.generate(
                self._prompt_BP,
                attention_mask=torch.ones_like(self._prompt_BP),
                max_new_tokens=self._new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=None,
                pad_token_id=PAD,
            )
            old_BT, reference_BT = (self._logprobs(model, token_BN) for model in (self._policy, self._reference))
            value_BT = self._values(self._critic, token_BN)
            reward_BT = -KL_COEFFICIENT * (old_BT - reference_BT)
            reward_BT[:, -1] += self._scores(self._reward, token_BN)[:, -1]
            advantage_BT = self._advantages(reward_BT, value_BT)
            return_BT = advantage_BT + value_BT
            advantage_BT = (advantage_BT - advantage_BT.mean()) / (advantage_BT.std() + 1e-8)
        for _ in range(EPOCHS):
            ratio_BT = (self._logprobs(self._policy, token_BN) - old_BT).exp()
            held_BT = ratio_BT.clamp(1 - CLIP, 1 + CLIP)
            policy_loss = -torch.minimum(ratio_BT * advantage_BT, held_BT * advantage_BT).mean()
            now_BT = self._values(self._critic, token_BN)
            near_BT = value_BT + (now_BT - value_BT).clamp(-CLIP, CLIP)
            errors_BT = torch.maximum((now_BT - return_BT).square(), (near_BT - return_BT).square())
            (policy_loss + errors_BT.mean() / 2).backward()
            torch.nn.utils.clip_grad_norm_(self._policy.parameters(), 1.0)
            torch.nn.utils.clip_grad_norm_(self._critic.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return float(reward_BT.sum(1).mean())

    def _logprobs(self, model: Any, token_BN: torch.Tensor) -> torch.Tensor:
        logits_BTV = model(token_BN).logits[:, -self._new - 1 : -1]
        token_BT1 = token_BN[:, -self._new :, None]
        return logits_BTV.log_softmax(-1).gather(2, token_BT1)[..., 0]

    def _scores(self, model: Any, token_BN: torch.Tensor) -> torch.Tensor:
        return model.score(model.gpt_neox(token_BN).last_hidden_state)[..., 0]

    def _values(self, model: Any, token_BN: torch.Tensor) -> torch.Tensor:
        return self._scores(model, token_BN)[:, -self._new - 1 : -1]

    @staticmethod
    def _advantages(reward_BT: torch.Tensor, value_BT: torch.Tensor) -> torch.Tensor:
        last = torch.zeros_like(reward_BT[:, 0])
        found = []
        for t in reversed(range(reward_BT.shape[1])):
            following = value_BT[:, t + 1] if t + 1 < reward_BT.shape[1] else 0.0
            last = reward_BT[:, t] + GAMMA * following - value_BT[:, t] + GAMMA * LAM * last
            found.append(last)
        return torch.stack(found[::-1], dim=1)


def _folder(config: Config, into: Path) -> None:
    model = Transformer(config.model)
    initialise(model, config.seed)
    save_gpt_neox(dict(model.named_parameters()), config.model, into, eot_id=END, pad_id=PAD)


def _causal(config: Config) -> Any:
    transformers = import_module("transformers")
    with tempfile.TemporaryDirectory(prefix="dlm-bench-") as folder:
        _folder(config, Path(folder))
        return transformers.AutoModelForCausalLM.from_pretrained(folder)


def _scored(config: Config) -> Any:
    transformers = import_module("transformers")
    with tempfile.TemporaryDirectory(prefix="dlm-bench-") as folder:
        _folder(config, Path(folder))
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)


def _tokenizer(config: Config) -> Any:
    """A word a token: TRL wants a tokenizer to pad with."""
    transformers, tokenizers = import_module("transformers"), import_module("tokenizers")
    words = {f"t{number}": number for number in range(config.model.vocab_size)}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=f"t{END}"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token=f"t{END}", pad_token=f"t{PAD}")
