"""A ranking as text and back, and as tokens with its ranks and judgements."""

import numpy as np
import pytest

from dist_lm.chat.documents import encode_ranking, read_ranking, write_prompt, write_ranking
from dist_lm.chat.messages import ChatError, Conversation, Message
from dist_lm.chat.ranking import Judgement, Ranking, ranking_tokens
from dist_lm.document import Document
from dist_lm.tokenizer.tokenizer import Tokenizer

PROMPT = Conversation((Message("user", "Name a <|im_end|> colour."),))
RANKED = Ranking(PROMPT, (" Blue", '"7"\n', "no"), ranks=(1, 0, 1))
JUDGED = Ranking(PROMPT, ("a", "b", "c"), judgements=(Judgement(0, 1), Judgement(2, 1, 0.5)))


@pytest.mark.parametrize("ranking", [RANKED, JUDGED])
def test_what_is_written_is_read(ranking: Ranking) -> None:
    assert read_ranking(write_ranking(ranking)) == ranking
    assert write_prompt(ranking) == write_prompt(RANKED)


def test_only_the_order_of_ranks_is_kept() -> None:
    assert read_ranking(write_ranking(Ranking(PROMPT, ("a", "b", "c"), ranks=(7, -2, 7)))).ranks == (1, 0, 1)


def test_what_says_nothing_is_refused() -> None:
    with pytest.raises(ChatError, match="all completions are tied"):
        write_ranking(Ranking(PROMPT, ("a", "b"), ranks=(1, 1)))


@pytest.mark.parametrize("ranking", [RANKED, JUDGED])
def test_tokens_are_the_tree_with_its_judgements(ranking: Ranking, tokenizer: Tokenizer) -> None:
    text = write_ranking(ranking)
    found = encode_ranking(tokenizer, Document(text, "people", "here", "MIT", "0" * 64, form="ranking"))
    tree = ranking_tokens(ranking, tokenizer)
    assert np.array_equal(found.tokens, tree.tokens)
    assert found.ranking is not None
    assert np.array_equal(found.ranking.branch, tree.branch)
    assert tuple(found.ranking.ranks.tolist()) == ranking.ranks
    assert [tuple(pair) for pair in found.ranking.judgements.tolist()] == [
        (one.better, one.worse) for one in ranking.judgements
    ]
    assert found.ranking.margins.tolist() == [one.margin or 0.0 for one in ranking.judgements]
    assert found.loss_mask is not None
    assert np.array_equal(found.loss_mask == 1, tree.branch > 0)
