"""The conversation at a terminal: lines are prompts or commands (`/word`), answers appear while they are generated.

`parse_command` has no effects; `PromptLoop` executes the commands.
"""

import re
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Console
from rich.text import Text

from dist_lm.errors import ConfigError, UserError, require
from dist_lm.generation.load import Openings
from dist_lm.generation.session import Session, Settings
from dist_lm.generation.tool_chat import ToolChat
from dist_lm.tracking.readable import visible

HELP = r"""Type the beginning of a text and press Enter; the model continues it.
  \ at the end of a line        continue the prompt on the next line (\\: a single \ and no new line)
  pasted lines                  form one prompt
  Ctrl-C                        ends the answer; at the prompt, discards what you typed
  Ctrl-D, /quit, /exit          leave

  /temperature 0.7              randomness of the draw; 0: always the most likely token
  /top_k 50                     draw only from the k most likely tokens; 0: off
  /top_p 0.95                   draw only from the smallest set with this much probability; 1: off
  /min_p 0.05                   draw only from tokens with this share of the top token's probability; 0: off
  /repetition_penalty 1.1       make tokens that occurred less likely; 1: off
  /max_new_tokens 200           maximum length of an answer
  /stop TEXT                    add a text that ends an answer (\n \t \\ as in a string); /stop off: remove all
  /seed 7                       seed of the next answer; each further answer adds 1

  /lang python                  begin the prompt with a typical opening of that language; again: the next opening;
                                /lang alone: the languages
  /again                        answer the last prompt again with the next seed
  /new                          with --tools: start a new conversation
  /show                         show all settings
  /help                         show this text
A setting without a value shows its value."""

