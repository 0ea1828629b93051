"""The prompts of stage `rlhf`: beginnings of the conversations or rankings of a corpus, or rows of files.

A prompt ends where the assistant's turn begins. The prompts of val (of a file: one in `HELD_OUT_OF` by hash) are held
out for the win rate. Reward functions see the row of a prompt: all its columns, and its turns.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import overload

from dist_lm.chat.documents import read_kept_row
from dist_lm.chat.messages import ChatError, Conversation, Message, Tool
from dist_lm.chat.parse import parse
from dist_lm.chat.template import prompt as rendered
from dist_lm.config.root import imported_function
from dist_lm.data.prompt_rows import PROMPT, FileRow, find_rows, prompt_of, read_rows
from dist_lm.data.shard_writer import read_kept_rows
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError, ConfigError, UserError
from dist_lm.rlhf.reward_forms import Form, Judged, form_of
from dist_lm.rlhf.rules import PromptRow
from dist_lm.sandbox.program import Test
from dist_lm.sandbox.task import Task, task_of
from dist_lm.sandbox.weak_tests import note_of_weak
from dist_lm.stages.rlhf.config import RlhfRunConfig, RlhfRunGroup
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.symbols import START
from dist_lm.tokenizer.tokenizer import Tokenizer, text_with_marks

log = logging.getLogger(__name__)

HELD_OUT_OF = 16
PROMPTS_FROM, HELD_OUT_FROM = "rlhf.prompts_from", "rlhf.held_out_from"


@dataclass(frozen=True)
class Prompts(Sequence[Sequence[int]]):
    """Token ids of prompts, each with its row."""

    tokens: list[Sequence[int]] = field(default_factory=list)
    rows: list[PromptRow] = field(default_factory=list)  # the row of each; empty if no reward function reads rows
    # the tools that each one offers; empty unless rlhf.constraint takes calls from them
    tools: list[Sequence[Tool]] = field(default_factory=list)

    def row_of(self, index: int) -> PromptRow:
        """Returns what the data say about a prompt; nothing if no reward function reads it."""
        return self.rows[index] if self.rows else PromptRow()

    def chosen(self, indices: Iterable[int]) -> "Prompts":
        """Returns the prompts at these positions, with their rows and tools."""
        positions = list(indices)
        rows = [self.rows[i] for i in positions] if self.rows else []
        tools = [self.tools[i] for i in positions] if self.tools else []
        return Prompts([self.tokens[i] for i in positions], rows, tools)

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> Sequence[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sequence[int]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[int] | list[Sequence[int]]:
        return self.tokens[index]


def read_all(
    config: RlhfRunConfig, run: RunDirectory, tokenizer: Tokenizer, judges: bool = True
) -> tuple[Prompts, Prompts]:
    """Returns (prompts, held-out prompts) as token ids, with their rows if a reward function may read them, and their
    tools if calls are constrained. Prompts too long for an answer are left out with a warning.

    Of the held-out ones the first `held_out_prompts` that fit are returned.

    Args:
        judges: whether this rank calls the functions; others need no rows.

    Raises:
        ArtefactError: no prompt is left, a prompt is invalid, or the corpus holds texts.
        ConfigError: there is no such file of prompts.
    """
    settings = config.rlhf
    with_rows = judges and any(part.kind == "function" for part in settings.rewards.values())
    with_tools = settings.constrains_calls
    if settings.prompts_from:
        prompts = _of_files(settings.prompts_from, PROMPTS_FROM, tokenizer, with_rows, with_tools)
        train, held_out = _split(prompts, all_for_training=bool(settings.held_out_from))
    else:
        corpus = config.corpus_in(run.work, config.stage.corpus)
        splits = ("train", "val")
        train, held_out = (_of_corpus(corpus, split, tokenizer, with_rows, with_tools) for split in splits)
    if settings.held_out_from:
        held_out = _of_files(settings.held_out_from, HELD_OUT_FROM, tokenizer, with_rows, with_tools)

    # A prompt must leave room for the longest completion.
    room = config.model.max_seq_len - settings.max_new_tokens
    short = train.chosen(i for i, prompt in enumerate(train) if len(prompt) <= room)
    if len(short) < len(train):
        log.warning(
            "%d of %d prompts have over %d tokens (model.max_seq_len=%d less rlhf.max_new_tokens=%d) and are left out",
            *(len(train) - len(short), len(train), room, config.model.max_seq_len, settings.max_new_tokens),
        )
    if not train and settings.prompts_from:
        raise ArtefactError(
            f"{PROMPTS_FROM}={settings.prompts_from}: a hash holds out one prompt in {HELD_OUT_OF}, here all of "
            f"{len(held_out)}: add prompts, or name a file of held-out ones by {HELD_OUT_FROM}"
        )
    if not short:
        raise ArtefactError(f"stage rlhf: none of {len(train)} prompts has at most {room} tokens; shorten them")

    fitting = [i for i, prompt in enumerate(held_out) if len(prompt) <= room]
    compared = held_out.chosen(fitting[: settings.held_out_prompts])
    if len(compared) < settings.held_out_prompts:
        log.info(
            "held-out prompts: %d, fewer than rlhf.held_out_prompts=%d; the win rate uses these",
            *(len(compared), settings.held_out_prompts),
        )
    return short, compared


def check_prompts(settings: RlhfRunGroup) -> None:
    """Refuses invalid files of prompts and reward functions before the run starts; imports the functions.

    Warns of tasks whose tests say little about an answer.

    Raises:
        ConfigError: a function cannot be imported, has an unknown form or needs a column that no row has; or there is
            no file of rows. Names the key.
        ArtefactError: a prompt is invalid or lacks the tests or the ground truth that a reward asks for, which names
            the key, file and line; or the files of a key have no prompts, which names the key.
    """
    forms = forms_of(settings)
    for key, pattern in _files(settings):
        tasks: dict[str, tuple[str, Sequence[Test]]] = {}
        rows: list[tuple[str, Mapping[str, object]]] = []
        for row, _ in _prompts_of(pattern, key):
            if _asks_tests(settings):
                task = _task(row, key, readable=False)
                tasks[row.place] = task.language, task.tests
            rows.append((f"{key}: {row.place}", row.columns))
        if tasks and (note := note_of_weak(tasks)):
            log.warning("%s: %s", key, note)
        check_columns(forms, rows)


def forms_of(settings: RlhfRunGroup) -> dict[str, Form]:
    """Imports the reward functions and returns the form of each, by the key that names it.

    Raises:
        ConfigError: one cannot be imported, or has an unknown form; names the key.
    """
    forms = {}
    for name, part in settings.rewards.items():
        if part.kind == "function":
            key = f"rlhf.rewards.{name}.function"
            function = imported_function(part.function, key)
            try:
                forms[f"{key}={part.function}"] = form_of(function)
            except ValueError as error:
                raise ConfigError(f"{key}={part.function}: {error}") from None
    return forms


def check_columns(forms: Mapping[str, Form], rows: Sequence[tuple[str, Mapping[str, object]]]) -> None:
    """Refuses functions whose columns are not there; returns nothing.

    Args:
        forms: by the key of the function.
        rows: (place, columns) of each prompt.

    Raises:
        ConfigError: no row has a column that a function of TRL's form cannot do without.
        ArtefactError: a row has no ground truth, which a function of verl's form reads.
    """
    names = dict.fromkeys(name for _, columns in rows for name in columns)
    for key, form in forms.items():
        if missing := sorted(form.columns - {*names}):
            raise ConfigError(
                f"{key}: needs {', '.join(missing)}, which no row of the prompts has: the columns there are "
                f"{', '.join(names) or 'none'}"
            )
        if form.needs_ground_truth:
            for origin, columns in rows:
                if Judged("", "", columns=columns).ground_truth is None:
                    raise ArtefactError(
                        f"{origin}: no ground truth, which {key} reads: expected reward_model.ground_truth or a column "
                        f"ground_truth; the columns there are {', '.join(columns)}"
                    )


def tasks_of(settings: RlhfRunGroup, tokenizer: Tokenizer) -> dict[str, Task]:
    """Returns the tests of all prompts by the text of the prompt as a model sees it; none if no reward asks for them.

    `check_prompts`, before the run started, read every test in its language.

    Raises:
        ArtefactError: names the key, file and line of a prompt that is invalid, has no tests, or has different ones in
            two lines.
        ConfigError: there is no such file of prompts.
    """
    if not _asks_tests(settings):
        return {}

    tasks: dict[str, Task] = {}
    for key, pattern in _files(settings):
        for row, conversation in _prompts_of(pattern, key):
            text = tokenizer.decode(_rendered(conversation, row, key, tokenizer))
            task = _task(row, key, readable=True)
            if tasks.setdefault(text, task) != task:
                raise ArtefactError(f"{key}: {row.place}: the same prompt has other tests in a line before")
    return tasks


def request_reader(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """Returns a function that reads the text of the user's last turn from the tokens of a prompt.

    It renders a conversation with the request `probe` to learn the text around a request.

    Raises:
        ChatError: a kept chat template cannot write a request.
    """
    conversation = Conversation((Message("user", "probe"),))
    before, _, after = text_with_marks(rendered(conversation, tokenizer), tokenizer).rpartition("probe")
    before_request = before[max(0, *(before.rfind(name) for name in (START, *tokenizer.special_ids))) :]

    def request_of(tokens: Sequence[int]) -> str:
        text = text_with_marks(tokens, tokenizer).removesuffix(after)
        # Without text before the request, every prompt is the request.
        if not before_request:
            return text
        return text.rpartition(before_request)[2]

    return request_of


def tools_of_files(settings: RlhfRunGroup) -> Iterator[Sequence[Tool]]:
    """Yields the tools of each prompt of rlhf.prompts_from.

    Raises:
        ConfigError, ArtefactError: as `check_prompts`.
    """
    for _, conversation in _prompts_of(settings.prompts_from, PROMPTS_FROM):
        yield conversation.tools


def _files(settings: RlhfRunGroup) -> list[tuple[str, str]]:
    """Returns the keys of files of prompts that are set, with their file or glob."""
    keys = ((PROMPTS_FROM, settings.prompts_from), (HELD_OUT_FROM, settings.held_out_from))
    return [(key, pattern) for key, pattern in keys if pattern]


def _asks_tests(settings: RlhfRunGroup) -> bool:
    return any(part.kind == "tests" for part in settings.rewards.values())


def _task(row: FileRow, key: str, readable: bool) -> Task:
    try:
        return task_of(row.columns, readable)
    except UserError as error:
        raise ArtefactError(f"{key}: {row.place}: {error} (a reward of kind tests needs them)") from None


def _of_corpus(directory: Path, split: str, tokenizer: Tokenizer, with_rows: bool, with_tools: bool) -> Prompts:
    """Returns the tokens of each document before its first learned token: before the assistant's turn or the
    completions.

    Each prompt occurs once, though several rankings may have the same one. Empty prompts are left out.

    Args:
        with_rows: also return the rows.
        with_tools: also return the tools.

    Raises:
        ArtefactError: the corpus is missing, or holds texts; or it does not tell the tools.
    """
    corpus = TokenCorpus.open(directory, split)
    if not corpus.has_mask:
        raise ArtefactError(
            f"corpus {directory}: expected conversations or rankings, whose prompts are gone on with: choose another "
            "stage.corpus, or give rlhf.prompts_from=FILE"
        )

    # A dict keeps the order of the corpus and each prompt once.
    prompts: dict[tuple[int, ...], tuple[PromptRow, Sequence[Tool]]] = {}
    reads_rows = with_rows or with_tools
    kept_rows = read_kept_rows(directory, split) if reads_rows else repeat("")
    for document, kept_row in zip(range(corpus.n_documents), kept_rows, strict=reads_rows):
        length = int(corpus.lengths[document])
        first_learned = int(corpus.mask(document, 0, length).argmax())
        stored_ids = corpus.tokens(document, 0, first_learned).copy()
        token_ids = tuple(tokenizer.first_token.put(stored_ids).tolist())
        if token_ids and token_ids not in prompts:
            row, tools = PromptRow(), ()
            if with_rows:
                row = _row_of(kept_row, stored_ids.tolist(), tokenizer)
            if with_tools:
                tools = _tools_of(kept_row, stored_ids.tolist(), tokenizer, directory)
            prompts[token_ids] = row, tools

    rows = [row for row, _ in prompts.values()] if with_rows else []
    tools_of_prompts = [tools for _, tools in prompts.values()] if with_tools else []
    return Prompts([list(prompt) for prompt in prompts], rows, tools_of_prompts)


def _tools_of(kept_row: str, token_ids: Sequence[int], tokenizer: Tokenizer, directory: Path) -> Sequence[Tool]:
    """Returns the tools that a prompt of a corpus offers: of its row, else as they are read from its tokens.

    Args:
        kept_row: empty: a corpus of an older release, or of generated conversations.
        directory: of the corpus.

    Raises:
        ArtefactError: the corpus has no row, and the layout of an imported model cannot be read back.
    """
    if kept_row:
        return read_kept_row(kept_row)[0].tools
    if tokenizer.kept_template:
        raise ArtefactError(
            f"corpus {directory}: keeps no rows, which would tell the tools of its prompts (rlhf.constraint): "
            "build it again, or give rlhf.prompts_from=FILE"
        )
    return _parsed(token_ids, tokenizer).tools


def _parsed(token_ids: Sequence[int], tokenizer: Tokenizer) -> Conversation:
    """Returns the conversation of a prompt in our own layout, read back from its tokens."""
    opening = len(tokenizer.mark(START)) + len(tokenizer.encode("assistant\n"))
    return parse(token_ids[:-opening], tokenizer)


def _row_of(kept_row: str, token_ids: Sequence[int], tokenizer: Tokenizer) -> PromptRow:
    """Returns what a corpus knows about a prompt: its row; or the turns alone, read from the tokens. The layout of an
    imported model cannot be read back; for such a model there is the user's last turn alone.

    Args:
        kept_row: empty: a corpus of an older release, or of generated conversations.

    Raises:
        ChatError: the row or the tokens hold no well-formed turns.
    """
    from dist_lm.chat.jinja_text import messages_of  # imports jinja2, which the launcher does without

    if kept_row:
        conversation, columns = read_kept_row(kept_row)
        return PromptRow(messages_of(conversation.messages), columns)
    if tokenizer.kept_template:
        return PromptRow([{"role": "user", "content": request_reader(tokenizer)(token_ids)}])
    return PromptRow(messages_of(_parsed(token_ids, tokenizer).messages))


def _of_files(pattern: str, key: str, tokenizer: Tokenizer, with_rows: bool, with_tools: bool) -> Prompts:
    from dist_lm.chat.jinja_text import messages_of  # imports jinja2, which the launcher does without

    prompts = Prompts()
    for row, conversation in _prompts_of(pattern, key):
        prompts.tokens.append(_rendered(conversation, row, key, tokenizer))
        if with_tools:
            prompts.tools.append(conversation.tools)
        if with_rows:
            messages, columns = messages_of(conversation.messages), row.columns
            # Turns that a table holds as JSON text are turns for functions too.
            if isinstance(columns.get(PROMPT), str) and conversation.messages[0].content != columns[PROMPT]:
                columns = {**columns, PROMPT: messages}
            prompts.rows.append(PromptRow(messages, columns))
    return prompts


def _rendered(conversation: Conversation, row: FileRow, key: str, tokenizer: Tokenizer) -> Sequence[int]:
    try:
        return rendered(conversation, tokenizer)
    except ChatError as error:
        raise ArtefactError(f"{key}: {row.place}: {error}") from error


def _prompts_of(pattern: str, key: str) -> Iterator[tuple[FileRow, Conversation]]:
    """Yields the rows of the files that `key` names, each with its prompt.

    Raises:
        ConfigError: there is no such file.
        ArtefactError: a row is broken, its prompt is invalid, or there is none.
    """
    row = None
    for row in read_rows(find_rows(pattern, key)):
        if row.error:
            raise ArtefactError(f"{key}: {row.place}: {row.error}")
        if row.columns.get("suffix") is not None:
            raise ArtefactError(f"{key}: {row.place}: has a `suffix`, which no turn of a chat has: remove it")
        # The rank that renders it would refuse it too, but only once all of them have started.
        try:
            conversation = prompt_of(row.columns)
        except ChatError as error:
            raise ArtefactError(f"{key}: {row.place}: {error}") from error
        yield row, conversation

    if row is None:
        raise ArtefactError(f"{key}={pattern}: no prompts there; expected a file or glob with some")


def _split(prompts: Prompts, all_for_training: bool) -> tuple[Prompts, Prompts]:
    """Returns the prompts for training and the held-out ones: one in `HELD_OUT_OF`, by the hash of the prompt; none
    with `all_for_training`.
    """
    if all_for_training:
        return prompts, Prompts()
    is_held_out = [_is_held_out(prompt) for prompt in prompts]
    train = prompts.chosen(i for i, held_out in enumerate(is_held_out) if not held_out)
    return train, prompts.chosen(i for i, held_out in enumerate(is_held_out) if held_out)


def _is_held_out(prompt: Sequence[int]) -> bool:
    """Decides by a hash of the prompt, so that it stays on its side when the file grows."""
    # A random choice would move prompts between the sides when a line is added.
    return hashlib.sha256(repr(list(prompt)).encode()).digest()[0] % HELD_OUT_OF == 0
