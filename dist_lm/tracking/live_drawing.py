"""Building blocks of the live view: characters (Unicode or ASCII), fitted lines, bars, sparklines."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from dist_lm.tracking.live_state import shrunk


@dataclass(frozen=True)
class Glyphs:
    """The characters of the live view, each one cell wide."""

    ramp: str  # characters of a sparkline, lowest first
    spinner: str
    marks: dict[str, str]  # state of a stage -> character
    full: str  # the filled part of a bar
    rest: str  # the empty part of a bar
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
    """Returns the Unicode characters if the encoding of the terminal has all of them, else the ASCII ones, also for an
    unknown encoding."""
    unicode = (UNICODE.ramp, UNICODE.spinner, *UNICODE.marks.values(), UNICODE.full, UNICODE.rest)
    try:
        "".join((*unicode, UNICODE.times, UNICODE.cut)).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII
    return UNICODE


def fitted(text: Text, width: int, cut: str) -> Text:
    """Returns `text` itself if it takes at most `width` cells, else a shortened copy that ends with `cut`."""
    if text.cell_len <= width:
        return text

    if width <= len(cut):
        return Text(cut[: max(0, width)])

    short = text.copy()
    # Cut in cells, not characters: a wide character takes two.
    short.truncate(width - len(cut))
    short.rstrip()
    return short.append(cut)


def line(left: Text, right: Text, width: int, cut: str) -> Text:
    """Returns a line of at most `width` cells with `left` and `right` at its edges; `left` is shortened first, and
    `right` is dropped where it would leave fewer than 8 cells for `left` and a space. A line without `right` is not
    padded. A shortened text ends with `cut`."""
    if right.cell_len and right.cell_len + 8 <= width:
        left = fitted(left, width - right.cell_len - 1, cut)
        return Text.assemble(left, " " * (width - left.cell_len - right.cell_len), right)

    return fitted(left, width, cut)


def bar(share: float, width: int, glyphs: Glyphs) -> Text:
    """Returns a progress bar, filled to `share` (0 to 1)."""
    full = min(width, max(0, round(share * width)))
    return Text.assemble((glyphs.full * full, "green"), (glyphs.rest * (width - full), "dim"))


def sparkline(numbers: Sequence[float], width: int, ramp: str, floor: float | None = None) -> str:
    """Returns a curve as at most `width` characters of `ramp` (lowest first), each for a mean of neighbours; empty
    without numbers or with a width below 1. A flat curve is drawn in the middle.

    Args:
        floor: number that the lowest character stands for, or the minimum if that is lower; None: the minimum.
    """
    points = shrunk(numbers, max(1, width))
    if not points or width < 1:
        return ""

    # A floor keeps the height of a curve of speeds in proportion; without one the curve uses the full height.
    low, high = min(points), max(points)
    if floor is not None:
        low = min(floor, low)
    if high <= low:
        # A flat curve is drawn in the middle.
        return ramp[len(ramp) // 2] * len(points)

    return "".join(ramp[min(len(ramp) - 1, int((point - low) / (high - low) * len(ramp)))] for point in points)
