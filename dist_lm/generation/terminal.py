"""Runs `python -m dist_lm generate`: answers one prompt, or holds a conversation at a terminal."""

import json
import os
import readline
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TextIO

import torch
from rich.console import Console
from rich.text import Text

from dist_lm.errors import ConfigError, UserError, require
from dist_lm.generation.constraint import Constraint
from dist_lm.generation.load import load_model, read_openings
from dist_lm.generation.prompt_loop import PromptLoop, check_whole, unescape
from dist_lm.generation.request import SamplingParams
from dist_lm.generation.session import Session, Settings
from dist_lm.generation.shard import check_tp
from dist_lm.generation.tool_chat import ToolChat, ToolOptions, warning_of
from dist_lm.parallel.mesh import option_device
from dist_lm.storage.process import CpuUsage
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tools.use.toolbox import Toolbox
from dist_lm.tracking.readable import OutputConsole, visible

NO_ANSWER = 1  # exit code if a model with tools gives no answer
STOPPED = 130  # exit code after Ctrl-C
SEEDS = 1_000_000  # the drawn seed lies below: short enough to type again


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
    opening: bool = True,
    constraint: str | None = None,
) -> int:
    """Writes answers to standard output, or holds a conversation until the user leaves. Returns the exit code.

    It is 0, NO_ANSWER if a model with tools gives no answer, or STOPPED after Ctrl-C. Ctrl-C has no other effect
    meanwhile.

    Args:
        path: a run, a folder of checkpoints, or a checkpoint.
        prompt: None: standard input, or a conversation if that is a terminal.
        values: fields of `SamplingParams`.
        seed: None: a random one.
        n: number of answers.
        tp: devices that share the model.
        tools: the functions the model may call; with them the prompt is a request and not the beginning of a text.
        suffix: the text behind the answer, which fills the middle.
        opening: whether a prompt begins with the token that opens a document.
        constraint: JSON as `Constraint.from_json` takes it, or the path of a file that holds it.

    Raises:
        UserError: names the option (ConfigError), the fault of the checkpoint or tokenizer (ArtefactError) or of the
            file of functions, or why the prompt cannot be answered.
        RankLostError: with tp > 1, another process of the model has ended.
    """
    model_device = option_device(device)
    require(tp > 0, "--tp", tp, "a positive integer")
    settings = _settings(values, stop, seed, n)
    if constraint is not None:
        if tools and tools.file:
            raise ConfigError("--constraint: expected no --tools, whose calls have a form of their own")
        settings = replace(settings, constraint=read_constraint(constraint))
    is_conversation = prompt is None and sys.stdin.isatty()
    _check_options(is_conversation, n, tools, suffix, opening)

    prompt_name = "--prompt"
    if prompt is not None:
        _check_argument(prompt_name, prompt)
    elif not is_conversation:
        prompt, prompt_name = _standard_input(), "standard input"

    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for terminals with a small character set
    errors = OutputConsole(stderr=True)
    with ExitStack() as stack:
        # A faulty file of functions is refused before the model is loaded.
        toolbox = chat = None
        if tools and tools.file:
            toolbox = stack.enter_context(Toolbox(tools.file, tools.limits))
        with errors.status("loading ...") if errors.is_terminal else nullcontext():
            session, run = _load(path, tokenizer, model_device, n, tp, opening, errors)
            stack.enter_context(closing(session))
        if tools:
            chat = ToolChat(session, toolbox, tools.max_rounds, tools.choice)
        if toolbox and run and (warning := warning_of(run.path.parent.name)):
            errors.print(Text(warning, style="yellow"), soft_wrap=True)

        if prompt is not None and chat:
            return _answer_request(session, chat, prompt, settings, sys.stdout, errors)
        if prompt is not None:
            prompt_ids = session.tokens(prompt, prompt_name, suffix)
            return _continue_text(session, prompt_ids, settings, n, sys.stdout, errors)

        # Bracketed paste makes pasted lines one prompt.
        readline.parse_and_bind("set enable-bracketed-paste on")
        console = OutputConsole()
        PromptLoop(session, settings, lambda: read_openings(run), console, read_line, interrupts, chat).run()
    return 0


