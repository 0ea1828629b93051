"""Text for people: control characters made visible, and numbers and lists in words.

Samples of models, names of files, documents and messages of servers may hold sequences that a terminal obeys: set its
title, fill its clipboard, move its cursor, reverse the direction of text. Every verb prints through this module.
Output for programs, such as `--json`, does not pass through it and stays exact.
"""

import logging
import sys
from collections.abc import Iterable, Sequence
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


# --- numbers and lists ---


def gib(size: float) -> str:
    """Returns a number of bytes as text: `56 B`, `2.0 KiB`, `8.8 MiB`, `0.13 GiB` (from 128 MiB on), `2.53 GiB`."""
    # From 128 MiB on, as 0.13 GiB.
    if size >= 2**27:
        return f"{size / 2**30:.2f} GiB"
    if size >= 2**20:
        return f"{size / 2**20:.1f} MiB"
    if size >= 2**10:
        return f"{size / 2**10:.1f} KiB"
    return f"{size:.0f} B"


def readable_count(count: int) -> str:
    """Formats a count with a unit: 1,087,000,000 -> `1.09 B`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def counted(count: int, noun: str) -> str:
    """Formats a count and its noun: `1 file`, `2 files`, `1,000 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str], most: int) -> str:
    """Joins names, at most `most` of them: `a, b and 1,000 more`."""
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most:,} more"
    return text


def passes_in_words(number: float) -> str:
    """Returns a number of passes with two significant digits or more: `80`, `3.2`, `0.012`."""
    if number >= 9.95:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 0.95 else f"{number:.2g}"


def span(seconds: float) -> str:
    """Formats a time in seconds to three digits: `0.288 ms`, `46.2 ms`, `1.63 s`, `29:50 min`, `1:24:03 h`."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    return duration(seconds)


def duration(seconds: float) -> str:
    """Formats a time in whole seconds: `42 s`, `3:05 min` or `2:03:05 h`."""
    total_seconds = round(seconds)
    minutes, rest_seconds = divmod(total_seconds, 60)
    hours, rest_minutes = divmod(minutes, 60)

    if hours:
        return f"{hours}:{rest_minutes:02d}:{rest_seconds:02d} h"
    if minutes:
        return f"{minutes}:{rest_seconds:02d} min"
    return f"{total_seconds} s"


def four_digits(value: float) -> str:
    """Formats a measured value to four digits: `0.0772`, `2.314`, `9,412`, `1.23 M`, `1.20e-05`. report/page.js does
    the same."""
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    if abs(value) < 100:
        return f"{value:.4g}"

    if abs(value) < 1e6:
        return f"{value:,.0f}"
    return readable_count(round(value))


def three_decimals(value: float) -> str:
    """Formats a loss or a score, which readers compare with others: `2.000`."""
    return f"{value:.3f}"


def percent(share: float) -> str:
    """Formats a share (0 to 1) as a percentage: `75%`, `12.3%`."""
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def change(ratio: float) -> str:
    """Formats the change from 1 to `ratio`: `+1.9%`, `-12%`."""
    return f"{100 * (ratio - 1):+.1f}".removesuffix(".0") + "%"
