"""A person and a model at a terminal: prompts in, answers out, settings in between."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

from rich.console import Console
from rich.text import Text

from dist_lm.errors import UserError
from dist_lm.generation.commands import (
    HELP,
    KEYS,
    SEED_LIMIT,
    Change,
    Do,
    Tell,
    carries_on,
    is_command,
    parse_command,
    value_of,
)
from dist_lm.generation.openings import Openings
from dist_lm.generation.session import Session, Settings
from dist_lm.generation.tool_chat import ToolChat

FIRST, MORE = "> ", ". "  # before the first line of a prompt, and before the others

ReadLine = Callable[[str, str], str]
"""(what to show before it, text that is typed already) -> a line. EOFError: Ctrl-D; KeyboardInterrupt: Ctrl-C."""

Interrupts = Callable[[], AbstractContextManager[Callable[[], bool]]]
"""While the context lasts: whether Ctrl-C was pressed in it."""


class PromptLoop:
    """Reads lines until the person leaves."""

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
        """`chat`: what prompts are said to; without it each is the beginning of a text."""
        self.settings = settings
        self._session = session
        self._openings = openings
        self._console = console
        self._read_line = read_line
        self._interrupts = interrupts
        self._chat = chat
        self._opening = ""  # the prompt begins with it
        self._offered: dict[str, int] = {}  # openings of a language so far
        self._last: str | None = None

    def run(self) -> None:
        """Until Ctrl-D or /quit."""
        self._say(f"{self._session.name}; /help says how to go on, Ctrl-D leaves")
        while True:
            try:
                line = self._read()
                if is_command(line):
                    self._obey(line)
                elif line:
                    self._last = line
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
        """A command, or a whole prompt: the opening and what is typed behind it."""
        *whole, begun = self._opening.split("\n")
        for number, line in enumerate(whole):
            self._write(visible((MORE if number else FIRST) + line) + "\n")
        typed = self._read_line(MORE if whole else FIRST, begun)
        if is_command(typed):
            return typed
        lines, (line, more) = whole, carries_on(typed)
        while more:
            lines.append(line)
            line, more = carries_on(self._read_line(MORE, ""))
        self._opening = ""
        return "\n".join([*lines, line])

    def _obey(self, line: str) -> None:
        command = parse_command(line, self.settings)
        match command:
            case Do("show"):
                self._show()
            case Do("again"):
                self._again()
            case Do("quit"):
                raise EOFError
            case Do("new"):
                self._forget()
            case Do("help"):
                self._help()
            case Do("lang", language):
                self._begin_with(language)
            case Tell(key):
                self._say(f"{key} {value_of(self.settings, key)}")
            case Change(key, settings):
                self.settings = settings
                self._say(f"{key} {value_of(self.settings, key)}")

    def _show(self) -> None:
        width = max(map(len, KEYS))
        for key in KEYS:
            self._say(f"{key:{width}}  {value_of(self.settings, key)}")
        self._say(f"{'model':{width}}  {self._session.name}, context of {self._session.config.max_seq_len:,} tokens")

    def _help(self) -> None:
        for line in HELP.splitlines():
            self._say(line)

    def _again(self) -> None:
        if self._last is None:
            raise UserError("/again: there is no prompt yet")
        if self._chat:
            self._chat.take_back()
        self._answer(self._last)

    def _forget(self) -> None:
        if self._chat is None:
            raise UserError("/new: without --tools every prompt stands for itself")
        self._chat.forget()
        self._last = None
        self._say("what was said is forgotten")

    def _begin_with(self, language: str) -> None:
        openings = self._openings()
        if not language:
            self._say(str(openings))
            return
        several = openings.of(language)
        number = self._offered.get(language, 0) % len(several)
        self._offered[language] = number + 1
        self._opening = several[number]
        which = f" ({number + 1} of {len(several)})" if len(several) > 1 else ""
        self._say(f"opening of {language}{which}: type on, or press Enter; Ctrl-C drops it")

    def _answer(self, prompt: str) -> None:
        end = "\n"

        def show(text: str) -> None:
            nonlocal end
            end = text[-1]
            self._write(visible(text))

        def note(line: str) -> None:
            nonlocal end
            if end != "\n":
                self._console.print()
            end = "\n"
            self._say(visible(line))

        tokens = [] if self._chat else self._session.tokens(prompt)
        try:
            with self._interrupts() as interrupted:
                if self._chat:
                    outcome = self._chat.answer(prompt, self.settings, show, note, interrupted)
                else:
                    outcome = self._session.answer(
                        tokens, self.settings, 1, lambda index, text: show(text), interrupted=interrupted
                    )
        finally:
            if end != "\n":
                self._console.print()
        self._say(str(outcome))
        after = self.settings.seed + 1
        self.settings = replace(self.settings, seed=after if after < SEED_LIMIT else 0)

    def _write(self, text: str) -> None:
        """As it is: the console would make spaces of tabs."""
        self._console.file.write(text)
        self._console.file.flush()

    def _say(self, line: str, style: str = "dim") -> None:
        self._console.print(Text(line, style=style), soft_wrap=True, highlight=False)


def visible(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters as pictures, but for newline and tab."""
    return "".join(_picture(ord(character)) if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    return character not in "\n\t" and (character < " " or "\x7f" <= character <= "\x9f")


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"
