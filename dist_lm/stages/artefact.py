"""Whether what a stage leaves behind is there and fits the configuration."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from dist_lm.config import Config


@dataclass(frozen=True)
class Artefact:
    """What was found of a stage's output."""

    ready: bool
    detail: str  # one line for the plan


def text_fingerprint(config: Config) -> dict[str, Any]:
    """What the documents depend on: recorded beside artefacts, compared before they are used again."""
    corpus = asdict(config.corpus)
    for key in ("documents_per_member", "shard_tokens"):
        corpus.pop(key)
    drawn = any(source.reader == "sql" for sources in config.corpus.corpora.values() for source in sources)
    return {"seed": config.seed if drawn else None, "corpus": corpus}


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
