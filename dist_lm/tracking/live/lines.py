"""Lines of the live view: a text at the left, one at the right, never wider than the terminal."""

from rich.text import Text

from dist_lm.tracking.live.glyphs import Glyphs


def fitted(text: Text, width: int, cut: str) -> Text:
    """`text` in at most `width` cells, its end replaced by `cut` where it is longer."""
    if text.cell_len <= width:
        return text
    if width <= len(cut):
        return Text(cut[: max(0, width)])
    short = text.copy()
    short.truncate(width - len(cut))
    short.rstrip()
    return short.append(cut)


def line(left: Text, right: Text, width: int, cut: str) -> Text:
    """`left` and `right` at the two edges; `left` gives way, and where that is not enough `right` goes."""
    if right.cell_len and right.cell_len + 8 <= width:
        left = fitted(left, width - right.cell_len - 1, cut)
        return Text.assemble(left, " " * (width - left.cell_len - right.cell_len), right)
    return fitted(left, width, cut)


def bar(share: float, width: int, glyphs: Glyphs) -> Text:
    """A bar that is full to `share` (0 to 1)."""
    full = min(width, max(0, round(share * width)))
    return Text.assemble((glyphs.full * full, "green"), (glyphs.rest * (width - full), "dim"))
