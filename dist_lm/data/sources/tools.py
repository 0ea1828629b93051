"""Generated conversations about tools (`dist_lm.tool_data`); their groups keep the tools of val out of train."""

from collections.abc import Iterator

from dist_lm.chat.documents import write_conversation
from dist_lm.config import SourceConfig
from dist_lm.data.sources.candidate import Candidate
from dist_lm.document import Document

DEFAULT_DOCUMENTS = 20_000


def read_tools(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """`source.limit` conversations (0: `DEFAULT_DOCUMENTS`); number i depends on `(seed, i)` alone.

    The language of a document is that of the source and the kind of the example: `tools_parallel`.
    """
    from dist_lm.tool_data.examples import examples

    for number, example in enumerate(examples(seed, source.limit or DEFAULT_DOCUMENTS)):
        yield Document(
            text=write_conversation(example.conversation),
            language=f"{source.language}_{example.kind}",
            source=f"generated:tools:seed={seed}:{number}",
            licence=source.licence,
            group=example.group,
            form="conversation",
        )
