"""The task `reward` of stage `evaluate`: what a reward model thinks of the answers to a file of prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_lm.chat.messages import Conversation, Message
from dist_lm.chat.template import answer_tokens, prompt
from dist_lm.config.root import Config
from dist_lm.data.prompts import Prompt, find_prompts, read_prompts
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generation.load import model_config_of, run_of, tokenizer_of
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import choose_device
from dist_lm.rlhf.reward_model import last_token_scores
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import model_weights

SOME = 64  # answers between two looks at the signals

Record = dict[str, Any]


def prompts_of(where: str) -> list[Prompt]:
    """The prompts of a file or glob.

    Raises:
        ConfigError: there is none, or a line is invalid.
    """
    found = list(read_prompts(find_prompts(where, "eval.prompts")))
    for one in found:
        if one.error:
            raise ConfigError(f"eval.prompts={where}: {one.place}: {one.error}")
    return found


def reward_scores(
    path: Path, config: Config, records: Sequence[Record], texts: dict[str, str], wanted: Callable[[], bool]
) -> list[Record] | None:
    """The reward model's score of each answer, as the turn that follows its prompt.

    Args:
        path: run or checkpoint of the reward model.
        records: answers, with `id` and `text`.
        texts: prompts by id.

    Returns:
        `id` and `score` of each answer; None if `wanted` became false.

    Raises:
        ArtefactError: it is no reward model.
    """
    checkpoint = files.require_intact(files.find_checkpoint(path))
    shape, run = model_config_of(checkpoint), run_of(checkpoint)
    if shape.head != "scalar":
        raise ArtefactError(f"eval.reward_model={path}: model.head={shape.head}: expected a run of stage=reward")
    tokenizer = tokenizer_of(checkpoint, None if run else WorkDirectory(Path(config.work_dir)).tokenizer, run)
    model = Transformer(shape).to(choose_device(config.device, 0)).eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in model_weights(checkpoint).items()})
    found: list[Record] = []
    for begin in range(0, len(records), SOME):
        part = records[begin : begin + SOME]
        asked = [Conversation((Message("user", texts[str(one["id"])]),)) for one in part]
        tokens = [
            [
                *prompt(conversation, tokenizer),
                *answer_tokens(Message("assistant", one.get("text", "")), tokenizer, conversation),
            ][-shape.max_seq_len :]
            for conversation, one in zip(asked, part, strict=True)
        ]
        with torch.inference_mode():
            scores = last_token_scores(model, tokens).tolist()
        found += [{"id": one["id"], "score": score} for one, score in zip(part, scores, strict=True)]
        if not wanted():
            return None
    return found
