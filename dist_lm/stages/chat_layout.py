"""Decides whether conversations are laid out by our chat template or by the one that came with an imported model.

A chat template counts as ours if it renders `CONVERSATIONS` generated conversations as ours does, byte for byte: with
and without tools, calls, results and a turn of the system, and of several turns. Otherwise it is kept.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path

from dist_lm.chat.jinja_text import TemplateLimitError, text_of
from dist_lm.chat.messages import ChatError, Conversation, Message
from dist_lm.chat.template import layout
from dist_lm.config.corpus import HF, TokenizerConfig
from dist_lm.errors import ArtefactError
from dist_lm.interop.existing_tokenizer import named_tokenizer_file
from dist_lm.interop.snapshot import chat_template_of, folder_of, special_tokens_of, tokenizer_folder_of
from dist_lm.tokenizer.symbols import END_OF_TEXT
from dist_lm.tokenizer.tokenizer import KeptTemplate, Tokenizer
from dist_lm.tools.data.examples import examples

CONVERSATIONS = 200
SYSTEM = "Answer in one sentence."


def kept_template(folder: Path, tokenizer: Tokenizer) -> KeptTemplate | None:
    """Returns the chat template of a model of transformers; None if it has none, or lays conversations out as ours.

    Its date is today's.

    Args:
        tokenizer: the model's own.

    Raises:
        ArtefactError: a file of the folder cannot be read, or the template exceeds a limit of time or memory.
        UserError: no process can be started that reads the template within its limits.
    """
    text = chat_template_of(folder)
    if not text:
        return None
    # Templates that print the date would lay out a corpus differently tomorrow: the day of the import stays.
    today = datetime.now().astimezone().date().isoformat()
    template = KeptTemplate(text, tuple(sorted(special_tokens_of(folder).items())), today)
    (first_token,) = tokenizer.pieces([tokenizer.first_token.id])
    try:
        if is_ours(template, first_token):
            return None
    except TemplateLimitError as error:
        raise ArtefactError(f"{folder}: {error}; or remove the template from the folder") from error
    return template


def given_template(config: TokenizerConfig) -> KeptTemplate | None:
    """Returns the kept template of the tokenizer that a work directory takes; None: our layout. It may read the hub.

    Raises:
        ArtefactError: the snapshot or the template cannot be read, or the tokenizer has no end-of-text.
        ConfigError: there is no tokenizer at the path.
        UserError: a package that is needed is not installed.
        OSError: a file cannot be read.
    """
    if config.chat_template == "ours" or not config.is_given:
        return None
    if config.source.startswith(HF):
        return _of_snapshot(config.source, named_tokenizer_file(config))
    path = Path(config.source).expanduser()
    return KeptTemplate.read(path if path.is_dir() else path.parent)


# A command asks several times, and the answer takes a download and hundreds of renderings.
@lru_cache(maxsize=2)
def _of_snapshot(source: str, content: bytes) -> KeptTemplate | None:
    return kept_template(tokenizer_folder_of(folder_of(source, weights=False)), Tokenizer(content, source))


def is_ours(template: KeptTemplate, first_token: str) -> bool:
    """Returns whether a template lays out `CONVERSATIONS` conversations as ours does, byte for byte.

    Args:
        first_token: the name of the token that opens documents.

    Raises:
        TemplateLimitError: the template exceeds a limit of time or memory.
    """
    # Templates are programs: only their output tells whether two are the same.
    for conversation in _compared_conversations():
        ours = "".join(part.text for part in layout(conversation)).replace(END_OF_TEXT, first_token)
        try:
            if text_of(conversation, template, texts_as_json=True) != ours:
                return False
        except TemplateLimitError:
            raise
        except ChatError:
            return False
    return True


@cache
def _compared_conversations() -> Sequence[Conversation]:
    return tuple(islice(conversations(), CONVERSATIONS))


def conversations() -> Iterator[Conversation]:
    """Yields different conversations without end, the same at every call: every second one has tools, every third a
    system turn."""
    previous_text = ""
    for number, example in enumerate(examples(0, 10**9)):
        conversation = example.conversation
        contents = [turn.content for turn in conversation.messages if turn.content and turn.role != "system"]

        # Plain conversations: every second one has an exchange in front, so that templates see several turns.
        if number % 2:
            turns = [Message("user", contents[0]), Message("assistant", contents[-1])]
            if number % 4 == 1:
                turns = [Message("user", previous_text or "Hello"), Message("assistant", "Go on."), *turns]
            conversation = Conversation(tuple(turns))

        if number % 3 == 0 and conversation.messages[0].role != "system":
            conversation = Conversation((Message("system", SYSTEM), *conversation.messages), conversation.tools)
        previous_text = " ".join(contents)
        yield conversation
