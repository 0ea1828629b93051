"""What the files of a work directory depend on: recorded beside them, compared before they are used again."""

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

from dist_lm.chat.template import FORMAT
from dist_lm.config.corpus import CorpusConfig
from dist_lm.config.root import Config
from dist_lm.data.corpus import form_of, source_traits, text_corpora

SAMPLED = "synthetic_rankings"  # reader whose documents a model wrote
LATER_KEYS = ("rows", "only")  # of a source: left out where they say nothing, as corpora from before them have none


def text_fingerprint(config: Config) -> dict[str, Any]:
    """What the texts of all corpora depend on: recorded beside artefacts, compared before they are used again.

    All together, because a text of one corpus keeps another out of the val split of the next.
    """
    return _fingerprint(config, text_corpora(config.corpus))


def corpus_fingerprint(config: Config, name: str) -> dict[str, Any]:
    """What the documents of one corpus and their tokens depend on. Conversations and rankings stand for themselves."""
    if form_of(config.corpus, name) == "text":
        return text_fingerprint(config)
    return _fingerprint(config, [name]) | {"format": FORMAT}


def _fingerprint(config: Config, names: list[str]) -> dict[str, Any]:
    chosen: CorpusConfig = replace(config.corpus, corpora={name: config.corpus.corpora[name] for name in names})
    corpus = asdict(chosen)
    for key in ("documents_per_member", "shard_tokens"):
        corpus.pop(key)
    for source in (source for sources in corpus["corpora"].values() for source in sources):
        for key in LATER_KEYS:
            if not source[key]:
                del source[key]
    readers = {source.reader: source_traits(source) for sources in chosen.corpora.values() for source in sources}
    found: dict[str, Any] = {
        "seed": config.seed if any(traits.seeded for traits in readers.values()) else None,
        "revisions": {name: traits.revision for name, traits in readers.items()},
        "corpus": corpus,
    }
    if SAMPLED in readers:
        found |= config.stage.sampled_by()
    return found


def digest(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
