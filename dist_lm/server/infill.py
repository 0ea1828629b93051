"""/infill, as llama.cpp's server has it: what stands between two texts, for editors.

The prompt has the format with which the model was trained (`dist_lm.data.infill`). Texts that are too long for the
context lose what is far from the cursor, as in llama.cpp.
"""

import json
from collections.abc import Iterator, Mapping, Sequence

from dist_lm.chat.openai_errors import ProtocolError, error_value
from dist_lm.chat.openai_fields import Json, check_fields, typed
from dist_lm.data.infill import InfillMarks
from dist_lm.errors import UserError, shown_value
from dist_lm.generation.request import Answer
from dist_lm.server.api import Api
from dist_lm.server.engine_thread import Done, Event, Grown
from dist_lm.server.job import Job
from dist_lm.server.requests import job_of
from dist_lm.server.served import Served

MOST_EXTRA = 64  # texts of other files
SNIPPET = "\n\n--- snippet ---\n\n"  # stands before each of them, as in llama.cpp for models without marks of files
SUFFIX_SHARE = 4  # at most one part in so many of the prompt stands behind the cursor
ANSWER_SHARE = 4  # and so many of the context is kept for the answer
DEFAULTS: dict[str, Json] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}  # those of llama.cpp
SAMPLING = (*DEFAULTS, "seed", "stop", "logit_bias", "stream", "model")
TEXTS = {"input_prefix", "input_suffix", "input_extra", "prompt", "n_predict", "repeat_penalty"}
# How llama.cpp goes about its work: nothing here. Limits of time are not kept.
IGNORED = {"samplers", "cache_prompt", "n_indent", "t_max_prompt_ms", "t_max_predict_ms", "id_slot"}
DRAWN_SEED = -1  # llama.cpp's clients send it where the server draws the seed
STOPS = {"eot": "eos", "stop": "word", "length": "limit", "context": "limit", "cancelled": "none"}


def infill_job(body: Mapping[str, Json], served: Served, client: str) -> Job:
    """Returns the job that the body of a request describes.

    Raises:
        ProtocolError: a field is unknown, has another type or exceeds a limit, or the tokenizer lacks the marks.
        UserError: as `job_of`.
    """
    check_fields(body, {*SAMPLING, *TEXTS, *IGNORED}, {"n_probs": (0, None)})

    limits = served.limits
    n_new = typed(body, "n_predict", int, -1)
    if n_new > limits.max_tokens:
        message = f"n_predict={shown_value(n_new)}: expected at most {limits.max_tokens}"
        raise ProtocolError(message, param="n_predict")
    if n_new < 0:
        n_new = limits.unnamed_tokens

    chosen = {key: body[key] for key in SAMPLING if body.get(key) is not None}
    if chosen.get("seed") == DRAWN_SEED:
        del chosen["seed"]

    # Editors send n_predict=0 so that the prompt is read ahead: one token is drawn, and not shown.
    completion = {
        **DEFAULTS,
        **chosen,
        "prompt": _prompt(body, served, min(n_new, served.context // ANSWER_SHARE)),
        "repetition_penalty": body.get("repeat_penalty"),
        "max_tokens": max(1, n_new),
    }
    job = job_of("completions", completion, served, client)
    return job.with_asked({"n_predict": n_new})


def _prompt(body: Mapping[str, Json], served: Served, n_new: int) -> list[int]:
    """Returns the ids of the prompt.

    Args:
        n_new: tokens of the context that are kept for the answer.

    Raises:
        ProtocolError: a text is none, or the tokenizer lacks the marks.
    """
    tokenizer = served.tokenizer
    try:
        marks = InfillMarks.of(tokenizer)
        opening, *before = tokenizer.encode_prompt(typed(body, "input_prefix", str, ""))
        after = tokenizer.encode(typed(body, "input_suffix", str, ""))
        begun_ids = tokenizer.encode(typed(body, "prompt", str, ""))
        extra = [token for text in _extra_texts(body) for token in tokenizer.encode(SNIPPET + text)]
    # A refused field has its name already.
    except ProtocolError:
        raise
    except UserError as error:
        raise ProtocolError(str(error), param="input_prefix") from error

    # Text near the cursor comes first.
    # The rest of the context is for the answer, the opening token, the marks and what is begun.
    room = max(1, served.context - max(1, n_new) - 1 - len(marks) - len(begun_ids))
    # The text behind the cursor gets its share, or what the text before it leaves, if that is more.
    after = after[: max(room // SUFFIX_SHARE, room - len(before))]
    before = _last(before, room - len(after))
    extra = _last(extra, room - len(after) - len(before))
    return [opening, *extra, marks.prefix, *before, marks.suffix, *after, marks.middle, *begun_ids]


def _last(ids: list[int], n: int) -> list[int]:
    """Returns the last `n` ids, all of them if they are fewer, none if `n` is negative."""
    return ids[max(0, len(ids) - n) :] if n > 0 else []


def _extra_texts(body: Mapping[str, Json]) -> list[str]:
    """Returns the texts of other files, each behind its name.

    Raises:
        ProtocolError: they have another form, or are too many.
    """
    texts: list[str] = []
    chunks = typed(body, "input_extra", list, [])
    for chunk in chunks:
        is_chunk = isinstance(chunk, dict) and isinstance(chunk.get("text"), str)
        name = chunk.get("filename") if is_chunk else None
        if not is_chunk or len(chunks) > MOST_EXTRA or not isinstance(name, str | None):
            message = f"input_extra: expected up to {MOST_EXTRA} objects with text and filename"
            raise ProtocolError(message, param="input_extra")
        texts.append(f"{name}\n{chunk['text']}" if name else chunk["text"])
    return texts


def infill_response(job: Job, answers: Sequence[Sequence[Answer]], created: int) -> Json:
    """Returns the response in llama.cpp's form.

    Args:
        answers: one, of the only prompt.
    """
    ((answer,),) = answers
    return _summary(job, answer) | {"content": answer.text if job.asked["n_predict"] else ""}


def _summary(job: Job, answer: Answer) -> dict[str, Json]:
    return {
        "index": 0,
        "content": "",
        "stop": True,
        "model": job.served.name,
        "tokens_predicted": len(answer.tokens) if job.asked["n_predict"] else 0,
        "tokens_evaluated": answer.prompt_tokens,
        "truncated": False,
        "stop_type": STOPS[answer.finish],
    }


class InfillStream:
    """The stream of /infill: each event has new text, the last one what llama.cpp says at the end."""

    def __init__(self, job: Job, created: int) -> None:
        self._job = job

    def of(self, event: Event) -> Iterator[str]:
        """Yields new text, or the end."""
        if isinstance(event, Done):
            yield _line(_summary(self._job, event.answer))
        elif isinstance(event, Grown) and self._job.asked["n_predict"]:
            text = "".join(piece for _, piece in event.pieces)
            if text:
                yield _line({"index": 0, "content": text, "stop": False})

    def end(self) -> Iterator[str]:
        """Yields nothing: llama.cpp has no mark of the end here."""
        yield from ()

    def error(self, message: str, status: int) -> str:
        """Returns an error in OpenAI's form."""
        return _line(error_value(message, status))


def _line(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


INFILL = Api(infill_job, infill_response, InfillStream)
