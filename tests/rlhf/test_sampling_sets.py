"""Rollouts drawn with top-k or top-p: every log-probability is of the distribution that a token was drawn from."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from dist_lm.errors import ConfigError
from dist_lm.model.token_sets import bytes_as_bits, packed
from dist_lm.rlhf.algorithms.registry import ALGORITHMS
from dist_lm.rlhf.config import RewardPartConfig, RlhfConfig
from dist_lm.rlhf.experience import token_logprobs
from dist_lm.rlhf.packed_rollouts import Dealing, completion_mask, minibatches, rollout_batches
from dist_lm.rlhf.rollouts import Rollouts, ScoredRollouts, concatenated
from dist_lm.rlhf.state import KlController, RlhfState
from tests.model.small_models import small_config, small_model
from tests.rlhf.toy import MODEL, Toy, assert_ends_alike, rollouts_with, run_from, saving, toy

FILTERS = {"top-k": {"top_k": 9}, "top-p": {"top_p": 0.7}, "both": {"top_k": 20, "top_p": 0.9}}
NEAR = 1e-5
VOCABULARY = small_config().vocab_size


def config_of(algorithm: str, **own) -> RlhfConfig:
    shared = {"prompts": 6, "samples": 2, "max_new_tokens": 8, "epochs": 2, "lr": 1e-3, "kl_coefficient": 0.05}
    return RlhfConfig(
        algorithm=algorithm, rewards={"length": RewardPartConfig(kind="length", target=4)}, **(shared | own)
    )


def ran(config: RlhfConfig, iterations: int) -> Toy:
    made = toy(config, iterations, stop_tokens=tuple(range(1, 9)))
    made.run()
    return made


# --- whole iterations ---


@pytest.mark.heavy
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
def test_engine_trainer_and_reference_speak_of_one_distribution_and_the_first_ratio_is_1(algorithm, filters):
    made = ran(config_of(algorithm, temperature=0.8, micro_batch_tokens=30, **filters), 2)
    for report in made.reports:
        assert report.updates[0]["ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert report.updates[0]["approx_kl"] == pytest.approx(0, abs=1e-9)
        assert report.updates[1]["approx_kl"] > 1e-9
        sizes = report.rollouts.set_size_M
        assert len(sizes) == report.rollouts.new_tokens_B.sum()
        assert sizes.min() > 0
        assert sizes.max() <= bytes_as_bits(MODEL.vocab_size)
    assert max(made.metric("rollout/logprob_gap")) < NEAR
    assert made.metric("rlhf/kl")[0] == pytest.approx(0, abs=NEAR)  # the reference is renormalised too
    most = filters.get("top_k", MODEL.vocab_size)
    assert 0 < made.metric("rlhf/entropy")[0] < math.log(most)


@pytest.mark.usefixtures("one_rank")
def test_without_filters_nothing_is_kept():
    report = ran(config_of("grpo"), 1).reports[0]
    assert len(report.rollouts.set_size_M) == len(report.rollouts.sets_X) == len(report.rollouts.grammar_BG) == 0
    assert not {"rollout/set_bytes", "rollout/forced_rate"} & report.metrics.keys()


@pytest.mark.heavy
@pytest.mark.usefixtures("one_rank")
def test_stale_rollouts_are_weighed_within_their_own_sets():
    """The sets are those of the older weights, so trainer and engine differ by the weights and by nothing else."""
    config = config_of("grpo", top_p=0.7, max_staleness=1)
    moved, still = ran(replace(config, lr=1e-2), 3), ran(replace(config, lr=1e-12), 3)
    assert max(still.metric("rollout/logprob_gap")) < NEAR
    assert max(moved.metric("rollout/logprob_gap")[1:]) > 0.01
    assert moved.reports[2].updates[0]["ratio_mean"] == pytest.approx(1, abs=1e-6)


@pytest.mark.heavy
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_a_run_goes_on_from_a_checkpoint_to_the_bit(algorithm):
    config = config_of(algorithm, top_k=20, top_p=0.9, max_staleness=1)
    whole = toy(config, 4, stop_tokens=tuple(range(1, 9)))
    saved = saving(whole)
    whole.run()
    assert any(name.endswith("sets_X") for name in load(saved[2].arrays))

    resumed = toy(config, 4, stop_tokens=tuple(range(1, 9)))
    run_from(resumed, saved[2])
    assert_ends_alike(resumed, whole, saved, 2)


# --- against the definition ---


def with_sets(rollouts: Rollouts, kept_MV: torch.Tensor) -> Rollouts:
    sets = [packed(kept_V.nonzero()[:, 0].numpy(), kept_MV.shape[1]) for kept_V in kept_MV]
    return replace(
        rollouts,
        set_size_M=np.array([len(one) for one in sets], np.int32),
        sets_X=np.array(bytearray().join(sets), np.uint8),
    )


def made_by_hand() -> tuple[Rollouts, torch.Tensor]:
    """Rollouts, and the set (V,) bool of each completion token: of 1 to all tokens, the drawn one among them."""
    rollouts = rollouts_with([3, 1, 5, 2, 4], [4, 9, 1, 6, 6], vocabulary=VOCABULARY, positions=[0, 0, 1, 1, 2])
    drawn = torch.from_numpy(np.concatenate([one.completion for one in rollouts]))
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(len(drawn), 1, generator=generator)
    kept_MV = torch.rand(len(drawn), VOCABULARY, generator=generator) < share.square()
    kept_MV[0] = True
    kept_MV[1] = False
    kept_MV[torch.arange(len(drawn)), drawn] = True
    return with_sets(rollouts, kept_MV), kept_MV


@pytest.mark.parametrize("micro_batch_tokens", [1, 25, 1000])
@pytest.mark.parametrize("chunk_bytes", [0, 3000])
def test_logprobs_and_entropies_are_those_of_a_dense_softmax_over_each_set(micro_batch_tokens, chunk_bytes):
    rollouts, kept_MV = made_by_hand()
    model, temperature = small_model(small_config()), 0.7
    model.chunk_bytes = chunk_bytes
    batches = []
    for rank in range(2):
        for part in minibatches(0, 0, 0, len(rollouts), 2):
            batches += rollout_batches(rollouts, part, Dealing(micro_batch_tokens, rank, 2))
    shape = tuple(completion_mask(rollouts).shape)
    found = token_logprobs(model, batches, shape, temperature)
    begin = 0
    for row, one in enumerate(rollouts):
        new = len(one.completion)
        tokens = torch.from_numpy(np.concatenate([one.prompt, one.completion]))[None]
        with torch.no_grad():
            x_TV = model(tokens)[0, -new - 1 : -1] / temperature
        logprobs = x_TV.masked_fill(~kept_MV[begin : begin + new], -math.inf).log_softmax(-1)
        own = logprobs.gather(-1, torch.from_numpy(one.completion)[:, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs.where(logprobs.isfinite(), 0)).sum(-1)
        torch.testing.assert_close(found[0][row, :new], own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1][row, :new], entropy, rtol=1e-5, atol=1e-5)
        begin += new


def test_sets_stay_with_their_rollouts():
    rollouts, kept_MV = made_by_hand()
    chosen_B = np.array([False, True, False, True, True])
    some = ScoredRollouts(rollouts, {"own": np.arange(5.0)}).of_prompts(np.array([0, 2]), 0).rollouts
    assert len(some) == 3
    every = torch.arange(len(kept_MV))
    of_rollout = np.repeat(np.arange(5), rollouts.new_tokens_B)
    for part, places in (
        (rollouts.chosen(chosen_B), chosen_B[of_rollout]),
        (some, np.isin(of_rollout, [0, 1, 4])),
    ):
        sets = part.sets_of(np.arange(len(part.logprobs_M)))
        assert sets is not None
        found = sets.mask(torch.arange(len(part.logprobs_M)), VOCABULARY, range(VOCABULARY))
        assert torch.equal(found, kept_MV[torch.from_numpy(places)])
    both = concatenated([ScoredRollouts(rollouts, {}), ScoredRollouts(some, {})]).rollouts
    sets = both.sets_of(np.arange(len(both.logprobs_M)))
    assert sets is not None
    assert torch.equal(sets.mask(every, VOCABULARY, range(VOCABULARY)), kept_MV)


def test_a_checkpoint_without_sets_is_read():
    state = RlhfState(KlController(0.1), pending={1: ScoredRollouts(rollouts_with([1, 2], [3, 1]), {})})
    older = {name: value for name, value in state.arrays().items() if "set" not in name}
    assert len(older) == len(state.arrays()) - 2
    found = RlhfState.from_dict(state.to_dict(), load(save(older))).pending[1].rollouts
    assert found.sets_of(np.arange(4)) is None


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"top_k": -1}, "rlhf.top_k=-1: expected a positive integer, or 0 (off)"),
        ({"top_p": 0.0}, "rlhf.top_p=0.0: expected in (0, 1]"),
        ({"top_p": 1.5}, "rlhf.top_p=1.5: expected in (0, 1]"),
    ],
)
def test_filters_out_of_bounds_are_refused_by_their_key(values: dict, named: str):
    with pytest.raises(ConfigError, match="expected") as refused:
        RlhfConfig(**values)
    assert str(refused.value).startswith(named)
