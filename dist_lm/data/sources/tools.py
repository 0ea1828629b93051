"""Reads conversations with tools: generated ones (`dist_lm.tools.data`), and rows of a hub data set in xLAM's format.

Both are split by tool: the tools of val conversations appear in no train conversation.
"""

from collections.abc import Iterator

from dist_lm.chat.documents import write_conversation
from dist_lm.chat.messages import Conversation
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.formats import BadRow
from dist_lm.data.sources.hub import HUB_KEYS, data_set_rows, list_data_set
from dist_lm.data.sources.reader import Candidate, Rejected, reader, text_hash
from dist_lm.data.sources.rows import licence_of, looked_ahead, named_columns, own_licence
from dist_lm.data.sources.snapshot import Snapshot
from dist_lm.document import Document
from dist_lm.errors import UserError
from dist_lm.tools.data.examples import REVISION, examples
from dist_lm.tools.data.xlam import conversation_of_row

DEFAULT_DOCUMENTS = 8_000
COLUMNS = ("query", "tools", "answers")


@reader(form="conversation", seeded=True, revision=REVISION)
def read_tools(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Yields `source.limit` generated conversations (0: `DEFAULT_DOCUMENTS`); number i depends on `(seed, i)` alone.

    The language of a document is that of the source and the kind of the example: `tools_parallel`. Nothing is read.
    """
    for number, example in enumerate(examples(seed, source.limit or DEFAULT_DOCUMENTS)):
        yield Document(
            text=write_conversation(example.conversation),
            language=f"{source.language}_{example.kind}",
            source=f"generated:tools:seed={seed}:{number}",
            licence=source.licence,
            group=example.group,
            form="conversation",
        )


@reader(
    form="conversation",
    keys=("language", "licence", *HUB_KEYS, "path", "exclude", "licence_column"),
    needs=("language", "dataset|path"),
    inputs=list_data_set,
    takes_files=True,
    advice="check dataset and split; no row makes a conversation",
)
def read_hub_tools(source: SourceConfig, seed: int, files: Snapshot | None = None) -> Iterator[Candidate]:
    """Yields every row of a data set, or of files with its columns, as a conversation. `seed` is not used.

    A row that is broken, or makes no conversation (`invalid_calls`), is yielded as `Rejected`.

    Raises:
        ConfigError: a column is missing, or as `data_set_rows`.
        ArtefactError: the data set or a file cannot be read.
    """
    for source_row in looked_ahead(source, data_set_rows(source, files), named_columns(source, *COLUMNS)):
        name, row = source_row.location, source_row.row
        if isinstance(row, BadRow):
            yield Rejected(source.language, name, row.reason, row.words)
            continue

        try:
            conversation = conversation_of_row(row)
            text = write_conversation(conversation)
        except UserError:
            yield Rejected(source.language, name, "invalid_calls")
            continue

        yield Document(
            text=text,
            language=f"{source.language}_hub",
            source=name,
            licence=licence_of(row, source),
            # Conversations that call the same tools are in one split.
            group=text_hash(" ".join(_tools_of(conversation))),
            form="conversation",
            own_licence=bool(own_licence(row, source)),
        )


def _tools_of(conversation: Conversation) -> list[str]:
    """Returns the names of the tools that are called, in alphabetical order; without a call, all tools."""
    called = {call.name for message in conversation.messages for call in message.calls}
    return sorted(called or {tool.name for tool in conversation.tools})
