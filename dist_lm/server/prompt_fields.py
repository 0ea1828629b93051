"""Fields of /v1/completions that make prompts: texts, token ids, and what stands behind the answer."""

from collections.abc import Mapping

from dist_lm.data.infill import InfillMarks
from dist_lm.errors import UserError
from dist_lm.server.errors import ProtocolError
from dist_lm.server.fields import Json, is_id, typed
from dist_lm.tokenizer.symbols import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX
from dist_lm.tokenizer.tokenizer import Tokenizer

MOST_PROMPTS = 64  # of one request


def text_prompts(body: Mapping[str, Json], tokenizer: Tokenizer) -> list[list[int]]:
    """Returns the ids of the prompts of /v1/completions: a text, ids, or a list of either.

    Raises:
        ProtocolError: they have another form, or the tokenizer lacks the marks of a middle.
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
