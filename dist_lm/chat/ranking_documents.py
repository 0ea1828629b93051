"""A ranking as a document: the text it is kept as until it is tokenized, and its tokens with the verdict on them."""

import numpy as np

from dist_lm.chat import json_text
from dist_lm.chat.documents import conversation_of, conversation_value
from dist_lm.chat.ranking import Judgement, Ranking, check_ranking, dense_ranks
from dist_lm.chat.ranking_tokens import ranking_tokens
from dist_lm.document import Document, TokenizedDocument, Verdict
from dist_lm.tokenizer.tokenizer import Tokenizer


def write_ranking(ranking: Ranking) -> str:
    """The text of a ranking; `read_ranking` gives it back, with ranks counted from 0 without gaps.

    Raises:
        ChatError: it says nothing, or is not well formed; the message names what is wrong.
    """
    check_ranking(ranking)
    value = {
        "prompt": conversation_value(ranking.prompt),
        "completions": list(ranking.completions),
        "ranks": list(dense_ranks(ranking.ranks)),
        "judgements": [[one.better, one.worse, one.margin] for one in ranking.judgements],
    }
    return json_text.write(value, "ranking")


def write_prompt(ranking: Ranking) -> str:
    """The text of its prompt alone: rankings that share it belong to one side of the split."""
    return json_text.write(conversation_value(ranking.prompt), "prompt")


def read_ranking(text: str) -> Ranking:
    """What `write_ranking` wrote."""
    value = json_text.read(text, "ranking")
    return Ranking(
        prompt=conversation_of(value["prompt"]),
        completions=tuple(value["completions"]),
        ranks=tuple(value["ranks"]),
        judgements=tuple(Judgement(*one) for one in value["judgements"]),
    )


def encode_ranking(tokenizer: Tokenizer, document: Document) -> TokenizedDocument:
    """A ranking as the shards hold it. A judgement without a margin has margin 0, which is the same to the loss.

    Raises:
        ChatError: the prompt or a completion is not well formed.
    """
    ranking = read_ranking(document.text)
    tree = ranking_tokens(ranking, tokenizer)
    pairs = [(one.better, one.worse) for one in ranking.judgements]
    return TokenizedDocument(
        tokens=tree.tokens,
        n_bytes=len(tokenizer.content(tree.tokens.tolist())),
        language=document.language,
        source=document.source,
        licence=document.licence,
        loss_mask=(tree.branch > 0).astype(np.uint8),
        verdict=Verdict(
            branch=tree.branch,
            ranks=np.array(ranking.ranks, np.uint8),
            judgements=np.array(pairs, np.uint8).reshape(-1, 2),
            margins=np.array([one.margin or 0.0 for one in ranking.judgements], np.float32),
        ),
    )
