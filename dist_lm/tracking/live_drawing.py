"""Building blocks of the live view: characters (Unicode or ASCII), fitted lines, bars, sparklines."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from dist_lm.tracking.live_state import shrunk


@dataclass(frozen=True)
class Glyphs:
    """A set of characters, each one cell wide."""

    ramp: str  # of sparklines, lowest first
    spinner: str
    marks: dict[str, str]  # by the state of a stage
    full: str  # of a bar
    rest: str
    dot: str  # separates two facts
    times: str
    cut: str  # marks a shortened text


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
    """Unicode where the encoding of the terminal has these characters, else ASCII."""
    unicode = (UNICODE.ramp, UNICODE.spinner, *UNICODE.marks.values(), UNICODE.full, UNICODE.rest)
    try:
        "".join((*unicode, UNICODE.times, UNICODE.cut)).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


def fitted(text: Text, width: int, cut: str) -> Text:
    """`text` in at most `width` cells; a longer text ends with `cut`."""
    if text.cell_len <= width:
        return text
    if width <= len(cut):
        return Text(cut[: max(0, width)])
    short = text.copy()
    short.truncate(width - len(cut))
    short.rstrip()
    return short.append(cut)


def line(left: Text, right: Text, width: int, cut: str) -> Text:
    """`left` and `right` at both edges of `width` cells; `left` is shortened first, then `right` is dropped."""
    if right.cell_len and right.cell_len + 8 <= width:
        left = fitted(left, width - right.cell_len - 1, cut)
        return Text.assemble(left, " " * (width - left.cell_len - right.cell_len), right)
    return fitted(left, width, cut)


def bar(share: float, width: int, glyphs: Glyphs) -> Text:
    """A progress bar, full to `share` (0 to 1)."""
    full = min(width, max(0, round(share * width)))
    return Text.assemble((glyphs.full * full, "green"), (glyphs.rest * (width - full), "dim"))


def sparkline(values: Sequence[float], width: int, ramp: str, floor: float | None = None) -> str:
    """Values as characters of `ramp`, at most `width` of them.

    Args:
        floor: value of the lowest character; None: the minimum.
    """
    points = shrunk(values, max(1, width))
    if not points or width < 1:
        return ""
    low = min(points) if floor is None else min(floor, *points)
    high = max(points)
    if high <= low:
        return ramp[len(ramp) // 2] * len(points)
    return "".join(ramp[min(len(ramp) - 1, int((value - low) / (high - low) * len(ramp)))] for value in points)
