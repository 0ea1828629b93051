"""What requests may know of a model that is served, and what they may ask of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dist_lm.chat.openai_fields import Json
from dist_lm.server.conversations import Conversations
from dist_lm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServeLimits:
    """What a request may ask for."""

    max_tokens: int = 4096  # new tokens of an answer
    default_tokens: int = 512  # as `max_tokens`, of a request that names no number
    n: int = 16  # answers to a prompt
    prompt_tokens: int = 1 << 20  # the model's context is a limit of its own
    schema_bytes: int = 64 << 10  # size of a constraint or of all tools, as JSON
    body_bytes: int = 4 << 20

    @property
    def unnamed_tokens(self) -> int:
        """New tokens of an answer whose request names no number."""
        return min(self.default_tokens, self.max_tokens)


@dataclass
class Served:
    """The model that requests are for."""

    name: str
    tokenizer: Tokenizer
    context: int  # tokens of prompt and answer
    aliases: Sequence[str] = ()
    created: int = 0  # seconds since 1970
    embedding_width: int = 0  # 0: it computes no embeddings
    adapter: str = ""  # its name in an engine that several models share; empty: the engine's own weights
    limits: ServeLimits = field(default_factory=ServeLimits)
    conversations: Conversations = field(init=False)

    def __post_init__(self) -> None:
        self.conversations = Conversations(self.tokenizer)

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may call the model."""
        return (self.name, *self.aliases)

    def value(self, name: str) -> dict[str, Json]:
        """Returns the model as /v1/models lists it under one of its names."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "dist_lm",
            "max_model_len": self.context,
        }
