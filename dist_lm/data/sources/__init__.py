"""One reader a kind of source: each yields documents, and what it could not make one of."""

from collections.abc import Callable, Iterator

from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.bash import read_bash
from dist_lm.data.sources.candidate import Candidate
from dist_lm.data.sources.english import read_english
from dist_lm.data.sources.hub import read_hub
from dist_lm.data.sources.hub_tools import read_hub_tools
from dist_lm.data.sources.python import read_python
from dist_lm.data.sources.rankings import read_hub_rankings, read_local_rankings, read_synthetic_rankings
from dist_lm.data.sources.sql import read_sql
from dist_lm.data.sources.tools import read_tools
from dist_lm.document import Form

READERS: dict[str, Callable[[SourceConfig, int], Iterator[Candidate]]] = {
    "english": read_english,
    "python": read_python,
    "bash": read_bash,
    "sql": read_sql,
    "hub": read_hub,
    "tools": read_tools,
    "hub_tools": read_hub_tools,
    "rankings": read_local_rankings,
    "hub_rankings": read_hub_rankings,
    "synthetic_rankings": read_synthetic_rankings,
}
_NOT_TEXT: dict[str, Form] = {
    "tools": "conversation",
    "hub_tools": "conversation",
    "rankings": "ranking",
    "hub_rankings": "ranking",
    "synthetic_rankings": "ranking",
}
FORMS: dict[str, Form] = {reader: _NOT_TEXT.get(reader, "text") for reader in READERS}
"""What the documents of each reader are."""
