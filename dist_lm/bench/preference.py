"""A training step of DPO on pairs: a tree for each prompt with both completions, against TRL's `DPOTrainer`.

All variants train the same model on the same pairs by the same loss (the first steps are compared). Without the tree a
prompt is read once for each completion. TRL computes the reference in every step by default; the second peer is TRL
with the log-probabilities of the reference computed beforehand, as ours are. The loop, the logging and the data loader
of its trainer are not timed. Ceiling: next-token training on as many tokens as the trees have, causal, with logits of
the completions only. Speed is in pairs per second.

Dimensions: B prompts (and sequences of the tree), T tokens.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch

from dist_lm.bench.case import Case, GroupSize, against, configurations, why_absent
from dist_lm.bench.models import in_transformers, initial_model, peer_optimizer, word_tokenizer
from dist_lm.bench.rank import OwnTraining, Trial
from dist_lm.config.root import Config
from dist_lm.data.batch import RankedPositions
from dist_lm.data.rankings.completions import CompletionBatch, batch_of_trees
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.rlhf.preference import PreferenceLoss
from dist_lm.rlhf.preference_objective import preference_objective, segment_logprobs
from dist_lm.stages.preference.config import settings_of

TREE, PLAIN = "our step on trees", "as many tokens, next-token loss"
TRL, TRL_KNOWN = "TRL", "TRL, reference known"
PACKAGES = ("trl", "accelerate", "transformers")
PROMPT_SHARE = 0.5  # share of the prompt in the tree
PAIRS = "pairs/s"
END, PAD = "</s>", "<pad>"  # pieces of the tokenizer that TRL asks for
NANO = (
    *("stage=preference", "stage.preference.learn_from=pairs", "model=nano", "stage.weight_decay=0"),
    *("stage.global_batch=4", "stage.seq_len=512", "stage.lr=1e-4"),
)
SHAPES = (NANO, (*NANO, "stage.global_batch=2", "stage.seq_len=1024"))
ROUNDS = 9
THREADS = 1


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns cases of prompts that fill half of stage.seq_len, with two completions each, for SHAPES (`quick`: the
    first) or for `overrides`.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    return [_case(config) for config in configurations(SHAPES, overrides, quick)]


def _case(config: Config) -> Case:
    """Returns the case of one configuration; TRL is only named if its packages are not installed."""
    why_not = why_absent(PACKAGES)
    prompt, completion = tokens_of(config)
    peers = [] if why_not else [TRL, TRL_KNOWN]

    return Case(
        name=f"DPO, {config.model.name}, {config.stage.global_batch} prompts of {prompt}, "
        f"2 completions of {completion}",
        config=config,
        variants=dict.fromkeys([TREE, *peers, PLAIN], GroupSize(1, THREADS)),
        comparisons=[against(TREE, peer, why_not, PLAIN) for peer in (TRL, TRL_KNOWN)],
        same_losses=frozenset({TREE, *peers}),
        rounds=ROUNDS,
        amount=config.stage.global_batch,
        unit=PAIRS,
    )


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds one variant, in one process.

    Raises:
        ConfigError: no architecture of transformers holds the model (for TRL).
    """
    model = initial_model(config).to(world.device)
    # The reference does not change, so its log-probabilities are computed once, as our stage does it.
    batch = batch_of(config).to(world.device)
    with torch.no_grad():
        reference_C = segment_logprobs(model, batch)[: len(batch.prompt_C)]

    if variant in (TRL, TRL_KNOWN):
        known_C = reference_C if variant == TRL_KNOWN else None
        return Trial(TrlStep(model, config, known_C, world.device))

    # Without the mask of the tree, attention is causal over the row: that is the ceiling.
    training = OwnTraining(model, config, slice(None), world)
    model.document_mask = variant == TREE
    if variant == TREE:
        training.objective = preference_objective(PreferenceLoss(settings_of(config)))
        training.batches = [replace(batch, reference_C=reference_C)]
    else:
        training.batches = [replace(batch, branch_BT=None)]
    return Trial(training.step)


