"""Rollouts in rows: nothing is lost or seen twice, and what a model says of one does not depend on the rest."""

import numpy as np
import pytest
import torch

from dist_lm.data.batch import Batch
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.experience import end_scores, token_logprobs, token_values
from dist_lm.rlhf.packed_rollouts import Dealing, completion_mask, minibatches, rollout_batches, scoring_batches
from tests.model.small_models import small_config, small_model
from tests.rlhf.toy import rollouts_with

ROLLOUTS = rollouts_with([3, 1, 5, 2, 4, 1, 2], [4, 9, 1, 6, 6, 2, 3])
ALL = np.arange(len(ROLLOUTS))


def model_with(**changes) -> Transformer:
    return small_model(small_config(**changes))


def alone(of: Transformer, *, temperature: float = 1.0):
    """What a plain forward of each rollout by itself gives: one row for each."""
    found = []
    for one in ROLLOUTS:
        tokens = torch.from_numpy(np.concatenate([one.prompt, one.completion]))[None]
        new = len(one.completion)
        with torch.no_grad():
            if of.config.head == "scalar":
                found.append(of.scores(Batch.plain(tokens))[0])
            else:
                logprobs = (of(tokens)[0, -new - 1 : -1] / temperature).log_softmax(-1)
                own = logprobs.gather(-1, tokens[0, -new:, None])[:, 0]
                found.append(torch.stack([own, -(logprobs.exp() * logprobs).sum(-1)]))
    return found


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


SHAPE = tuple(completion_mask(ROLLOUTS).shape)


@pytest.mark.parametrize("micro_batch_tokens", [1, 25, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropies_are_those_of_each_rollout_alone(micro_batch_tokens, temperature):
    model = model_with()
    found = token_logprobs(model, rollout_batches(ROLLOUTS, ALL, Dealing(micro_batch_tokens)), SHAPE, temperature)
    expected = alone(model, temperature=temperature)
    for part in range(2):
        torch.testing.assert_close(found[part], padded([row[part] for row in expected]), rtol=1e-5, atol=1e-5)


def test_values_are_of_what_stands_before_a_token_and_a_score_is_of_the_last_real_one():
    model = model_with(head="scalar")
    rows = alone(model)
    new = ROLLOUTS.new_tokens_B.tolist()
    before = [row[-n - 1 : -1] for row, n in zip(rows, new, strict=True)]
    values = token_values(model, rollout_batches(ROLLOUTS, ALL, Dealing(30)), SHAPE)
    torch.testing.assert_close(values, padded(before), rtol=1e-5, atol=1e-5)
    scores = end_scores(model, ROLLOUTS, Dealing(30), torch.device("cpu"))
    torch.testing.assert_close(scores, torch.stack([row[-1] for row in rows]), rtol=1e-5, atol=1e-5)


def test_ranks_have_the_same_shapes_and_together_all_rollouts_once():
    model = model_with()
    whole, _ = token_logprobs(model, rollout_batches(ROLLOUTS, ALL, Dealing(30)), SHAPE, 1.0)
    for ranks in (2, 3, 9):
        dealt = [rollout_batches(ROLLOUTS, ALL, Dealing(30, rank, ranks)) for rank in range(ranks)]
        shapes = [[batch.tokens_BT.shape for batch in batches] for batches in dealt]
        assert all(one == shapes[0] for one in shapes)
        whole_rows = [scoring_batches(ROLLOUTS, Dealing(30, rank, ranks)) for rank in range(ranks)]
        ends = torch.cat([batch.rollout_S for batches in whole_rows for batch in batches])
        assert sorted(ends.tolist()) == ALL.tolist()
        parts = [token_logprobs(model, batches, SHAPE, 1.0)[0] for batches in dealt]
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-5, atol=1e-6)


def test_rows_are_within_the_limit_and_of_the_asked_multiple():
    batches = rollout_batches(ROLLOUTS, ALL, Dealing(40, multiple=4))
    assert {batch.tokens_BT.shape[1] for batch in batches} == {12}  # the longest has 10, of which 9 are read
    assert max(batch.tokens_BT.numel() for batch in batches) <= 40
    assert sum(int(batch.loss_mask_BT.sum()) for batch in batches) == ROLLOUTS.new_tokens_B.sum()
    real = int((ROLLOUTS.prompt_tokens_B + ROLLOUTS.new_tokens_B - 1).sum())
    padding = [batch.document_BT == len(ROLLOUTS) for batch in batches]  # a document of its own, of no token
    assert sum(int(one.sum()) for one in padding) == sum(batch.tokens_BT.numel() for batch in batches) - real > 0


def test_a_pass_sees_every_rollout_once_in_an_order_of_its_own():
    orders = []
    for iteration, epoch in ((0, 0), (0, 1), (1, 0)):
        parts = minibatches(3, iteration, epoch, 10, 4)
        assert [len(part) for part in parts] == [3, 3, 2, 2]
        orders.append(np.concatenate(parts).tolist())
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert np.concatenate(minibatches(3, 0, 1, 10, 4)).tolist() == orders[1]
