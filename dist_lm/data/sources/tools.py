"""Generated conversations with tools (`dist_lm.tools.data`); val has other tools than train."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dist_lm.chat.documents import write_conversation
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.candidate import Candidate
from dist_lm.document import Document

if TYPE_CHECKING:
    from dist_lm.tools.data.examples import Example

DEFAULT_DOCUMENTS = 20_000


def read_tools(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """`source.limit` conversations (0: `DEFAULT_DOCUMENTS`); number i depends on `(seed, i)` alone.

    The language of a document is that of the source and the kind of the example: `tools_parallel`.
    """
    from dist_lm.tools.data.examples import examples

    for number, example in enumerate(examples(seed, source.limit or DEFAULT_DOCUMENTS)):
        yield _document(source, example, f"generated:tools:seed={seed}:{number}")


def _document(source: SourceConfig, example: "Example", origin: str) -> Document:
    return Document(
        text=write_conversation(example.conversation),
        language=f"{source.language}_{example.kind}",
        source=origin,
        licence=source.licence,
        group=example.group,
        form="conversation",
    )