def _check_options(is_conversation: bool, n: int, tools: ToolOptions | None, suffix: str | None, opening: bool) -> None:
    """Refuses options that exclude each other, a --suffix that is not UTF-8, and a conversation whose output is not a
    terminal.

    Raises:
        UserError: names the option; a ConfigError, except for a --suffix that is not UTF-8.
    """
    if is_conversation and n != 1:
        raise ConfigError(f"--n={n}: several answers need --prompt; in a conversation use /again")
    if tools and n != 1:
        raise ConfigError(f"--n={n}: {'--tools' if tools.file else '--chat'} gives one answer")
    if not opening and (tools or suffix is not None):
        raise ConfigError("--no-opening: expected a plain prompt, without --tools, --chat and --suffix")
    if suffix is not None:
        _check_argument("--suffix", suffix)
        if is_conversation or tools:
            raise ConfigError("--suffix: expected --prompt, or a prompt on standard input, and no --tools or --chat")
    if is_conversation and not sys.stdout.isatty():
        raise ConfigError("--prompt is missing: it is required if the output is not a terminal")


def _load(
    path: Path, tokenizer: Path | None, device: torch.device, answers: int, tp: int, opening: bool, errors: Console
) -> tuple[Session, RunDirectory | None]:
    """Returns a session with the model of `path`, and its run (None: outside a run).

    On a CPU it sets the number of torch's threads to that of the cores that other programs leave free, and says so
    where these are fewer, if `errors` is a terminal. OMP_NUM_THREADS keeps it. With tp > 1, devices share the threads.

    Args:
        opening: as in `Session`.
        errors: gets the line about threads.

    Raises:
        ArtefactError, ConfigError, RankLostError: as `load_model` and `build_engine`; ConfigError names `--tp`.
    """
    usage = CpuUsage()
    loaded = load_model(path, tokenizer)
    # Check before processes start: the message names the option.
    check_tp(loaded.config, tp, torch.cuda.device_count() if device.type == "cuda" else None, "--tp")
    # Threads wait for each other in every layer: one that gets no core stops all of them.
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        n_free = max(1, min(torch.get_num_threads(), usage.free_cores()))
        if n_free < torch.get_num_threads():
            if errors.is_terminal:
                line = f"{n_free} of {torch.get_num_threads()} threads: others use the cores (OMP_NUM_THREADS sets it)"
                errors.print(Text(line, style="dim"), soft_wrap=True)
            torch.set_num_threads(n_free)
    if tp > 1:  # the processes share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // tp))
    return Session(loaded, device, answers, tp, opening), loaded.run


def _settings(values: Mapping[str, object], stop: list[str], seed: int | None, n: int) -> Settings:
    """Returns sampling parameters, of `values` and `stop`, and seed of the answer; without a seed, one is drawn below
    SEEDS.

    Escapes in `stop` (`unescape`) are replaced. `n` is checked only and is not part of the settings.

    Raises:
        ConfigError: names the option, its value and what is accepted.
        UserError: a stop text is not UTF-8.
    """
    if seed is None:
        seed = secrets.randbelow(SEEDS)
    for text in stop:
        require(bool(text), "--stop", "''", "a text that is not empty")
        _check_argument("--stop", text)

    integers = {key: number for key, number in values.items() if isinstance(number, int)}
    try:
        for key, number in {**integers, "seed": seed}.items():
            check_whole(key, number)
        require(n > 0, "n", n, "a positive integer")
        params = SamplingParams(**values, stop=tuple(unescape(text) for text in stop))  # type: ignore[arg-type]
    except ConfigError as error:
        # The message names the field; a user knows the option.
        key, _, rest = str(error).partition("=")
        raise ConfigError(f"--{key.replace('_', '-')}={rest}") from None
    return Settings(params, seed)


def read_constraint(text: str) -> Constraint:
    """Returns the constraint that `text` is, as JSON, or that the file of this path holds.

    Raises:
        ConfigError: it is neither, or no constraint.
        UserError: `text` is not UTF-8.
    """
    _check_argument("--constraint", text)
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--constraint {text}: expected JSON or a readable file of it ({error})") from error
    try:
        return Constraint.from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--constraint: no JSON ({error})") from error


