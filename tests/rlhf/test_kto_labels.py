"""One completion with a label: KTO's loss of it, and that no other loss takes it for a ranking."""

import numpy as np
import pytest
import torch

from dist_lm.chat.documents import encode_ranking, read_ranking, write_ranking
from dist_lm.chat.messages import ChatError, Conversation, Message
from dist_lm.chat.ranking import Judgement, Ranking, check_ranking
from dist_lm.config.preference import KTO, PreferenceConfig
from dist_lm.data.batch import RankedPositions
from dist_lm.data.rankings.stream import PlacedRanking, lesson, ranked_positions
from dist_lm.document import Document, RankingArrays
from dist_lm.rlhf.preference import Completions, GlobalValues, PreferenceLoss
from dist_lm.tokenizer.tokenizer import Tokenizer
from tests.data.rankings.made_rankings import corpus_of, ranking

SETTINGS = PreferenceConfig(algorithm=KTO, beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
VALUES = GlobalValues(reference_point=torch.tensor(0.25))


def completions(ranked: RankedPositions, count: int) -> Completions:
    generator = torch.Generator().manual_seed(3)
    return Completions(
        logprob_C=torch.randn(count, generator=generator).requires_grad_(),
        reference_C=torch.randn(count, generator=generator),
        tokens_C=torch.ones(count),
        prompt_C=torch.zeros(count, dtype=torch.int64),
        prompt_logprob_P=torch.zeros(0),
        prompt_tokens_P=torch.zeros(1),
        ranked=ranked,
    )


def arrays(ranks: list[int], pairs: list[list[int]]) -> RankingArrays:
    k = max(len(ranks), 2 if pairs else 0)
    return RankingArrays(
        np.arange(1, k + 1).astype(np.uint8),
        np.array(ranks, np.uint8),
        np.array(pairs, np.uint8).reshape(-1, 2),
        np.zeros(len(pairs), np.float32),
    )


def test_labels_of_both_completions_of_pairs_cost_what_the_pairs_cost():
    """The pairs' loss is compared with TRL's elsewhere; gradients and metrics too are means over completions."""
    pairs = [[0, 1], [3, 2], [4, 5]]
    places = [PlacedRanking(number, np.arange(2 * number, 2 * number + 2)) for number in range(3)]
    judged = [arrays([], [[better - 2 * number, worse - 2 * number]]) for number, (better, worse) in enumerate(pairs)]
    wanted = [better for better, _ in pairs]
    singles = [PlacedRanking(number, np.array([number])) for number in range(6)]
    labels = [arrays([int(number not in wanted)], []) for number in range(6)]

    of_pairs = completions(ranked_positions(places, judged), 6)
    of_labels = completions(ranked_positions(singles, labels), 6)
    expected, found = (PreferenceLoss(SETTINGS)(part, VALUES) for part in (of_pairs, of_labels))
    assert float(found.count) == float(expected.count) == 3
    assert float(found.total.detach()) == pytest.approx(float(expected.total.detach()))
    for sums in (expected, found):
        sums.total.backward()
    torch.testing.assert_close(of_labels.logprob_C.grad, of_pairs.logprob_C.grad)
    for name in ("margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob", "kl"):
        counts = [float(sums.metric_counts.get(name, sums.count)) for sums in (expected, found)]
        figures = [float(sums.metrics[name]) / n for sums, n in zip((expected, found), counts, strict=True)]
        assert figures[0] == pytest.approx(figures[1]), name

    mixed = completions(ranked_positions([*places[:2], *singles[4:]], [*judged[:2], *labels[4:]]), 6)
    assert float(PreferenceLoss(SETTINGS)(mixed, VALUES).total.detach()) == pytest.approx(
        float(expected.total.detach())
    )


def test_a_label_is_right_on_its_side_of_the_reference_point():
    singles = [PlacedRanking(number, np.array([number])) for number in range(4)]
    labels = [arrays([rank], []) for rank in (0, 0, 1, 1)]
    part = completions(ranked_positions(singles, labels), 4)
    with torch.no_grad():
        part.logprob_C.copy_(part.reference_C + torch.tensor([1.0, 0.0, 1.0, 0.0]))
    sums = PreferenceLoss(SETTINGS)(part, VALUES)
    assert float(sums.metrics["accuracy"]) / float(sums.metric_counts["accuracy"]) == 0.5


@pytest.mark.parametrize("learn_from", ["pairs", "one_pair", "rankings"])
def test_a_label_is_never_turned_round(learn_from):
    for rank in (0, 1):
        assert lesson(arrays([rank], []), learn_from, 0.99, 0, 7).ranks.tolist() == [rank]


def test_labels_come_back_from_shards_and_text(tiny_work, tmp_path):
    prompt = Conversation((Message("user", "2 + 2?"),))
    tokenizer = Tokenizer.load(tiny_work.tokenizer_model)
    written = []
    for label in (True, False):
        text = write_ranking(Ranking(prompt, ("4",), label=label))
        assert read_ranking(text) == Ranking(prompt, ("4",), label=label)
        written.append(encode_ranking(tokenizer, Document(text, "people", "s", "", "", "ranking")))
    rankings = corpus_of(tmp_path, [*written, ranking([1, 2], [[3], [4, 5]], ranks=[0, 1])])
    assert rankings.completions.tolist() == [1, 1, 2]
    assert [rankings.arrays(number).ranks.tolist() for number in range(3)] == [[0], [1], [0, 1]]
    assert "label" not in write_ranking(Ranking(prompt, ("4", "5"), (0, 1)))


@pytest.mark.parametrize(
    ("completions", "more"),
    [(("a", "b"), {}), (("a",), {"ranks": (0,)}), (("a",), {"judgements": (Judgement(0, 0),)}), ((), {})],
)
def test_a_label_is_of_one_completion_alone(completions, more):
    with pytest.raises(ChatError, match="label: "):
        check_ranking(Ranking(Conversation((Message("user", "x"),)), completions, label=True, **more))
