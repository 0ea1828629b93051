"""Completions of a batch of prompts, in one process.

The prompts go through together, padded on the right, and fill the cache; then every row adds one token a
forward at its own position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dist_lm.errors import UserError
from dist_lm.generation.sampling import SamplingParams, choose
from dist_lm.model.kv_cache import KVCache
from dist_lm.model.transformer import Transformer


class PromptTooLongError(UserError):
    """A prompt that leaves no room for a new token in the model's context."""


@dataclass
class Completion:
    """What followed one prompt."""

    tokens: list[int] = field(default_factory=list)  # without the end-of-text that ended it
    finished: bool = False  # the model ended it; else max_new_tokens or the context did
    logprobs: list[float] = field(default_factory=list)  # nats, a token, and of the end-of-text if finished


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    eot_id: int,
    seeds: Sequence[int],
) -> list[Completion]:
    """Complete every prompt; a row does not depend on the batch it is in.

    Args:
        prompts: token ids; an empty one starts from end-of-text.
        seeds: one a prompt.

    Raises:
        PromptTooLongError: a prompt fills `max_seq_len`.
    """
    rows = [list(prompt) or [eot_id] for prompt in prompts]
    if not rows:
        return []
    context, device = model.config.max_seq_len, model.embedding.weight.device
    for index, row in enumerate(rows):
        if len(row) >= context:
            raise PromptTooLongError(
                f"prompt {index} has {len(row)} tokens and model.max_seq_len is {context}: "
                f"shorten it to {context - 1} tokens or fewer"
            )
    length_B = torch.tensor([len(row) for row in rows], device=device)
    seed_B = torch.tensor(list(seeds), dtype=torch.int64, device=device)
    longest = max(map(len, rows))
    padded_BT = torch.tensor([row + [eot_id] * (longest - len(row)) for row in rows], device=device)
    room = [min(params.max_new_tokens, context - len(row)) for row in rows]
    capacity = max(len(row) + new for row, new in zip(rows, room, strict=True))
    cache = KVCache(model.config, len(rows), capacity, model.embedding.weight.dtype, device)

    hidden_BTD = model.hidden(padded_BT, cache=cache)
    hidden_BD = hidden_BTD[torch.arange(len(rows), device=device), length_B - 1]
    completions = [Completion() for _ in rows]
    running = set(range(len(rows)))
    for step in range(max(room)):
        position_B = (length_B + step).clamp(max=capacity - 1)  # rows that ended may stand at the end
        token_B, logprob_B = choose(model.head(hidden_BD), params, seed_B, position_B)
        tokens, logprobs = token_B.tolist(), logprob_B.tolist()
        for index in list(running):
            completion = completions[index]
            completion.logprobs.append(logprobs[index])
            completion.finished = tokens[index] == eot_id
            if not completion.finished:
                completion.tokens.append(tokens[index])
            if completion.finished or len(completion.tokens) == room[index]:
                running.remove(index)
        if not running:
            break
        hidden_BD = model.hidden(token_B[:, None], position_BT=position_B[:, None], cache=cache)[:, 0]
    return completions