def _standard_input() -> str:
    """Returns all of standard input, with its line ends.

    Raises:
        ConfigError: it is empty.
        UserError: it is not UTF-8.
    """
    content = sys.stdin.buffer.read()  # bytes, so that line ends stay as they are
    if not content:
        raise ConfigError("--prompt is missing, and standard input is empty")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: the prompt is not UTF-8 at byte {error.start}") from None


def _check_argument(option: str, text: str) -> None:
    """Checks that an argument is text; Python turns bytes that are not UTF-8 into lone surrogates.

    Raises:
        UserError: names the option and the byte.
    """
    try:
        os.fsencode(text).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{option}: the text is not UTF-8 at byte {error.start}") from None


def _continue_text(
    session: Session, prompt: list[int], settings: Settings, n: int, output: TextIO, errors: Console
) -> int:
    """Writes the answer to `output` unchanged while it is generated; several answers at the end, each after a line `===
    NUMBER of N ===`.

    On a terminal, control characters are replaced by symbols and the last line ends with a newline. A line of facts
    goes to `errors`. Returns the exit code: 0, or STOPPED after Ctrl-C.

    Raises:
        UserError: the engine refused the request, or the model's logits are nan.
        RankLostError: with several devices, another process of the model has ended.
    """
    on_terminal = output.isatty()
    last_character = "\n"

    def write(text: str) -> None:
        nonlocal last_character
        last_character = text[-1]
        output.write(visible(text) if on_terminal else text)
        output.flush()

    def on_text(index: int, text: str) -> None:
        if n == 1:
            write(text)

    with interrupts() as interrupted:
        outcome = session.answer(prompt, settings, n, on_text, interrupted=interrupted)

    # Several answers are computed at the same time; written while they grow, they would be mixed.
    if n > 1:
        for answer in sorted(outcome.answers, key=lambda answer: answer.index):
            write(f"=== {answer.index + 1} of {n} ===\n{answer.text}")
            if last_character != "\n":
                write("\n")
    if on_terminal and last_character != "\n":
        write("\n")
    errors.print(Text(f"{session.name}: {outcome}", style="dim"), soft_wrap=True)
    if outcome.stopped:
        return STOPPED
    return 0


def _answer_request(
    session: Session, chat: ToolChat, request: str, settings: Settings, output: TextIO, errors: Console
) -> int:
    """Writes the answer at the end; calls and their results go to `errors` when they happen, and a line of facts at the
    end.

    Returns:
        The exit code: 0, STOPPED after Ctrl-C, or NO_ANSWER.

    Raises:
        UserError: the request is empty, is not valid Unicode or fills the context, or the engine refused it.
        RankLostError: with several devices, another process of the model has ended.
    """

    def note(line: str) -> None:
        errors.print(Text(visible(line), style="dim"), soft_wrap=True)

    with interrupts() as interrupted:
        outcome = chat.answer(request, settings, lambda text: None, note, interrupted)

    # Standard output gets the answer alone, so that another program can read it.
    answer = outcome.exchange.answer
    if answer:
        output.write(f"{visible(answer)}\n" if output.isatty() else answer)
        output.flush()
    note(f"{session.name}: {outcome}")
    if outcome.stopped:
        return STOPPED
    if outcome.exchange.ending != "answered":
        return NO_ANSWER
    return 0


def read_line(before: str, typed: str) -> str:
    """Reads a line that starts with `typed`, after the text `before`; arrow keys recall earlier lines."""
    readline.set_startup_hook(lambda: readline.insert_text(typed))
    try:
        return input(before)
    finally:
        readline.set_startup_hook(None)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Replaces the effect of Ctrl-C inside the block, so that work can end in good order; afterwards it is as before.
    Only the main thread may call it (else ValueError).

    Yields:
        A function that tells whether Ctrl-C was pressed.
    """
    was_pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal was_pressed
        was_pressed = True

    previous_handler = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: was_pressed
    finally:
        signal.signal(signal.SIGINT, previous_handler)
