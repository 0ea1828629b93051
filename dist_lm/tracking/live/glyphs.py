"""The signs that the live view is drawn with: Unicode, or ASCII where the terminal's encoding has no others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Glyphs:
    """One set of signs, each a cell wide."""

    ramp: str  # of sparklines, lowest first
    spinner: str
    marks: dict[str, str]  # by the state of a stage
    full: str  # of a bar
    rest: str
    dot: str  # between two facts
    times: str
    cut: str  # where a text goes on


UNICODE = Glyphs(
    ramp="▁▂▃▄▅▆▇█",
    spinner="⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏",
    marks={"done": "✓", "waiting": "·"},
    full="━",
    rest="─",
    dot="·",
    times="×",
    cut="…",
)
ASCII = Glyphs(
    ramp="_.-~=+*#",
    spinner="|/-\\",
    marks={"done": "+", "waiting": "."},
    full="#",
    rest="-",
    dot="|",
    times="x",
    cut="~",
)


def glyphs_for(encoding: str) -> Glyphs:
    """The richest set that an encoding can express."""
    signs = "".join(
        (UNICODE.ramp, UNICODE.spinner, *UNICODE.marks.values(), UNICODE.full, UNICODE.rest, UNICODE.times, UNICODE.cut)
    )
    try:
        signs.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE
