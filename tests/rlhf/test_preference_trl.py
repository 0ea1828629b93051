"""Losses and gradients of DPO, IPO, KTO, ORPO and SimPO are those of TRL on the same model in transformers."""

from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dist_lm.config.preference import DPO, IPO, KTO, ORPO, SIMPO, PreferenceConfig
from dist_lm.data.rankings.completions import CompletionBatch, SplitReference, mismatched
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.interop.weights import to_theirs
from dist_lm.model.size import parameter_shapes
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.preference import PreferenceLoss
from dist_lm.rlhf.preference_objective import preference_objective, preparation
from tests.data.rankings.made_rankings import corpus_of, random_rankings
from tests.interop.hf_models import architecture, our_model, small, their_model
from tests.rlhf.made_pairs import WIDTH, batch_of, reference_under

pytest.importorskip("trl")
NEAR = 1e-6
SETTINGS = {
    "dpo": PreferenceConfig(algorithm=DPO, learn_from="pairs", beta=0.3),
    "ipo": PreferenceConfig(algorithm=IPO, beta=0.5),
    "kto": PreferenceConfig(algorithm=KTO, beta=0.3, desirable_weight=1.3, undesirable_weight=0.7),
    "orpo": PreferenceConfig(algorithm=ORPO, beta=0.25),
    "simpo": PreferenceConfig(algorithm=SIMPO, beta=2.0, gamma=0.5),
}


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> RankingCorpus:
    return corpus_of(tmp_path_factory.mktemp("rankings"), random_rankings(9, vocabulary=100))


@pytest.fixture(scope="module")
def models() -> tuple[Transformer, Transformer]:
    """Policy and reference."""
    policy, reference = (our_model(small("Llama", init_std=0.1)) for _ in range(2))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy, reference


@pytest.fixture(scope="module")
def reference(models: tuple[Transformer, Transformer], rankings: RankingCorpus) -> SplitReference:
    return reference_under(models[1], rankings)


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients(
    one_rank: None,
    models: tuple[Transformer, Transformer],
    rankings: RankingCorpus,
    reference: SplitReference,
    name: str,
) -> None:
    settings, (policy, frozen) = SETTINGS[name], models
    numbers = list(range(rankings.corpus.n_documents))
    batch = batch_of(rankings, numbers, settings, reference if settings.has_reference else None)
    policy.zero_grad()
    loss = PreferenceLoss(settings)
    prepare = preparation(loss)
    found = preference_objective(loss)(policy, (prepare(policy, [batch]) if prepare else [batch])[0])
    (found.total / found.count).backward()
    theirs = their_model(policy)
    expected, metrics = trl_loss(settings, theirs, their_model(frozen), rankings, numbers, batch)
    expected.backward()
    assert float((found.total / found.count).detach()) == pytest.approx(float(expected.detach()), abs=NEAR)
    ours = {key: value.grad for key, value in policy.named_parameters() if value.grad is not None}
    mapped = to_theirs(architecture(policy.config), parameter_shapes(policy.config), ours)
    gradients = {key: value.grad for key, value in theirs.named_parameters()}
    assert mapped.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 0.01
    for key, gradient in gradients.items():
        assert float((mapped[key] - gradient).abs().max()) < NEAR * max(largest, 1), key
    for own, their in (("margin", "margins"), ("chosen_reward", "chosen"), ("rejected_reward", "rejected")):
        if name != "ipo":  # TRL reports sums, its loss compares means
            value = float(found.metrics[f"train/{own}"] / found.count)
            assert value == pytest.approx(metrics[f"rewards/{their}"], abs=1e-5), own
    if name == "kto":
        assert float(found.metrics["train/kl"] / found.count) == pytest.approx(metrics["kl"], abs=1e-5)
        assert metrics["kl"] > 0
    elif name != "ipo":
        assert float(found.metrics["train/accuracy"] / found.count) == pytest.approx(metrics["rewards/accuracies"])


Sequences = list[tuple[list[int], list[int]]]  # prompt, completion


