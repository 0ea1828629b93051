"""Scores of reward models: /score says how good answers are.

A score has no unit and no zero. Where the run has measured the scores of its reference policy's samples, they are also
given in standard deviations from their mean (`dist_lm.rlhf.reward_model.RewardScale`).
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from dist_lm.chat.layouts.turns import conversation_of
from dist_lm.chat.messages import ChatError
from dist_lm.chat.openai_errors import ProtocolError
from dist_lm.chat.openai_fields import Json, check_fields, typed
from dist_lm.chat.template import answer_tokens, prompt
from dist_lm.errors import UserError
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.reward_model import RewardScale, last_token_scores
from dist_lm.server.prompt_fields import check_lengths, check_number, input_ids
from dist_lm.server.served import Served

MOST_INPUTS = 64  # in a request
BATCH = 8  # sequences that are computed together


@dataclass(frozen=True)
class RewardModel:
    """A model whose scores are served."""

    served: Served
    model: Transformer
    version: int
    scale: RewardScale | None  # None: the run is not finished, or its checkpoint lies outside of one
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # one request is computed at a time


def scored(body: Mapping[str, Json], reward: RewardModel) -> dict[str, Json]:
    """Returns the score of each input: a text or token ids, or a list of either (`input`), or conversations that end
    with an answer (`messages`, one or a list of them). `tools` are those of all conversations.

    Raises:
        ProtocolError: a field is unknown or has another form, or an input is too long.
    """
    check_fields(body, {"model", "input", "messages", "tools"})
    param = "input" if body.get("messages") is None else "messages"
    sequences = _sequences(body, reward.served)
    check_lengths(sequences, reward.served.context, param)

    with reward.lock, torch.inference_mode():
        scores = last_token_scores(reward.model, sequences, BATCH).tolist()
    n_tokens = sum(map(len, sequences))
    return {
        "object": "list",
        "model": reward.served.name,
        "weights_version": reward.version,
        "data": [
            {"object": "score", "index": index, "score": score, "normalised": reward.scale and reward.scale(score)}
            for index, score in enumerate(scores)
        ],
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }


def _sequences(body: Mapping[str, Json], served: Served) -> list[list[int]]:
    """Returns the ids of each input.

    Raises:
        ProtocolError: one has another form, or there are too many.
    """
    messages = typed(body, "messages", list, None)
    if messages is not None:
        conversations = messages if messages and isinstance(messages[0], list) else [messages]
        check_number(conversations, MOST_INPUTS, "messages")
        return [_conversation(turns, body, served) for turns in conversations]

    return input_ids(body, served.tokenizer, MOST_INPUTS)


def _conversation(turns: Json, body: Mapping[str, Json], served: Served) -> list[int]:
    try:
        conversation = conversation_of(turns, body.get("tools"), style="openai")
        *before, answer = conversation.messages
        if answer.role != "assistant":
            raise ChatError("expected a last turn of the assistant, which is scored")
        # As in training: behind the mark that ends the turn stands nothing.
        question = replace(conversation, messages=tuple(before))
        return [*prompt(question, served.tokenizer), *answer_tokens(answer, served.tokenizer, question)]
    except UserError as error:
        raise ProtocolError(str(error), param="messages") from error
