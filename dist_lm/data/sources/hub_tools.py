"""Requests with the calls that answer them, from a data set of the hub with the columns of xLAM.

Its split is by what is called: the group of a conversation is the names of its calls, or of its tools where none fits.
"""

from collections.abc import Iterator
from pathlib import Path

from dist_lm.chat.documents import write_conversation
from dist_lm.chat.messages import Conversation
from dist_lm.config.corpus import SourceConfig
from dist_lm.data.sources.candidate import Candidate, Rejected, text_hash
from dist_lm.data.sources.hub import hub_rows, licence_of, resumed
from dist_lm.document import Document
from dist_lm.errors import ConfigError, UserError

COLUMNS = ("query", "tools", "answers")


def read_hub_tools(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """Every row of `source.dataset` as a conversation, in the order of the data set. `seed` is not used.

    Raises ConfigError without the `datasets` package or for a column that is not there, ArtefactError where
    the data set cannot be read.
    """
    from dist_lm.tools.data.xlam import conversation_of_row

    if not source.dataset:
        raise ConfigError("corpus source with reader=hub_tools: dataset is empty: expected an id or a local path")
    is_local = Path(source.dataset).expanduser().exists()
    origin = source.dataset if is_local else f"{source.dataset}@{source.revision}"
    for number, row in resumed(hub_rows(source), origin):
        if missing := [column for column in COLUMNS if column not in row]:
            raise ConfigError(
                f"corpus source {source.dataset}: no column {', '.join(missing)}: reader=hub_tools takes query, tools "
                f"and answers; the columns there are {', '.join(sorted(row))}"
            )
        name = f"{origin}:{number}"
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
            group=text_hash(" ".join(asked_for(conversation))),
            form="conversation",
        )


def asked_for(conversation: Conversation) -> list[str]:
    """The names of what is called, in alphabetical order; of all tools where nothing is."""
    called = {call.name for message in conversation.messages for call in message.calls}
    return sorted(called or {tool.name for tool in conversation.tools})
