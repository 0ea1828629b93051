"""Pretraining text beside the rollouts: what it adds to the gradient, and where its stream stands."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_lm.data.batch import Batch
from dist_lm.data.stream import SequenceStream
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ConfigError
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.values import shard_of
from dist_lm.rlhf.state import RlhfState
from dist_lm.stages.rlhf.program import PretrainingText
from tests.rlhf.toy import LENGTH, MODEL, VOCABULARY, Toy, tensors_of, toy, weights_of, write_text

pytestmark = pytest.mark.usefixtures("one_rank")

CONFIG = replace(LENGTH, prompts=12, max_new_tokens=8, epochs=1, grad_clip=0.0, kl_coefficient=0.05)
SEQUENCES = 6
T = 16


def rows(count: int, width: int, first: int) -> Batch:
    """Rows of one document each, of whose targets every third one does not count."""
    tokens = (torch.arange(count * width).view(count, width) * 5 + first) % 63 + 1
    mask = (torch.arange(count * width).view(count, width) % 3 > 0).float()
    position = torch.arange(width).repeat(count, 1)
    return Batch(tokens, tokens.roll(-1, 1), mask, torch.zeros_like(tokens), position, torch.arange(count))


TEXT = [rows(3, 20, 1), rows(1, 9, 2)]


def first_gradient(coefficient: float, micro_batch_tokens: int) -> tuple[Toy, dict[str, torch.Tensor]]:
    """The policy's as its optimizer gets it in the first update, by parameter."""
    config = replace(CONFIG, pretrain_coefficient=coefficient, micro_batch_tokens=micro_batch_tokens)
    made = toy(config, 1, pretraining=lambda update: TEXT, stop_tokens=tuple(range(1, 9)))
    policy, found = made.learner.models.policy, {}

    def keep(*_: object) -> None:
        for name, parameter in policy.model.named_parameters():
            assert parameter.grad is not None, name
            found[name] = shard_of(parameter.grad).clone()

    policy.optimizer.register_step_pre_hook(keep)
    made.run()
    return made, found


def gradient_of_the_mean_loss() -> dict[str, torch.Tensor]:
    """Of the first policy on `TEXT`, by plain autograd over logits."""
    model = Transformer(MODEL)
    model.load_state_dict(weights_of(toy(CONFIG, 1)))
    total, count = torch.zeros(()), torch.zeros(())
    for batch in TEXT:
        logprobs = model(batch.tokens_BT).log_softmax(-1)
        losses = -logprobs.gather(-1, batch.targets_BT[..., None])[..., 0]
        total, count = total + (losses * batch.loss_mask_BT).sum(), count + batch.loss_mask_BT.sum()
    (total / count).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.heavy
@pytest.mark.parametrize("micro_batch_tokens", [30, 8192])
def test_the_gradient_is_that_of_ppo_and_the_coefficient_times_that_of_the_mean_loss(micro_batch_tokens):
    plain, without = first_gradient(0.0, micro_batch_tokens)
    made, mixed = first_gradient(0.7, micro_batch_tokens)
    text = gradient_of_the_mean_loss()
    assert mixed.keys() == without.keys() == text.keys()

    def vector(of: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([of[name].double().flatten() for name in sorted(of)])

    expected = vector(without) + 0.7 * vector(text)
    assert (vector(mixed) - expected).norm() < 1e-6 * expected.norm()
    assert vector(text).norm() > 0.1 * vector(without).norm()  # a term that is left out would be seen
    for name in ("rlhf/policy_loss", "rlhf/approx_kl", "rlhf/clip_frac", "rlhf/ratio_mean"):
        assert made.metric(name) == plain.metric(name), name  # they are of rollouts alone
    assert "rlhf/pretrain_loss" not in plain.reports[0].metrics


@pytest.mark.heavy
def test_the_text_is_learned_beside_the_reward():
    config = replace(CONFIG, pretrain_coefficient=1.0, grad_clip=1.0, lr=3e-3, epochs=2)
    losses = {}
    for coefficient in (1.0, 1e-9):
        made = toy(replace(config, pretrain_coefficient=coefficient), 6, pretraining=lambda update: TEXT)
        made.run()
        losses[coefficient] = [report.updates[0]["pretrain_loss"] for report in made.reports]
    assert losses[1.0][0] == pytest.approx(math.log(VOCABULARY), abs=0.3)  # a mean over the targets that count
    assert losses[1.0][-1] < 0.7 * losses[1e-9][-1]


def test_a_weight_without_text_is_refused():
    with pytest.raises(ConfigError, match=r"^rlhf\.pretrain_coefficient=0\.5: expected 0 without pretraining text$"):
        toy(replace(CONFIG, pretrain_coefficient=0.5), 1)


# --- the stream ---


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@contextmanager
def text(corpus: Path, updates: int = 0, dp_rank: int = 0, dp_size: int = 1) -> Iterator[PretrainingText]:
    with SequenceStream(
        TokenCorpus.open(corpus, "train"),
        seed=3,
        seq_len=T,
        global_batch=SEQUENCES,
        micro_batch=2,
        dp_rank=dp_rank,
        dp_size=dp_size,
        position=updates * SEQUENCES,
    ) as stream:
        yield PretrainingText(stream, SEQUENCES, torch.device("cpu"))


def tokens_of(batches: list[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens_BT.tolist()]


def test_each_update_has_the_next_sequences_whoever_goes_on(corpus):
    with text(corpus) as whole:
        expected = [tokens_of(whole(update)) for update in range(5)]
    assert all(len(update) == SEQUENCES for update in expected)
    assert len({tuple(row) for update in expected for row in update}) == 5 * SEQUENCES
    with text(corpus, updates=3) as resumed:
        assert [tokens_of(resumed(update)) for update in (3, 4)] == expected[3:]
    parts = []
    for rank in range(3):
        with text(corpus, dp_rank=rank, dp_size=3) as part:
            parts += tokens_of(part(0))
    assert parts == expected[0]


@pytest.mark.heavy
def test_a_run_with_text_that_was_interrupted_goes_on_to_the_same_bits(corpus):
    config = replace(CONFIG, pretrain_coefficient=0.5, epochs=3, stop_kl=1e-3, lr=1e-2)
    with text(corpus) as stream:
        whole = toy(config, 4, pretraining=stream, save_every=2)
        kept: dict[str, torch.Tensor] = {}

        def keep(state: RlhfState) -> None:
            whole.saved.append(state)
            if not kept:
                kept.update({name: value.clone() for name, value in tensors_of(whole).items()})

        whole.learner = replace(whole.learner, save=keep)
        whole.run()
    state = whole.saved[0]
    assert state.iteration == 2
    assert state.policy_updates < 6  # stop_kl: how many there were is known by their number alone
    with text(corpus, updates=state.policy_updates) as stream:
        resumed = toy(config, 4, pretraining=stream)
        for name, value in tensors_of(resumed).items():
            value.copy_(kept[name])
        resumed.state = state
        resumed.run()
    assert resumed.metric("rlhf/pretrain_loss") == whole.metric("rlhf/pretrain_loss")[2:]
    for name, value in tensors_of(resumed).items():
        assert torch.equal(value, tensors_of(whole)[name]), name