def tokens_of(config: Config) -> tuple[int, int]:
    """Returns (tokens of a prompt, tokens of each completion)."""
    completion = round(config.stage.seq_len * (1 - PROMPT_SHARE) / 2)
    # A row has one token more than positions that predict one.
    return config.stage.seq_len + 1 - 2 * completion, completion


def made_up_tokens(config: Config) -> np.ndarray:
    """Returns prompt and two completions of each pair, one after the other, int64 (B, T + 1)."""
    rng = np.random.default_rng(config.seed)
    return rng.integers(2, config.model.vocab_size, (config.stage.global_batch, config.stage.seq_len + 1))


def batch_of(config: Config) -> CompletionBatch:
    """Returns the pairs with a tree in each row, on the CPU, the same at every call; the first completion of a pair is
    the better one. It has no log-probabilities of a reference yet."""
    prompt, completion = tokens_of(config)
    branch = np.repeat([0, 1, 2], [prompt, completion, completion])
    rows = [[(tokens, branch)] for tokens in made_up_tokens(config)]
    batch = batch_of_trees(rows, range(len(rows)), config.stage.seq_len, pad_id=0, learns_prompts=False)
    none = torch.zeros(0, 2, dtype=torch.int64)
    first = torch.arange(0, 2 * len(rows), 2)
    return replace(batch, ranked=RankedPositions(none, none, none.bool(), first, first + 1, torch.zeros(len(rows))))


class TrlStep:
    """Takes a step of `DPOTrainer`: its loss, backward pass, clipping, AdamW."""

    def __init__(
        self, model: Transformer, config: Config, reference_C: torch.Tensor | None, device: torch.device
    ) -> None:
        """Builds the trainer; `reference_C`: log-probabilities of the reference, or None to compute them each step.

        Raises:
            ConfigError: no architecture of transformers holds the model.
        """
        trl, datasets = import_module("trl"), import_module("datasets")
        self._folder = tempfile.TemporaryDirectory(prefix="dlm-bench-")
        arguments = trl.DPOConfig(
            output_dir=self._folder.name,
            beta=settings_of(config).strength,
            per_device_train_batch_size=config.stage.global_batch,
            max_length=None,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=device.type == "cpu",
            bf16=False,
        )
        # The trainer insists on a data set, though its collator is called directly below.
        unused_dataset = datasets.Dataset.from_dict({"prompt": ["w2"], "chosen": [" w2"], "rejected": [" w3"]})
        words = [END, PAD, *(f"w{number}" for number in range(2, config.model.vocab_size))]
        trainer: Any = trl.DPOTrainer(
            model=in_transformers(model),
            ref_model=in_transformers(model),
            args=arguments,
            processing_class=word_tokenizer(words),
            train_dataset=unused_dataset,
        )

        prompt, completion = tokens_of(config)
        inputs = trainer.data_collator(
            [
                {"prompt_ids": row[:prompt], "chosen_ids": row[prompt:-completion], "rejected_ids": row[-completion:]}
                for row in made_up_tokens(config).tolist()
            ]
        )
        if reference_C is not None:
            trainer.precompute_ref_logps = True
            inputs |= {"ref_chosen_logps": reference_C[0::2].cpu(), "ref_rejected_logps": reference_C[1::2].cpu()}
        self._inputs = {name: tensor.to(device) for name, tensor in inputs.items()}

        self._trainer, self._model = trainer, trainer.model.train()
        self._clip = config.stage.grad_clip
        # `DPOTrainer.train` is not called, so the step needs an optimizer of its own.
        self._optimizer = peer_optimizer(self._model.parameters(), config.stage)

    def __call__(self) -> float:
        """Takes one step; returns its loss."""
        loss = self._trainer.compute_loss(self._model, self._inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
