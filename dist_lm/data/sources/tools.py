"""Generated conversations about tools (`dist_lm.tool_data`). The generator says which tools only val may ask for."""

from collections.abc import Iterator

from dist_lm.chat.documents import write_conversation
from dist_lm.config import SourceConfig
from dist_lm.data.sources.candidate import Candidate, text_hash
from dist_lm.document import Document


def read_tools(source: SourceConfig, seed: int) -> Iterator[Candidate]:
    """`source.limit` conversations (0: `DEFAULT_EXAMPLES`); the language of each is `LANGUAGE_KIND`."""
    from dist_lm.tool_data.generate import DEFAULT_EXAMPLES, examples

    for number, example in enumerate(examples(seed, source.limit or DEFAULT_EXAMPLES)):
        text = write_conversation(example.conversation)
        yield Document(
            text=text,
            language=f"{source.language}_{example.kind}",
            source=f"generated:tools:seed={seed}:{number}",
            licence=source.licence,
            group=text_hash(text),
            is_conversation=True,
            split=example.group,
        )
