"""`python -m dist_lm generate`: answer one prompt, or hold a conversation at a terminal."""

import os
import readline
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TextIO

import torch
from rich.console import Console
from rich.text import Text

from dist_lm.errors import ConfigError, UserError, require
from dist_lm.generation.load import load_model, read_openings
from dist_lm.generation.prompt_loop import PromptLoop, check_whole, unescape, visible
from dist_lm.generation.request import SamplingParams
from dist_lm.generation.session import Session, Settings
from dist_lm.generation.shard import check_tp
from dist_lm.generation.tool_chat import ToolChat, ToolOptions, warning_of
from dist_lm.parallel.mesh import option_device
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tools.use.toolbox import Toolbox

NO_ANSWER = 1  # exit code if a model with tools gives no answer
STOPPED = 130  # exit code after Ctrl-C
SEEDS = 1_000_000  # without --seed one of these is drawn; short enough to type again


def generate(
    path: Path,
    prompt: str | None,
    tokenizer: Path | None,
    values: Mapping[str, object],
    stop: list[str],
    seed: int | None,
    n: int,
    device: str,
    tp: int = 1,
    tools: ToolOptions | None = None,
    suffix: str | None = None,
) -> int:
    """Run the verb. Returns the exit code.

    Args:
        path: a run, a folder of checkpoints, or a checkpoint.
        prompt: None: standard input, or a conversation if that is a terminal.
        values: fields of `SamplingParams`.
        n: number of answers.
        tp: devices that share the model.
        tools: the prompt is a request and not the beginning of a text; the functions the model may call.
        suffix: the text behind the answer, which fills the middle.

    Raises:
        UserError: names the option or the fault of the checkpoint.
    """
    chosen = option_device(device)
    require(tp > 0, "--tp", tp, "a positive integer")
    talks = prompt is None and sys.stdin.isatty()
    settings = _settings(values, stop, seed, n)
    if talks and n != 1:
        raise ConfigError(f"--n={n}: several answers need --prompt; in a conversation use /again")
    if tools and n != 1:
        raise ConfigError(f"--n={n}: {'--tools' if tools.file else '--chat'} gives one answer")
    if suffix is not None:
        _check_argument("--suffix", suffix)
        if talks or tools:
            raise ConfigError("--suffix: expected --prompt, or a prompt on standard input, and no --tools or --chat")
    if talks and not sys.stdout.isatty():
        raise ConfigError("--prompt is missing: it is required if the output is not a terminal")
    name = "--prompt"
    if prompt is not None:
        _check_argument(name, prompt)
    elif not talks:
        prompt, name = _standard_input(), "standard input"
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals with a small character set
    errors = Console(stderr=True, highlight=False)
    with ExitStack() as stack:
        toolbox = stack.enter_context(Toolbox(tools.file, tools.limits)) if tools and tools.file else None
        with errors.status("loading ...") if errors.is_terminal else nullcontext():
            session, run = _load(path, tokenizer, chosen, n, tp)
            stack.enter_context(closing(session))
        chat = ToolChat(session, toolbox, tools.max_rounds) if tools else None
        if toolbox and (warning := warning_of(run.path.parent.name if run else None)):
            errors.print(Text(warning, style="yellow"), soft_wrap=True)
        if prompt is not None and chat:
            return _one_request(session, chat, prompt, settings, sys.stdout, errors)
        if prompt is not None:
            return _one_shot(session, session.tokens(prompt, name, suffix), settings, n, sys.stdout, errors)
        readline.parse_and_bind("set enable-bracketed-paste on")
        console = Console(highlight=False)
        PromptLoop(session, settings, lambda: read_openings(run), console, read_line, interrupts, chat).run()
    return 0


def _load(
    path: Path, tokenizer: Path | None, device: torch.device, answers: int, tp: int
) -> tuple[Session, RunDirectory | None]:
    loaded = load_model(path, tokenizer)
    check_tp(loaded.config, tp, torch.cuda.device_count() if device.type == "cuda" else None, "--tp")
    if tp > 1:  # the processes share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // tp))
    return Session(loaded, device, answers, tp), loaded.run


def _settings(values: Mapping[str, object], stop: list[str], seed: int | None, n: int) -> Settings:
    seed = secrets.randbelow(SEEDS) if seed is None else seed
    whole = {key: value for key, value in values.items() if isinstance(value, int)}
    for text in stop:
        require(bool(text), "--stop", "''", "a text that is not empty")
        _check_argument("--stop", text)
    try:
        for key, value in {**whole, "seed": seed}.items():
            check_whole(key, value)
        require(n > 0, "n", n, "a positive integer")
        params = SamplingParams(**values, stop=tuple(unescape(text) for text in stop))  # type: ignore[arg-type]
    except ConfigError as error:
        key, _, rest = str(error).partition("=")
        raise ConfigError(f"--{key.replace('_', '-')}={rest}") from None
    return Settings(params, seed)


def _standard_input() -> str:
    content = sys.stdin.buffer.read()  # bytes, so that line ends stay as they are
    if not content:
        raise ConfigError("--prompt is missing, and standard input is empty")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: the prompt is not UTF-8 at byte {error.start}") from None


def _check_argument(option: str, text: str) -> None:
    """Check that an argument is text; Python turns other bytes into lone surrogates.

    Raises:
        UserError: names the option and the byte.
    """
    try:
        os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: the text is not UTF-8 at byte {error.start}") from None


def _one_shot(session: Session, prompt: list[int], settings: Settings, n: int, output: TextIO, errors: Console) -> int:
    """Write the answer unchanged while it is generated; several answers at the end, each after a numbered line.

    On a terminal, control characters are replaced by symbols and the last line ends with a newline.
    """
    on_terminal, last = output.isatty(), "\n"

    def put(text: str) -> None:
        nonlocal last
        last = text[-1]
        output.write(visible(text) if on_terminal else text)
        output.flush()

    with interrupts() as interrupted:
        outcome = session.answer(
            prompt, settings, n, lambda index, text: put(text) if n == 1 else None, interrupted=interrupted
        )
    for answer in sorted(outcome.answers, key=lambda answer: answer.index) if n > 1 else ():
        put(f"=== {answer.index + 1} of {n} ===\n{answer.text}")
        if last != "\n":
            put("\n")
    if on_terminal and last != "\n":
        put("\n")
    errors.print(Text(f"{session.name}: {outcome}", style="dim"), soft_wrap=True)
    return STOPPED if outcome.stopped else 0


def _one_request(
    session: Session, chat: ToolChat, request: str, settings: Settings, output: TextIO, errors: Console
) -> int:
    def note(line: str) -> None:
        errors.print(Text(visible(line), style="dim"), soft_wrap=True)

    with interrupts() as interrupted:
        outcome = chat.answer(request, settings, lambda text: None, note, interrupted)
    answer = outcome.exchange.answer
    if answer:
        output.write(f"{visible(answer)}\n" if output.isatty() else answer)
        output.flush()
    note(f"{session.name}: {outcome}")
    return STOPPED if outcome.stopped else 0 if outcome.exchange.ending == "answered" else NO_ANSWER


def read_line(before: str, typed: str) -> str:
    """Read a line that starts with `typed`; arrow keys recall earlier lines."""
    readline.set_startup_hook(lambda: readline.insert_text(typed))
    try:
        return input(before)
    finally:
        readline.set_startup_hook(None)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Replace the effect of Ctrl-C: the value tells whether it was pressed, so that work can end in good order."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
