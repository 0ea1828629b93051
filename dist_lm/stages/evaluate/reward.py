"""The task `reward` of stage `evaluate`: the scores that a reward model gives the answers to a file of prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_lm.chat.messages import ChatError, Conversation, Message
from dist_lm.chat.template import answer_tokens, prompt, stop_tokens
from dist_lm.config.root import Config
from dist_lm.data.prompts import Prompt, count_prompts, find_prompts, read_prompts
from dist_lm.errors import ConfigError
from dist_lm.generation.load import model_config_of, stage_tokenizer
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import choose_device
from dist_lm.rlhf.reward_model import last_token_scores
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.symbols import END
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import model_weights

BATCH = 64  # answers between two looks at the signals

Record = dict[str, Any]


def prompts_of(where: str) -> list[Prompt]:
    """Returns the prompts of a file or glob, read whole.

    Raises:
        ConfigError: there is none, a line is invalid or asks for a middle, or two lines have the same id.
        OSError: a file cannot be read.
    """
    files = find_prompts(where, "eval.prompts")
    count_prompts(files, "eval.prompts")
    prompts = list(read_prompts(files))
    for request in prompts:
        error = request.error
        if not error and not request.text:
            error = "the prompt is empty"
        if not error and request.suffix is not None:
            error = "has a suffix, but the reward model scores what follows a prompt: leave it out"
        if error:
            raise ConfigError(f"eval.prompts={where}: {request.place}: {error}")
    return prompts


def reward_scores(
    path: Path, config: Config, records: Sequence[Record], texts: dict[str, str], keep_going: Callable[[], bool]
) -> list[Record] | None:
    """Returns the reward model's score of each answer, as the turn that follows its prompt; loads the model for the
    call.

    Args:
        path: run or checkpoint of a reward model.
        records: answers, with `id` and `text`, or `error` if there is none.
        texts: prompts by id.
        keep_going: asked after each 64 answers.

    Returns:
        `id` and `outcome` (scored | refused | no turn | too long) of each answer, and its `score` if it has one; None
            if `keep_going` became false.

    Raises:
        ArtefactError: checkpoint or tokenizer is missing or damaged.
        ConfigError: device=cuda, and this node has no GPU.
        UserError: the package `tokenizers` is needed and not installed.
    """
    checkpoint = files.require_intact(files.find_checkpoint(path))
    shape = model_config_of(checkpoint)
    tokenizer = stage_tokenizer(checkpoint, WorkDirectory(Path(config.work_dir)), shape.vocab_size)
    model = Transformer(shape).to(choose_device(config.device, 0)).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in model_weights(checkpoint).items()})

    # Answers that cannot be scored keep their place in the order, with their reason.
    outcomes: list[Record] = []
    for begin in range(0, len(records), BATCH):
        batch = records[begin : begin + BATCH]
        laid_out = [_laid(record, texts[record["id"]], tokenizer, shape.max_seq_len) for record in batch]
        with torch.inference_mode():
            scores = iter(
                last_token_scores(model, [tokens for tokens in laid_out if isinstance(tokens, list)]).tolist()
            )
        for record, tokens in zip(batch, laid_out, strict=True):
            if isinstance(tokens, str):
                outcomes.append({"id": record["id"], "outcome": tokens})
            else:
                outcomes.append({"id": record["id"], "outcome": "scored", "score": next(scores)})
        if not keep_going():
            return None
    return outcomes


def _laid(record: Record, question: str, tokenizer: Tokenizer, context: int) -> list[int] | str:
    """Returns the tokens of a prompt and its answer, or the outcome of an answer that has no score: `refused`, `no
    turn` (the template does not take it) or `too long` for the context (tokens).

    Raises:
        UserError: the tokenizer lacks the mark that ends a turn.
    """
    if "error" in record:
        return "refused"
    conversation = Conversation((Message("user", question),))
    try:
        tokens = prompt(conversation, tokenizer)
        if record["text"]:
            tokens += answer_tokens(Message("assistant", record["text"]), tokenizer, conversation)
        else:  # the model ended its turn at once; a `Message` is never empty
            tokens += stop_tokens(tokenizer)[:1] if tokenizer.kept_template else tokenizer.mark(END)
    except ChatError:  # templates of imported models drop some texts
        return "no turn"
    return tokens if len(tokens) <= context else "too long"
