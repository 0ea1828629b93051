"""The report of `dist-lm bench learn`: a table, records, and curves of loss and bits per byte in one SVG."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dist_lm.bench.case import Record, spread


@dataclass(frozen=True)
class Point:
    """A measurement of a learner on the held-out sequences."""

    tokens: int  # trained on so far
    flops: float  # spent so far
    seconds: float  # spent in the learner's own steps so far
    loss: float  # nats a token
    bits_per_byte: float


@dataclass
class Curve:
    """The measurements of one learner."""

    recipe: str
    seed: int
    parameters: int
    steps: int
    points: list[Point] = field(default_factory=list)
    bits_by: Mapping[str, float] = field(default_factory=dict)  # language -> bits per byte at the end
    bytes_per_token: Mapping[str, float] = field(default_factory=dict)  # language -> UTF-8 bytes a token of val

    @property
    def end(self) -> Point:
        return self.points[-1]


PANEL, MARGIN, GAP = (420, 260), 56, 36  # (width, height) of a panel, pixels
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#7f7f7f")
ACROSS: dict[str, Callable[[Point], float]] = {
    "million tokens": lambda point: point.tokens / 1e6,
    "seconds": lambda point: point.seconds,
}
UP: dict[str, Callable[[Point], float]] = {
    "bits per byte": lambda point: point.bits_per_byte,
    "nats a token": lambda point: point.loss,
}
DRAWN = slice(1, None)  # leaves out the point before the first step, which would flatten the rest


def records_of(curves: Sequence[Curve]) -> list[Record]:
    """Returns the records, measure by measure and recipe by recipe, as means over the seeds with their spread; the peer
    is the first recipe, which has none itself.

    They hold bits per byte and loss at the end, then bits per byte and bytes a token of each language.
    """
    by_recipe = _by_recipe(curves)
    first = next(iter(by_recipe))

    # Languages are reported too, since a recipe may gain in one and lose in another.
    measures: dict[str, Callable[[Curve], float]] = {
        "bits/byte": lambda curve: curve.end.bits_per_byte,
        "nats/token": lambda curve: curve.end.loss,
    }
    for language in sorted(curves[0].bits_by):
        measures[f"bits/byte {language}"] = lambda curve, of=language: curve.bits_by[of]
        measures[f"bytes/token {language}"] = lambda curve, of=language: curve.bytes_per_token[of]

    records = []
    for unit, measure in measures.items():
        ends = {name: [measure(curve) for curve in seed_curves] for name, seed_curves in by_recipe.items()}
        means = {name: statistics.fmean(figures) for name, figures in ends.items()}
        for name in by_recipe:
            record = Record(
                bench="learn",
                case=name,
                value=means[name],
                unit=unit,
                rounds=len(ends[name]),
                spread=spread(ends[name]),
            )
            # The first recipe is what all others are compared with.
            if name != first:
                record = replace(record, peer=first, peer_value=means[first], ratio=means[name] / means[first])
            records.append(record)
    return records


def table_of(title: str, curves: Sequence[Curve]) -> Table:
    """Returns a table of the ends of the curves, a row for each recipe with means over the seeds.

    For bits per byte it adds the range over the seeds, and the ratio to the first recipe (columns `range`, `ratio`).
    """
    by_recipe = _by_recipe(curves)
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("recipe", overflow="fold")
    for column in ("M params", "steps", "M tokens", "seconds", "loss", "bits/byte", "range", "ratio"):
        table.add_column(column, justify="right")

    first_bits = _mean(next(iter(by_recipe.values())), UP["bits per byte"])
    for name, seed_curves in by_recipe.items():
        bits = [curve.end.bits_per_byte for curve in seed_curves]
        table.add_row(
            name,
            f"{seed_curves[0].parameters / 1e6:.2f}",
            f"{statistics.fmean(curve.steps for curve in seed_curves):.0f}",
            f"{_mean(seed_curves, ACROSS['million tokens']):.2f}",
            f"{_mean(seed_curves, ACROSS['seconds']):.0f}",
            f"{_mean(seed_curves, UP['nats a token']):.3f}",
            f"{statistics.fmean(bits):.3f}",
            f"{max(bits) - min(bits):.3f}" if len(bits) > 1 else "-",
            f"{statistics.fmean(bits) / first_bits:.3f}",
        )
    return table


def languages_of(curves: Sequence[Curve]) -> Table:
    """Returns a table of bytes a token of val and bits per byte at the end (mean over the seeds), a row for each recipe
    and a column for each language, for recipes with other tokenizers."""
    languages = sorted(curves[0].bytes_per_token)
    table = Table(title="held-out bytes a token, bits per byte", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("recipe", overflow="fold")
    for language in languages:
        table.add_column(language, justify="right")

    for name, seed_curves in _by_recipe(curves).items():
        lengths = seed_curves[0].bytes_per_token
        bits = {language: statistics.fmean(curve.bits_by[language] for curve in seed_curves) for language in languages}
        table.add_row(name, *(f"{lengths[language]:.2f}  {bits[language]:.3f}" for language in languages))
    return table


def _by_recipe(curves: Sequence[Curve]) -> Mapping[str, list[Curve]]:
    by_recipe: dict[str, list[Curve]] = {}
    for curve in curves:
        by_recipe.setdefault(curve.recipe, []).append(curve)
    return by_recipe


def _mean(curves: Sequence[Curve], measure: Callable[[Point], float]) -> float:
    return statistics.fmean(measure(curve.end) for curve in curves)


def drawing(curves: Sequence[Curve]) -> str:
    """Returns the curves as an SVG: a row of panels for each measure, against tokens and seconds, a colour for each
    recipe, a line for each seed. The point before the first step is left out."""
    names = list(dict.fromkeys(curve.recipe for curve in curves))
    width = 2 * (PANEL[0] + MARGIN) + GAP
    height = 2 * (PANEL[1] + MARGIN) + 18 * len(names) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="white"/>'
    ]

    for row, (up, y_of) in enumerate(UP.items()):
        for column, (across, x_of) in enumerate(ACROSS.items()):
            left_top = (MARGIN + column * (PANEL[0] + MARGIN), GAP // 2 + row * (PANEL[1] + MARGIN))
            parts.append(_panel(curves, names, left_top, (across, x_of), (up, y_of)))

    for index, name in enumerate(names):
        y = 2 * (PANEL[1] + MARGIN) + 18 * index + GAP // 2
        parts.append(
            f'<rect x="{MARGIN}" y="{y - 8}" width="18" height="4" fill="{_colour(index)}"/>'
            f'<text x="{MARGIN + 26}" y="{y}">{escape(name)}</text>'
        )
    return "".join(parts) + "</svg>\n"


def _panel(
    curves: Sequence[Curve],
    names: Sequence[str],
    left_top: tuple[int, int],
    across: tuple[str, Callable[[Point], float]],
    up: tuple[str, Callable[[Point], float]],
) -> str:
    """Returns the SVG of a panel at `left_top` (x, y in pixels) with a line for each curve, coloured by the place of
    its recipe in `names`; `across` and `up` are (title, figure of a point) of the axes."""
    # All curves share the axes of a panel.
    points = [point for curve in curves for point in curve.points[DRAWN]]
    xs, ys = [across[1](point) for point in points], [up[1](point) for point in points]
    right, low, high = max(xs), min(ys), max(ys)
    # A flat curve has no range to divide by.
    scale = high - low or 1.0
    x_left, top = left_top

    def at(point: Point) -> str:
        x = x_left + PANEL[0] * across[1](point) / (right or 1.0)
        y = top + PANEL[1] * (high - up[1](point)) / scale
        return f"{x:.1f},{y:.1f}"

    parts = [f'<rect x="{x_left}" y="{top}" width="{PANEL[0]}" height="{PANEL[1]}" fill="none" stroke="#bbb"/>']

    for share in (0.0, 0.5, 1.0):
        x, y = x_left + PANEL[0] * share, top + PANEL[1] * (1 - share)
        parts.append(f'<text x="{x:.0f}" y="{top + PANEL[1] + 14}" text-anchor="middle">{right * share:.3g}</text>')
        parts.append(f'<text x="{x_left - 4}" y="{y + 4:.0f}" text-anchor="end">{low + share * scale:.3g}</text>')
    title = f"{up[0]} against {across[0]}"
    parts.append(f'<text x="{x_left + PANEL[0] / 2:.0f}" y="{top + PANEL[1] + 30}" text-anchor="middle">{title}</text>')

    for curve in curves:
        line = " ".join(at(point) for point in curve.points[DRAWN])
        colour = _colour(names.index(curve.recipe))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return "".join(parts)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
