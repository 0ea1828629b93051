"""No verb hands a terminal a sequence that it obeys: titles, clipboard, cursor, colours, directions of text."""

import ast
import io
import logging
import unicodedata
from pathlib import Path

import pytest
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

import dist_lm
from dist_lm.tracking.console import Console
from dist_lm.tracking.readable import OutputConsole, VisibleFormatter, say, visible

ATTACKS = {
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJmIH4=\x1b\\",
    "cursor": "\x1b[2J\x1b[H",
    "C1": "\x9d0;owned\x9c\x9b2J",
    "carriage return": "safe\rowned",
    "backspace": "owned\x08\x08\x08\x08\x08",
    "direction": "\u202e/* admin \u2066 */\u2069\u200f\u061c",
    "lines": "one\u2028two\u2029three\x85four",
    "surrogate": "\udc9b2J",
    "markup": "[link=https://example.org]here[/link]",
}
FORBIDDEN = ("Cc", "Cs")
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def harmful(text: str) -> set[str]:
    """Returns the characters of `text` that a terminal may obey; newline and tab are none."""
    categories = {char for char in text if unicodedata.category(char) in FORBIDDEN and char not in "\n\t"}
    return categories | set(text) & {*DIRECTIONS, "\u2028", "\u2029"}


def test_newlines_tabs_and_letters_stay() -> None:
    code = "def f():\n\treturn 'naïve 漢字 שלום 👩\u200d🚀'\n"
    assert visible(code) == code
    assert visible("a\x1b[2J\r\x7f\x9b\0é\n\tb") == "a␛[2J␍␡\ufffd␀é\n\tb"


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_nothing_printed_is_obeyed(attack: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Finds a method of a console, or a kind of renderable, that lets a control character through."""
    output, errors = io.StringIO(), io.StringIO()
    console = Console(output, errors, live=False)

    console.line(attack)
    console.warning(attack)
    console.error(attack)
    console.details(attack)
    console.table(attack, ("name", attack), [("row", attack)])
    console.summary(attack, {attack: attack})
    with console.counting(attack, unit=attack) as count:
        count.advance(1)

    table = Table("name", attack, title=attack)
    table.add_row(attack, Text(attack))
    rich_console = OutputConsole(file=output, width=60)
    rich_console.print(table, attack, Text(attack), Rule(Text(attack)))
    say(attack)

    record = logging.LogRecord("dist_lm", logging.WARNING, "", 0, "%s", (attack,), None)
    printed = output.getvalue() + errors.getvalue() + capsys.readouterr().out + VisibleFormatter().format(record)
    assert "owned" in printed or "owned" not in attack
    assert not harmful(printed)
    assert "[link=" in printed or attack != ATTACKS["markup"]


def test_a_terminal_gets_the_codes_of_rich_alone() -> None:
    output = io.StringIO()
    console = OutputConsole(file=output, force_terminal=True, color_system="standard", width=60)
    console.print(Text("red\x1b]0;owned\x07", style="red"))
    assert output.getvalue() == "\x1b[31mred␛]0;owned\x1b[0m\n"


def test_a_control_character_does_not_shift_a_table() -> None:
    output = io.StringIO()
    Console(output, live=False).table("title", ("name", "value"), [("a\x1bb", "1"), ("abc", "2")])
    rows = [line.rstrip() for line in output.getvalue().splitlines()[2:]]
    assert rows == ["a␛b   1", "abc   2"]


# Modules that print for programs, or in a process whose output another one reads; each with its number of calls.
FOR_PROGRAMS = {
    "__main__.py": 1,  # `cluster status --json`
    "bench/rank.py": 1,
    "bench/tracking_follower.py": 2,
    "cluster/gpu_probe.py": 1,
    "cluster/ray_node.py": 2,
    "cluster/torchrun.py": 1,
    "dry_run/rehearsal.py": 1,
    "gpu_check/probe.py": 1,
    "sandbox/interpreter.py": 1,
    "sandbox/languages.py": 1,
    "tracking/readable.py": 1,
    "verbs/data_step.py": 1,  # `--json`
    "verbs/data_where.py": 1,
    "verbs/replay.py": 2,
}


@pytest.mark.heavy
def test_verbs_print_through_the_output_layer() -> None:
    """Finds a new `print`, or a console of rich itself, which would reach the terminal as it is."""
    root = Path(dist_lm.__file__).parent
    prints: dict[str, int] = {}
    consoles = []

    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "rich.console"
            for alias in node.names
            if alias.name == "Console"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == "print":
                prints[name] = prints.get(name, 0) + 1
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
                consoles.append(f"{name}:{node.lineno}")

    assert prints == FOR_PROGRAMS
    assert not consoles
