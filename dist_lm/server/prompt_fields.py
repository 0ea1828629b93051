"""Fields that hold texts or token ids: prompts of /v1/completions with what stands behind the answer, and inputs of
endpoints that write no text."""

from collections.abc import Mapping, Sequence

from dist_lm.chat.openai_errors import ProtocolError
from dist_lm.chat.openai_fields import Json, is_id, typed
from dist_lm.data.infill import InfillMarks
from dist_lm.errors import UserError
from dist_lm.tokenizer.symbols import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX
from dist_lm.tokenizer.tokenizer import Tokenizer

MOST_PROMPTS = 64  # in one request


def input_ids(body: Mapping[str, Json], tokenizer: Tokenizer, most: int) -> list[list[int]]:
    """Returns the ids of `input`: a text, ids, or a list of either.

    Args:
        most: inputs of a request.

    Raises:
        ProtocolError: they have another form, are too many, or an id is none of the vocabulary.
    """
    value = body.get("input")
    inputs: list[Json] = [value]
    if isinstance(value, list) and value and not all(is_id(token) for token in value):
        inputs = value
    check_number(inputs, most, "input")
    return [_input(part, tokenizer) for part in inputs]


def check_number(inputs: Sequence[Json], most: int, param: str) -> None:
    """Refuses a request with more than `most` inputs.

    Raises:
        ProtocolError: it has more; of the field `param`.
    """
    if len(inputs) > most:
        raise ProtocolError(f"{param}: {len(inputs):,} of them; expected at most {most:,}", param=param)


def check_lengths(sequences: Sequence[Sequence[int]], most: int, param: str) -> None:
    """Refuses inputs that are empty or longer than `most` tokens.

    Raises:
        ProtocolError: one is; of the field `param`.
    """
    for number, ids in enumerate(sequences):
        if not 1 <= len(ids) <= most:
            raise ProtocolError(f"{param}.{number}: {len(ids):,} tokens; expected 1 to {most:,}", param=param)


def _input(value: Json, tokenizer: Tokenizer) -> list[int]:
    if isinstance(value, list) and value and all(is_id(token) for token in value):
        if not all(0 <= token < tokenizer.vocab_size for token in value):
            raise ProtocolError(f"input: expected ids from 0 to {tokenizer.vocab_size - 1}", param="input")
        return value
    if not isinstance(value, str):
        raise ProtocolError("input: expected a text, token ids, or a list of either", param="input")
    try:
        return tokenizer.encode_prompt(value)
    except UserError as error:
        raise ProtocolError(str(error), param="input") from error


def text_prompts(body: Mapping[str, Json], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the ids of the prompts of /v1/completions: a text, ids, or a list of either. Given ids are not compared
    with the vocabulary: the engine refuses others.

    Raises:
        ProtocolError: they have another form or are too many, or the tokenizer lacks the marks of a middle.
    """
    value = body.get("prompt")
    prompts: list[Json] = [value]
    if isinstance(value, list) and value and not all(is_id(token) for token in value):
        prompts = value
    if len(prompts) > MOST_PROMPTS:
        raise ProtocolError(f"prompt: {len(prompts)} prompts; expected at most {MOST_PROMPTS}", param="prompt")

    suffix = typed(body, "suffix", str, None)
    return [_prompt(prompt, suffix, tokenizer) for prompt in prompts]


def _prompt(prompt: Json, suffix: str | None, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of one prompt.

    Raises:
        ProtocolError: as `text_prompts`.
    """
    if isinstance(prompt, list) and prompt and all(is_id(token) for token in prompt):
        if suffix is not None:
            raise ProtocolError("suffix: expected a text as the prompt", param="suffix")
        return prompt
    if not isinstance(prompt, str):
        raise ProtocolError("prompt: expected a text, token ids, or a list of either", param="prompt")
    if suffix is None and (parts := _middle_parts(prompt)):
        prompt, suffix = parts
    try:
        ids = tokenizer.encode_prompt(prompt)
        if suffix is not None:
            ids = InfillMarks.of(tokenizer).prompt(ids, tokenizer.encode(suffix))
    except UserError as error:
        raise ProtocolError(str(error), param="prompt") from error
    return ids


def _middle_parts(text: str) -> tuple[str, str] | None:
    """Returns (text before, text behind) of a prompt that an editor has written for a middle: its marks are spelled,
    each once, and begin and end the prompt. None: the prompt is another one, and all of it is plain text.

    Whoever writes the whole prompt can ask for a middle in this way. A part of a prompt cannot: text before or behind
    it, or a second mark, makes all of it plain text. Prompts of ids are never read so.
    """
    if not text.startswith(FIM_PREFIX) or not text.endswith(FIM_MIDDLE):
        return None
    if any(text.count(mark) != 1 for mark in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)):
        return None
    before, _, after = text.removeprefix(FIM_PREFIX).removesuffix(FIM_MIDDLE).partition(FIM_SUFFIX)
    return before, after
