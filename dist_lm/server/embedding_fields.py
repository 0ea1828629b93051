"""/v1/embeddings in OpenAI's form: the body of a request, and its response.

Beside OpenAI's fields, `pooling` chooses what is taken of the hidden states (`dist_lm.generation.embedding`).
"""

import base64
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from dist_lm.chat.openai_errors import ProtocolError
from dist_lm.chat.openai_fields import Json, check_fields, typed
from dist_lm.errors import shown_value
from dist_lm.generation.embedding import POOLINGS, EmbeddingRequest
from dist_lm.server.engine_thread import Embedded
from dist_lm.server.prompt_fields import check_lengths, input_ids
from dist_lm.server.served import Served

MOST_INPUTS = 2048  # OpenAI's bound
MOST_NUMBERS = 4 << 20  # limit of a response; as text they take some 90 MB
FORMATS = ("float", "base64")


@dataclass(frozen=True)
class EmbeddingJob:
    """A request for embeddings, and what its response needs."""

    served: Served
    request: EmbeddingRequest
    is_base64: bool

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.request.sequences))


def embedding_job(body: Mapping[str, Json], served: Served) -> EmbeddingJob:
    """Returns the job that the body of a request describes.

    Raises:
        ProtocolError: a field is unknown, has another type or exceeds a limit.
    """
    check_fields(body, {"model", "input", "encoding_format", "dimensions", "pooling", "user"})
    if not served.embedding_width:
        raise ProtocolError(f"{served.name}: no embeddings of a model on several devices (--tp)", param="model")
    encoding = _choice(body, "encoding_format", FORMATS)
    pooling = _choice(body, "pooling", POOLINGS)

    # Only models that were trained for it may be cut, and ours are not: OpenAI refuses such models too.
    width = served.embedding_width
    dimensions = typed(body, "dimensions", int, width)
    if dimensions != width:
        message = f"dimensions={shown_value(dimensions)}: the vectors of {served.name} cannot be cut; expected {width}"
        raise ProtocolError(message, param="dimensions")

    most = max(1, min(MOST_INPUTS, MOST_NUMBERS // width))
    sequences = input_ids(body, served.tokenizer, most)
    check_lengths(sequences, served.context, "input")
    n_tokens = sum(map(len, sequences))
    if n_tokens > served.limits.prompt_tokens:
        message = f"input: {n_tokens:,} tokens; expected at most {served.limits.prompt_tokens:,} together"
        raise ProtocolError(message, param="input")
    request = EmbeddingRequest(f"embd-{secrets.token_hex(12)}", sequences, pooling, served.adapter)
    return EmbeddingJob(served, request, is_base64=encoding == "base64")


def embedding_response(job: EmbeddingJob, embedded: Embedded) -> dict[str, Json]:
    """Returns the JSON of a response, with a vector for each input, in their order. In base64 a vector is little-endian
    fp32, as OpenAI's client reads it."""
    data = []
    for index, vector_D in enumerate(embedded.vectors_SD):
        value: Json = vector_D.tolist()
        if job.is_base64:
            value = base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": value})
    return {
        "object": "list",
        "model": job.served.name,
        "weights_version": embedded.version,
        "data": data,
        "usage": {"prompt_tokens": job.n_tokens, "total_tokens": job.n_tokens},
    }


def _choice(body: Mapping[str, Json], key: str, choices: tuple[str, ...]) -> Json:
    """Returns a field that has one of some values; the first one if it is missing.

    Raises:
        ProtocolError: it has another value.
    """
    value = body.get(key)
    if value is None:
        return choices[0]
    if value not in choices:
        raise ProtocolError(f"{key}={shown_value(value)}: expected {' or '.join(choices)}", param=key)
    return value
