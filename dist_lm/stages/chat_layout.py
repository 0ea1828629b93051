"""Whose layout conversations have: ours, or that of the chat template that came with an imported model.

A chat template counts as ours if it renders `CONVERSATIONS` generated conversations as ours does, byte for byte: with
and without tools, calls, results and a turn of the system, and of several turns. Otherwise it is kept.
"""

from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path

from dist_lm.chat.jinja_text import text_of
from dist_lm.chat.messages import ChatError, Conversation, Message
from dist_lm.chat.template import layout
from dist_lm.config.corpus import HF, TokenizerConfig
from dist_lm.interop.existing_tokenizer import given_tokenizer
from dist_lm.interop.snapshot import chat_template_of, folder_of, special_tokens_of
from dist_lm.tokenizer.symbols import END_OF_TEXT
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer
from dist_lm.tools.data.examples import examples

CONVERSATIONS = 200
SYSTEM = "Answer in one sentence."


def kept_template(folder: Path, tokenizer: Tokenizer) -> KeptTemplate | None:
    """The chat template of a model of transformers; None if it has none, or lays conversations out as ours.

    Args:
        tokenizer: of the model.
    """
    text = chat_template_of(folder)
    if not text:
        return None
    today = datetime.now().astimezone().date().isoformat()
    kept = KeptTemplate(text, tuple(sorted(special_tokens_of(folder).items())), today)
    (opening,) = tokenizer.pieces([tokenizer.opening.first])
    return None if is_ours(kept, opening) else kept


def given_template(config: TokenizerConfig) -> KeptTemplate | None:
    """The layout of the conversations of a work directory: the kept template of the tokenizer that it takes."""
    if config.chat_template == "ours" or not config.is_given:
        return None
    if config.source.startswith(HF):
        return _of_snapshot(config.source, given_tokenizer(config))
    path = Path(config.source).expanduser()
    return KeptTemplate.read(path if path.is_dir() else path.parent)


@lru_cache(maxsize=2)
def _of_snapshot(source: str, content: bytes) -> KeptTemplate | None:
    return kept_template(folder_of(source, weights=False), Tokenizer(content, source))


def is_ours(kept: KeptTemplate, opening: str) -> bool:
    """Whether a template lays conversations out as ours. `opening`: the name of the token that opens documents."""
    for conversation in islice(conversations(), CONVERSATIONS):
        ours = "".join(part.text for part in layout(conversation)).replace(END_OF_TEXT, opening)
        try:
            if text_of(conversation, kept, texts_as_json=True) != ours:
                return False
        except ChatError:
            return False
    return True


def conversations() -> Iterator[Conversation]:
    """Different conversations, the same at every call: every second one has tools, every third one a system turn."""
    texts = ""
    for number, example in enumerate(examples(0, 10**9)):
        found = example.conversation
        words = [message.content for message in found.messages if message.content and message.role != "system"]
        if number % 2:  # plain, with what was said before in a turn of its own
            turns = [Message("user", texts or "Hello"), Message("assistant", "Go on.")] if number % 4 == 1 else []
            found = Conversation((*turns, Message("user", words[0]), Message("assistant", words[-1])))
        if number % 3 == 0 and found.messages[0].role != "system":
            found = Conversation((Message("system", SYSTEM), *found.messages), found.tools)
        texts = " ".join(words)
        yield found
