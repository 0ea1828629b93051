"""The benchmark of reward models: its variants read the same completions, and compute the same loss."""

import pytest
import torch

from dist_lm.bench import reward
from dist_lm.bench.case import configurations
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.reward_model import choices_of_people

TINY = (
    "model=nano",
    "stage=reward",
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.d_ff=64",
    "model.vocab_size=512",
    "stage.global_batch=2",
    "stage.seq_len=47",
    "stage.micro_batch=3",
)


@pytest.fixture(scope="module")
def config():
    return configurations((), TINY, quick=True)[0]


@pytest.mark.parametrize("variant", [reward.ROWS, reward.PACKED])
def test_apart_a_completion_has_the_tokens_and_positions_that_it_has_in_the_tree(config, variant):
    def seen(name: str) -> list[tuple]:
        """What stands at each place that is scored, and the whole of what it sees."""
        batch = reward.batch_of(name, config)
        assert batch.ranked is not None
        t = batch.tokens_BT.shape[1]
        found = []
        for place in batch.ranked.index_PK.flatten().tolist():
            b, i = divmod(place, t)
            own = batch.document_BT[b] == batch.document_BT[b, i]
            if batch.branch_BT is not None:
                own &= (batch.branch_BT[b] == 0) | (batch.branch_BT[b] == batch.branch_BT[b, i])
            own &= torch.arange(t) <= i
            found.append((batch.tokens_BT[b][own].tolist(), batch.position_BT[b][own].tolist()))
        return found

    assert seen(variant) == seen(reward.TREE)
    assert len(seen(variant)) == 6


def test_the_ways_compute_the_same_loss(config):
    losses = {variant: first_loss(variant, config) for variant in (reward.TREE, reward.ROWS, reward.PACKED)}
    assert losses[reward.ROWS] == pytest.approx(losses[reward.TREE], rel=1e-5)
    assert losses[reward.PACKED] == pytest.approx(losses[reward.TREE], rel=1e-5)


def first_loss(variant, config) -> float:
    model = Transformer(config.model)
    initialise(model, 0)
    model.document_mask = variant in (reward.TREE, reward.PACKED)
    with torch.no_grad():
        loss = choices_of_people(model, reward.batch_of(variant, config))
    assert loss.count == 4
    return float(loss.total / loss.count)