def trl_loss(
    settings: PreferenceConfig,
    model: Any,
    frozen: Any,
    rankings: RankingCorpus,
    numbers: Sequence[int],
    batch: CompletionBatch,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of TRL's trainer on the same pairs, and what it logs."""
    from accelerate import Accelerator
    from trl.trainer.utils import add_fused_lm_head

    parts = [
        (tokens[branch == 0].tolist(), tokens[branch == k].tolist())
        for number in numbers
        for tokens, branch in [(rankings.tokens(number), rankings.arrays(number).branch)]
        for k in range(1, int(branch.max()) + 1)
    ]
    assert batch.ranked is not None
    better = [parts[i] for i in batch.ranked.better_N.tolist()]
    worse = [parts[i] for i in batch.ranked.worse_N.tolist()]
    model.train()
    if settings.algorithm in (DPO, IPO, KTO):
        fields = ("log_probs", "entropy", "mean_logits", "is_top1")
        add_fused_lm_head(model, outputs=fields)
        add_fused_lm_head(frozen)
    common = {
        "beta": settings.strength,
        "model": model,
        "ref_model": frozen,
        "accelerator": Accelerator(cpu=True),
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "label_smoothing": 0.0,
        "is_encoder_decoder": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
    }
    if settings.algorithm in (DPO, IPO):
        from trl import DPOTrainer

        kind = "sigmoid" if settings.algorithm == DPO else "ipo"
        own = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "loss_types": [kind], "loss_weights": [1.0]}
        trainer = made(DPOTrainer, common | own | {"use_weighting": False})
        loss = trainer._compute_loss(model, padded([*better, *worse]), return_outputs=False)
    elif settings.algorithm == KTO:
        from trl import KTOTrainer

        weights = {key: getattr(settings, key) for key in ("desirable_weight", "undesirable_weight")}
        trainer = made(KTOTrainer, common | weights | {"calculate_KL": True, "loss_type": "kto"})
        labels = torch.tensor([True] * len(better) + [False] * len(worse))
        kl = [one for number in numbers for one in apart(*mismatched(rankings, number, WIDTH))]
        inputs = padded([*better, *worse]) | padded(kl, "KL_") | {"label": labels}
        loss = trainer._compute_loss(model, inputs, return_outputs=False)
    else:
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer

        own = {"alpha": 0.0, "cpo_alpha": 0.0, "loss_type": "simpo", "simpo_gamma": settings.gamma}
        values = common | own | {"padding_value": 0, "pad_token_id": 0}
        trainer = made(ORPOTrainer if settings.algorithm == ORPO else CPOTrainer, values)
        inputs = {}
        for side, pairs in (("chosen", better), ("rejected", worse)):
            both = padded(pairs)
            labels = both["input_ids"].masked_fill(both["completion_mask"] == 0, -100)
            inputs |= {f"{side}_input_ids": both["input_ids"], f"{side}_labels": labels}
            inputs[f"{side}_attention_mask"] = both["attention_mask"]
        return trainer.get_batch_loss_metrics(model, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def made(trainer: type, values: dict[str, Any]) -> Any:
    """A trainer without data, files and optimizer of its own."""
    found = object.__new__(trainer)
    found.__dict__ |= values
    return found


def apart(tokens: np.ndarray, branch: np.ndarray) -> Sequences:
    return [(tokens[branch == 0].tolist(), tokens[branch == k].tolist()) for k in range(1, int(branch.max()) + 1)]


def padded(sequences: Sequences, prefix: str = "") -> dict[str, torch.Tensor]:
    longest = max(len(prompt) + len(own) for prompt, own in sequences)
    tokens, attention, completion = (torch.zeros(len(sequences), longest, dtype=torch.int64) for _ in range(3))
    for row, (prompt, own) in enumerate(sequences):
        n = len(prompt) + len(own)
        tokens[row, :n] = torch.tensor([*prompt, *own])
        attention[row, :n], completion[row, len(prompt) : n] = 1, 1
    names = ("input_ids", "attention_mask", "completion_mask")
    return {f"{prefix}{name}": value for name, value in zip(names, (tokens, attention, completion), strict=True)}
