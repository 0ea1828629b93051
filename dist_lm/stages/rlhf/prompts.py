"""The prompts of stage `rlhf`: beginnings of the conversations or rankings of a corpus, or requests from files.

A prompt ends where the assistant's turn begins. The prompts of val (of a file: one in `HELD_OUT_OF` by hash) are held
out for the win rate.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dist_lm.chat.messages import ChatError, Conversation, Message
from dist_lm.chat.template import prompt as rendered
from dist_lm.config.root import imported_function
from dist_lm.data.prompts import Prompt, find_prompts, read_prompts
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ArtefactError, UserError
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

Prompts = list[Sequence[int]]


def read_all(config: RlhfRunConfig, run: RunDirectory, tokenizer: Tokenizer) -> tuple[Prompts, Prompts]:
    """Returns (prompts, held-out prompts) as token ids. Prompts too long for an answer are left out with a warning.

    Of the held-out ones the first `held_out_prompts` that fit are returned.

    Raises:
        ArtefactError: no prompt is left, a prompt is invalid, or the corpus holds texts.
        ConfigError: there is no such file of prompts.
    """
    settings = config.rlhf
    if settings.prompts_from:
        prompts = _of_files(settings.prompts_from, PROMPTS_FROM, tokenizer)
        train, held_out = _split(prompts, all_for_training=bool(settings.held_out_from))
    else:
        corpus = run.work.corpus(config.stage.corpus)
        train, held_out = (_of_corpus(corpus, split, tokenizer) for split in ("train", "val"))
    if settings.held_out_from:
        held_out = _of_files(settings.held_out_from, HELD_OUT_FROM, tokenizer)

    # A prompt must leave room for the longest completion.
    room = config.model.max_seq_len - settings.max_new_tokens
    short = [prompt for prompt in train if len(prompt) <= room]
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

    compared = [prompt for prompt in held_out if len(prompt) <= room][: settings.held_out_prompts]
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
        ConfigError: a function cannot be imported, or there is no file of .jsonl or .txt; names the key.
        ArtefactError: a prompt is invalid or lacks the tests that a reward asks for, which names the key, file and
            line; or the files of a key have no prompts, which names the key.
    """
    for key, pattern in _files(settings):
        tasks: dict[str, tuple[str, Sequence[Test]]] = {}
        for prompt in _prompts_of(pattern, key):
            if _asks_tests(settings):
                task = _task(prompt, key, readable=False)
                tasks[prompt.place] = task.language, task.tests
        if tasks and (note := note_of_weak(tasks)):
            log.warning("%s: %s", key, note)

    for name, part in settings.rewards.items():
        if part.kind == "function":
            imported_function(part.function, f"rlhf.rewards.{name}.function")


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
        for prompt in _prompts_of(pattern, key):
            text = tokenizer.decode(_rendered(prompt, key, tokenizer))
            task = _task(prompt, key, readable=True)
            if tasks.setdefault(text, task) != task:
                raise ArtefactError(f"{key}: {prompt.place}: the same prompt has other tests in a line before")
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


def _files(settings: RlhfRunGroup) -> list[tuple[str, str]]:
    """Returns the keys of files of prompts that are set, with their file or glob."""
    keys = ((PROMPTS_FROM, settings.prompts_from), (HELD_OUT_FROM, settings.held_out_from))
    return [(key, pattern) for key, pattern in keys if pattern]


def _asks_tests(settings: RlhfRunGroup) -> bool:
    return any(part.kind == "tests" for part in settings.rewards.values())


def _task(prompt: Prompt, key: str, readable: bool) -> Task:
    try:
        return task_of(prompt.extra, readable)
    except UserError as error:
        raise ArtefactError(f"{key}: {prompt.place}: {error} (a reward of kind tests needs them)") from None


def _of_corpus(directory: Path, split: str, tokenizer: Tokenizer) -> Prompts:
    """Returns the tokens of each document before the first learned one: before the assistant's turn or the completions.

    Each prompt occurs once, though several rankings may have the same one. Empty prompts are left out.

    Raises:
        ArtefactError: the corpus is missing, or holds texts.
    """
    corpus = TokenCorpus.open(directory, split)
    if not corpus.has_mask:
        raise ArtefactError(
            f"corpus {directory}: expected conversations or rankings, whose prompts are gone on with: choose another "
            "stage.corpus, or give rlhf.prompts_from=FILE"
        )
    # A dict keeps the order of the corpus and each prompt once.
    prompts: dict[tuple[int, ...], None] = {}
    for document in range(corpus.n_documents):
        length = int(corpus.lengths[document])
        first_learned = int(corpus.mask(document, 0, length).argmax())
        token_ids = tokenizer.first_token.put(corpus.tokens(document, 0, first_learned).copy())
        prompts[tuple(token_ids.tolist())] = None
    return [list(prompt) for prompt in prompts if prompt]


def _of_files(pattern: str, key: str, tokenizer: Tokenizer) -> Prompts:
    return [_rendered(prompt, key, tokenizer) for prompt in _prompts_of(pattern, key)]


def _rendered(prompt: Prompt, key: str, tokenizer: Tokenizer) -> Sequence[int]:
    try:
        return rendered(Conversation((Message("user", prompt.text),)), tokenizer)
    except ChatError as error:
        raise ArtefactError(f"{key}: {prompt.place}: {error}") from error


def _prompts_of(pattern: str, key: str) -> Iterator[Prompt]:
    """Yields the prompts of the files that `key` names.

    Raises:
        ConfigError: there is no such file.
        ArtefactError: a prompt is invalid, or there is none.
    """
    prompt = None
    for prompt in read_prompts(find_prompts(pattern, key=key)):
        if prompt.error:
            raise ArtefactError(f"{key}: {prompt.place}: {prompt.error}")
        if prompt.suffix is not None:
            raise ArtefactError(f"{key}: {prompt.place}: has a `suffix`, which no turn of a chat has: remove it")
        # The rank that renders it would refuse it too, but only once all of them have started.
        if not prompt.text:
            raise ArtefactError(f"{key}: {prompt.place}: the prompt is empty: write a request, or remove the line")
        yield prompt

    if prompt is None:
        raise ArtefactError(f"{key}={pattern}: no prompts there; expected a file or glob of .jsonl or .txt with some")


def _split(prompts: Prompts, all_for_training: bool) -> tuple[Prompts, Prompts]:
    """Returns the prompts for training and the held-out ones: one in `HELD_OUT_OF`, by the hash of the prompt; none
    with `all_for_training`.
    """
    if all_for_training:
        return prompts, []
    train: Prompts = []
    held_out: Prompts = []
    for prompt in prompts:
        if _is_held_out(prompt):
            held_out.append(prompt)
        else:
            train.append(prompt)
    return train, held_out


def _is_held_out(prompt: Sequence[int]) -> bool:
    """Decides by a hash of the prompt, so that it stays on its side when the file grows."""
    # A random choice would move prompts between the sides when a line is added.
    return hashlib.sha256(repr(list(prompt)).encode()).digest()[0] % HELD_OUT_OF == 0