LIMIT = 1 << 31  # exclusive bound of whole numbers
SEED_LIMIT = 1 << 63
NO_STOP = "off"
Action = Literal["show", "again", "new", "help", "lang", "quit"]
ACTIONS: dict[str, Action] = {
    **{"show": "show", "again": "again", "new": "new", "help": "help", "lang": "lang"},
    **{"quit": "quit", "exit": "quit"},
}
NUMBERS: dict[str, Callable[[str], float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
}
KEYS = (*NUMBERS, "stop", "seed")
FIRST, MORE = "> ", ". "  # before the first line of a prompt, and before further lines

ReadLine = Callable[[str, str], str]
"""Reads a line: (text before the cursor, text already typed) -> line. Raises EOFError at Ctrl-D, KeyboardInterrupt at
Ctrl-C."""

Interrupts = Callable[[], AbstractContextManager[Callable[[], bool]]]
"""Opens a context in which Ctrl-C does not raise; the function it yields tells whether Ctrl-C was pressed."""


@dataclass(frozen=True)
class Do:
    """A command that executes an action."""

    action: Action
    argument: str = ""


@dataclass(frozen=True)
class Change:
    """A command that replaces the settings and shows the setting `key`; without a new value the settings are equal."""

    key: str
    settings: Settings


def is_command(line: str) -> bool:
    """Returns whether a line is `/word`, alone or followed by an argument; paths and `//` comments are not."""
    return re.fullmatch(r"/[A-Za-z_]+(\s.*)?", line, re.DOTALL) is not None


def parse_command(line: str, settings: Settings) -> Do | Change:
    """Returns the action or the new settings of a line for which `is_command` holds; nothing is executed.

    A setting without a value leaves the settings as they are; `/stop TEXT` adds to the stop texts, `/stop off` removes
    all. The given `settings` do not change.

    Raises:
        UserError: the command is unknown or takes no value, or its value is not accepted (ConfigError).
    """
    word, _, rest = line[1:].partition(" ")
    name, argument = word.strip(), rest.strip()
    if name in ACTIONS:
        if argument and name != "lang":
            raise UserError(f"/{name} takes no value, found {argument!r}")
        return Do(ACTIONS[name], argument)

    if name not in KEYS:
        raise UserError(f"/{name}: no such command; /help lists all commands")
    if not argument:
        return Change(name, settings)
    if name == "stop":
        stop = (*settings.params.stop, unescape(rest))
        if argument == NO_STOP:
            stop = ()
        return Change(name, replace(settings, params=replace(settings.params, stop=stop)))

    # Bounds are not checked here: the new settings refuse a value that is out of them.
    number_type = NUMBERS.get(name, int)
    try:
        number = number_type(argument)
    except (ValueError, OverflowError):
        expected = "whole number" if number_type is int else "number"
        raise ConfigError(f"{name}={argument}: expected a {expected}") from None
    if number_type is int:
        check_whole(name, int(number))
    if name == "seed":
        return Change(name, replace(settings, seed=int(number)))
    return Change(name, replace(settings, params=replace(settings.params, **{name: number})))


def check_whole(key: str, value: int) -> None:
    """Checks that a whole number fits a tensor.

    Raises:
        ConfigError: names `key`.
    """
    limit = SEED_LIMIT if key == "seed" else LIMIT
    require(-limit <= value < limit, key, value, f"a whole number below {limit:,}")


def unescape(text: str) -> str:
    r"""Replaces `\n`, `\t` and `\\` by the characters they stand for; any further backslash stays."""
    return re.sub(r"\\([nt\\])", lambda escape: {"n": "\n", "t": "\t", "\\": "\\"}[escape[1]], text)


def help_text(width: int) -> str:
    """Returns `HELP` in lines of at most `width` columns, at least 40, that break between words."""
    lines = []
    for line in HELP.splitlines():
        # The explanation of a command stays in its column where there is room for it.
        explanation = re.search(r"(?<=\S) {2,}(?=\S)|^ {20,}", line)
        indent = explanation.end() if explanation and width >= 2 * explanation.end() else 4
        lines += textwrap.wrap(
            line,
            max(width, 40),
            subsequent_indent=" " * indent,
            replace_whitespace=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)


def value_of(settings: Settings, key: str) -> str:
    """Returns the value of a setting as text."""
    if key == "seed":
        return str(settings.seed)
    if key == "stop":
        return " ".join(repr(stop) for stop in settings.params.stop) or "none"
    return f"{getattr(settings.params, key):.12g}"


def carries_on(line: str) -> tuple[str, bool]:
    r"""Returns the line without escapes, and whether the prompt continues on the next line: `\` at the end continues,
    `\\` is a single `\`."""
    # Two backslashes are one character of text; an odd one is left over as the mark.
    text = line.rstrip("\\")
    n_backslashes = len(line) - len(text)
    return text + "\\" * (n_backslashes // 2), n_backslashes % 2 == 1


class PromptLoop:
    """Reads and answers lines until the user leaves."""

    def __init__(
        self,
        session: Session,
        settings: Settings,
        openings: Callable[[], Openings],
        console: Console,
        read_line: ReadLine,
        interrupts: Interrupts,
        chat: ToolChat | None = None,
    ) -> None:
        """
        Args:
            openings: reads the openings of the run.
            chat: answers prompts as requests; without it each prompt is the beginning of a text.
        """
        self.settings = settings
        self._session = session
        self._openings = openings
        self._console = console
        self._read_line = read_line
        self._interrupts = interrupts
        self._chat = chat
        self._opening = ""  # the beginning of the next prompt
        self._n_offered: dict[str, int] = {}  # number of openings offered so far, by language
        self._last_prompt: str | None = None

    def run(self) -> None:
        """Prints a greeting, then reads and answers lines until Ctrl-D or /quit. A `UserError` is printed as one line,
        and the loop goes on; Ctrl-C at the prompt discards the line and the opening. Empty lines are ignored.

        Raises:
            RankLostError: with several devices, another process of the model has ended.
        """
        self._say(f"{self._session.name}; /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                line = self._read()
                if is_command(line):
                    self._execute(line)
                elif line:
                    self._last_prompt = line
                    self._answer(line)

            except UserError as error:
                self._say(" ".join(str(error).split()), "red")
            except KeyboardInterrupt:  # at the prompt
                self._opening = ""
                self._console.print()
            except EOFError:  # at the prompt
                self._console.print()
                return

    def _read(self) -> str:
        """Returns a command, or a complete prompt: the opening followed by the text that the user typed.

        A prompt uses up the opening; a command keeps it.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C.
        """
        # The user can edit the last line of the opening; the lines before it are only printed.
        *lines, editable = self._opening.split("\n")
        mark = FIRST
        for line in lines:
            self._write(visible(mark + line) + "\n")
            mark = MORE
        typed = self._read_line(mark, editable)
        if is_command(typed):
            return typed

        line, continues = carries_on(typed)
        while continues:
            lines.append(line)
            line, continues = carries_on(self._read_line(MORE, ""))
        self._opening = ""
        return "\n".join([*lines, line])

    def _execute(self, line: str) -> None:
        """Executes a command and prints what it says; /again also prints the answer.

        Raises:
            EOFError: /quit, as for Ctrl-D.
            UserError: the command or its value is not accepted, the answer to /again is refused, or /lang cannot read
                the configuration of the run (ArtefactError).
        """
        match parse_command(line, self.settings):
            case Do("show"):
                self._show()
            case Do("again"):
                self._again()
            case Do("quit"):
                raise EOFError
            case Do("new"):
                self._new()
            case Do("help"):
                self._say(help_text(self._console.width))
            case Do("lang", language):
                self._begin_with(language)
            case Change(key, settings):
                self.settings = settings
                self._say(f"{key} {value_of(self.settings, key)}")

    def _show(self) -> None:
        width = max(map(len, KEYS))
        for key in KEYS:
            self._say(f"{key:{width}}  {value_of(self.settings, key)}")
        self._say(f"{'model':{width}}  {self._session.name}, context of {self._session.config.max_seq_len:,} tokens")

    def _again(self) -> None:
        """Answers the last prompt once more; in a conversation the last request and its answer are taken back first.

        Raises:
            UserError: there is no prompt yet, or see `_answer`.
        """
        if self._last_prompt is None:
            raise UserError("/again: there is no prompt yet")
        if self._chat:
            self._chat.take_back()
        self._answer(self._last_prompt)

    def _new(self) -> None:
        """Starts a new conversation; raises UserError without tools, where every prompt is a new text."""
        if self._chat is None:
            raise UserError("/new: needs --tools; without it every prompt is a new text")
        self._chat.forget()
        self._last_prompt = None
        self._say("new conversation")

    def _begin_with(self, language: str) -> None:
        """Sets the next opening of a language as the beginning of the next prompt; without a language, prints the
        languages.

        Raises:
            UserError: the run has no opening of that language.
            ArtefactError: the run's configuration, or the manifest of its corpus, cannot be read.
        """
        openings = self._openings()
        if not language:
            self._say(str(openings))
            return
        prompts = openings.of(language)
        index = self._n_offered.get(language, 0) % len(prompts)
        self._n_offered[language] = index + 1
        self._opening = prompts[index]
        count = f" ({index + 1} of {len(prompts)})" if len(prompts) > 1 else ""
        self._say(f"opening of {language}{count}: continue it or press Enter; Ctrl-C discards it")

    def _answer(self, prompt: str) -> None:
        """Prints the answer to a prompt while it is generated, then a line of facts, and sets the seed of the next
        answer.

        Ctrl-C ends the answer without an exception.

        Raises:
            UserError: the prompt is not valid Unicode or fills the context, or the engine refused it; the seed stays.
            RankLostError: with several devices, another process of the model has ended.
        """
        last_character = "\n"

        def write(text: str) -> None:
            nonlocal last_character
            last_character = text[-1]
            self._write(visible(text))

        def note(line: str) -> None:
            nonlocal last_character
            if last_character != "\n":
                self._console.print()
            last_character = "\n"
            self._say(visible(line))

        # Before Ctrl-C is caught: a prompt that is refused has no answer to end.
        prompt_ids = [] if self._chat else self._session.tokens(prompt)
        try:
            with self._interrupts() as interrupted:
                if self._chat:
                    outcome = self._chat.answer(prompt, self.settings, write, note, interrupted)
                else:
                    outcome = self._session.answer(
                        prompt_ids, self.settings, 1, lambda index, text: write(text), interrupted=interrupted
                    )
        finally:
            if last_character != "\n":
                self._console.print()

        self._say(str(outcome))
        # A new seed for the next answer; /again would otherwise repeat the answer.
        next_seed = self.settings.seed + 1
        self.settings = replace(self.settings, seed=next_seed if next_seed < SEED_LIMIT else 0)

    def _write(self, text: str) -> None:
        """Writes text unchanged; the console would replace tabs by spaces."""
        self._console.file.write(text)
        self._console.file.flush()

    def _say(self, line: str, style: str = "dim") -> None:
        self._console.print(Text(line, style=style), soft_wrap=True, highlight=False)
