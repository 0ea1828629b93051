"""One reader a kind of source: each yields documents, and what it could not make one of."""

from collections.abc import Callable, Iterator

from dist_lm.config import SourceConfig
from dist_lm.data.sources.bash import read_bash
from dist_lm.data.sources.candidate import Candidate
from dist_lm.data.sources.english import read_english
from dist_lm.data.sources.hub import read_hub
from dist_lm.data.sources.hub_tools import read_hub_tools
from dist_lm.data.sources.python import read_python
from dist_lm.data.sources.sql import read_sql
from dist_lm.data.sources.tools import read_tools

READERS: dict[str, Callable[[SourceConfig, int], Iterator[Candidate]]] = {
    "english": read_english,
    "python": read_python,
    "bash": read_bash,
    "sql": read_sql,
    "hub": read_hub,
    "tools": read_tools,
    "hub_tools": read_hub_tools,
}
CONVERSATION_READERS = {"tools", "hub_tools"}
