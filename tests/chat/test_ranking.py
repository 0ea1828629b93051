"""Rankings as trees of tokens."""

import numpy as np

from dist_lm.chat.messages import Conversation, Message
from dist_lm.chat.ranking import Ranking, branch_ends, branch_positions, ranking_tokens
from dist_lm.chat.template import render
from dist_lm.tokenizer.symbols import END
from dist_lm.tokenizer.tokenizer import Tokenizer

PROMPT = Conversation((Message("system", "Be brief."), Message("user", "Name <|im_end|> a colour.")))


def test_every_branch_behind_the_prompt_is_the_conversation_with_that_answer(tokenizer: Tokenizer) -> None:
    completions = ("Blue.", "Green, or <|im_end|>?", "7")
    found = ranking_tokens(Ranking(PROMPT, completions, (0, 1, 2)), tokenizer)
    trunk = found.tokens[found.branch == 0]
    positions, ends = branch_positions(found.branch), branch_ends(found.branch)
    assert len(ends) == 3
    for number, text in enumerate(completions, start=1):
        own = found.branch == number
        whole = render(Conversation((*PROMPT.messages, Message("assistant", text))), tokenizer).tokens
        alone = whole[: np.flatnonzero(whole == tokenizer.special_ids[END])[-1] + 1]  # without the line break
        assert np.array_equal(np.concatenate([trunk, found.tokens[own]]), alone)
        assert positions[own].tolist() == list(range(len(trunk), len(alone)))
        assert np.flatnonzero(own)[-1] == ends[number - 1]
        assert found.tokens[ends[number - 1]] == tokenizer.special_ids[END]
    assert positions[found.branch == 0].tolist() == list(range(len(trunk)))


def test_branches_of_one_token() -> None:
    branch = np.array([0, 0, 0, 1, 2, 2, 3], np.uint8)
    assert branch_positions(branch).tolist() == [0, 1, 2, 3, 3, 4, 3]
    assert branch_ends(branch).tolist() == [3, 5, 6]
    assert branch_positions(branch[:3]).tolist() == [0, 1, 2]
    assert branch_ends(branch[:3]).tolist() == []
