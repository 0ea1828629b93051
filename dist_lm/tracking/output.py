"""Text for people on its way to a terminal or a log: control characters become visible symbols.

Samples of models, names of files, documents and messages of servers may hold sequences that a terminal obeys: set its
title, fill its clipboard, move its cursor, reverse the direction of text. Every verb prints through this module.
Output for programs, such as `--json`, does not pass through it and stays exact.
"""

import logging
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# Directions of Unicode: marks, embeddings, overrides and isolates. They let code read differently from what it does.
_DIRECTIONS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))

SYMBOLS = {  # one character for each, so that tables stay aligned and styles keep their place
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    **{0x7F: "\u2421", 0x2028: "\u2424", 0x2029: "\u2424"},
    **dict.fromkeys((*range(0x80, 0xA0), *_DIRECTIONS, *range(0xD800, 0xE000)), "\ufffd"),
}
"""Visible symbols of C0, C1, directions, line separators and lone surrogates (which UTF-8 cannot hold), by code."""


def visible(text: str) -> str:
    """Replaces control characters, except newline and tab, by visible symbols: a terminal must not obey them."""
    return text.translate(SYMBOLS)


class OutputConsole(Console):
    """rich's console, whose text passes through `visible`. A text in brackets is text, not markup of rich."""

    def __init__(self, **options: Any) -> None:
        """Takes the options of rich's console."""
        defaults: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
        super().__init__(**(defaults | options))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yields the segments of what is printed. Codes of rich itself (colours, cursor) are not in their text."""
        for segment in super().render(renderable, options):
            if segment.control is None:
                segment = Segment(visible(segment.text), segment.style)
            yield segment


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints text, as lines of any length, and flushes it.

    Args:
        stream: None: standard output.
    """
    print(visible(text), file=stream or sys.stdout, flush=True)


class VisibleFormatter(logging.Formatter):
    """Formats records of `logging` as text for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record as text whose control characters are visible."""
        return visible(super().format(record))
