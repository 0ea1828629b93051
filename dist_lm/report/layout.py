"""The layout of a run: pictures (SVG) of which rank holds which part of the model, and the memory of a rank. Pure.

Colours are CSS classes; the style sheet of the page defines them for light and dark.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from dist_lm.config.model import ModelConfig
from dist_lm.model.size import is_matrix, parameter_count
from dist_lm.parallel.layout import Layout, Placement, placements
from dist_lm.report.facts import RunFacts, Share
from dist_lm.tracking.readable import counted, gib, readable_count

ELEMENT_BYTES = 4  # parameters, gradients and moments are fp32; bf16 computation casts gathered parameters
MEMORY = "perf/memory_gib"
MOST_RANKS = 256  # most cells drawn for one replica
MOST_REPLICAS = 8  # most replicas drawn
NODE_COLOURS = 6
CELL, LARGE_CELL, GAP = 18, 64, 4  # pixels
PICTURE = 132  # longest side of the picture of a parameter, in pixels
DRAWN = 16  # most shards drawn along a side; the rest is one area
LETTER = 7  # width of a character, in pixels


@dataclass(frozen=True)
class RankMemory:
    """The memory of a rank as a bar, and a text on memory outside the bar."""

    parts: tuple[Share, ...]
    total: str
    words: str


def rank_memory(model: ModelConfig, layout: Layout, runs: Sequence[RunFacts]) -> RankMemory:
    """Returns the memory of the rank that holds most, for runs with one model and layout.

    The bar shows computed sizes in fp32, the text the measured peak. Runs outside the trainer's loop count with the
    policy's weights only.
    """
    looped = [run for run in runs if run.loops]

    # Muon keeps one moment for each element of a matrix, AdamW two.
    muon = all(_has_muon(run.config.get("stage", {})) for run in looped)
    sizes = {"weights": held_elements(model, layout)}
    if looped:
        sizes["gradients"] = sizes["weights"]
        sizes["moments of the optimizer"] = held_elements(model, layout, lambda name: 2 - (muon and is_matrix(name)))

    total = sum(sizes.values())
    start = 0.0
    parts = []
    for colour, (label, elements) in enumerate(sizes.items()):
        width = 100 * elements / total
        size = gib(elements * ELEMENT_BYTES)
        parts.append(Share(label, size, start, width, colour, f"{label}: {size}"))
        start += width

    # Activations and messages are not computed here; the measured peak includes them.
    peaks = [run.finite(MEMORY).max() for run in looped or runs if len(run.finite(MEMORY))]
    notes = []
    if rlhf_runs := [run for run in runs if not run.loops]:
        critic = "critic, " if any(run.config.get("rlhf", {}).get("value_lr") for run in rlhf_runs) else ""
        labels = ", ".join(run.label for run in rlhf_runs)
        notes.append(f"{labels}: the policy only; {critic}reference and reward model come on top.")

    if peaks:
        notes.insert(
            0, f"Measured at most: {gib(max(peaks) * 2**30)}, including activations, messages and the program itself."
        )

    return RankMemory(
        tuple(parts),
        f"{gib(total * ELEMENT_BYTES)} of {'model and optimizer' if looped else 'weights'}",
        " ".join(notes),
    )


def held_elements(model: ModelConfig, layout: Layout, times: Callable[[str], int] = lambda name: 1) -> int:
    """Returns the number of elements on the rank with the most; a parameter counts `times(name)` times."""
    return sum(
        times(name) * math.prod(placement.local(layout)) for name, placement in placements(model, layout).items()
    )


def _has_muon(stage: Mapping[str, Any]) -> bool:
    # No rate in the configuration means the default, which is above 0.
    rate = (stage.get("muon") or {}).get("lr", 0)
    return rate is None or float(rate) > 0


@dataclass(frozen=True)
class Panel:
    """A model in one layout, with the runs that use both."""

    label: str
    words: str
    mesh: Markup
    kinds: list[dict[str, str]]
    memory: RankMemory


def panels(runs: Sequence[RunFacts]) -> list[Panel]:
    """Returns a panel for every combination of model, layout and hosts, with its runs, in the order of the first; runs
    whose model or layout is unknown have none."""
    members_of: dict[tuple, list[RunFacts]] = {}
    for run in runs:
        if run.model and run.layout:
            hosts = tuple(str(node.get("host")) for node in run.attempt.get("nodes", []))
            members_of.setdefault((str(run.model), run.layout, hosts), []).append(run)
    return [_panel(members) for members in members_of.values()]


def _panel(runs: Sequence[RunFacts]) -> Panel:
    """Returns the panel of runs with one model and one layout, both known; hosts are those of the first run.

    Args:
        runs: at least one.
    """
    model = runs[0].model
    layout = runs[0].layout
    assert model
    assert layout

    kind_facts = [facts_of(kind, layout) for kind in kinds(model, layout)]
    labels = ", ".join(run.label for run in runs)
    mesh = mesh_picture(layout, runs[0].attempt)
    return Panel(labels, _sentences(model, layout), mesh, kind_facts, rank_memory(model, layout, runs))


def _sentences(model: ModelConfig, layout: Layout) -> str:
    """Returns sentences on the layout: ranks, parameters of the rank with the most, and how to read the pictures."""
    total = parameter_count(model)
    elements_per_rank = held_elements(model, layout)

    sentences = [
        f"{layout} on {counted(layout.world_size, 'rank')}.",
        f"Of {readable_count(total)} parameters a rank holds {readable_count(elements_per_rank)}. "
        "Norms and biases are not drawn.",
    ]

    if layout.dp_replicate > 1:
        sentences.append(f"Each of the {layout.dp_replicate} replicas holds the whole model.")
    if layout.shards * layout.tp > MOST_RANKS or layout.dp_replicate > MOST_REPLICAS:
        sentences.append("Not every rank is drawn; the others follow the same pattern.")
    if layout.world_size > 1:
        sentences.append("A column is a shard (dp_shard), a row a tensor-parallel rank, a colour a node.")
    return " ".join(sentences)


@dataclass(frozen=True)
class Kind:
    """Matrices with the same placement."""

    name: str
    count: int  # number of them in the model
    placement: Placement

    @property
    def elements(self) -> int:
        """Returns the number of elements of all of them, without padding."""
        return self.count * math.prod(self.placement.logical)


def kinds(model: ModelConfig, layout: Layout) -> list[Kind]:
    """Returns the matrices of a model, grouped by placement, those with most elements first; the same matrix of all
    blocks is one. Norms and biases are small and left out."""
    # A matrix that all blocks have is one kind: `blocks.3.attention.query.weight` counts as `attention.query.weight`.
    placements_of: dict[str, list[Placement]] = {}
    for name, placement in placements(model, layout).items():
        placements_of.setdefault(re.sub(r"^blocks\.\d+\.", "", name), []).append(placement)

    names_of: dict[Placement, list[str]] = {}
    for name, members in placements_of.items():
        if len(members[0].logical) > 1 and not name.endswith("_bias"):
            names_of.setdefault(members[0], []).append(name)

    groups = []
    for placement, names in names_of.items():
        count = sum(len(placements_of[name]) for name in names)
        groups.append(Kind(_common_prefix_once([name.removesuffix(".weight") for name in names]), count, placement))
    return sorted(groups, key=lambda kind: -kind.elements)


def _common_prefix_once(names: list[str]) -> str:
    """Returns names whose common prefix is written once: `attention.query, key, value`."""
    prefix = names[0].rpartition(".")[0]
    return ", ".join([names[0], *(name.removeprefix(f"{prefix}.") for name in names[1:])])


def rank_of(layout: Layout, replica: int, shard: int, tp: int) -> int:
    """Returns the rank at a position of the mesh."""
    return (replica * layout.shards + shard) * layout.tp + tp


def mesh_picture(layout: Layout, attempt: Mapping[str, Any]) -> Markup:
    """Returns a picture (SVG) of the mesh with a cell for each rank; of a large mesh a part is drawn.

    Columns are dp_shard, rows tp, blocks replicas, colours nodes.
    """
    per_node = max(1, int(attempt.get("ranks_per_node", layout.world_size)))
    hosts = [str(node.get("host", "")) for node in attempt.get("nodes", [])]

    # Large meshes are drawn in part: all follow the same pattern.
    shards = min(layout.shards, max(1, MOST_RANKS // layout.tp))
    tps = min(layout.tp, MOST_RANKS)
    replicas = min(layout.dp_replicate, MOST_REPLICAS, max(1, 4 * MOST_RANKS // (shards * tps)))

    # Few ranks get large cells, many get small ones.
    if shards * replicas <= 8 and tps <= 8:
        cell = LARGE_CELL
    elif shards * tps > 64:
        cell = CELL
    else:
        cell = 34

    # Replicas stand side by side while they fit 720 pixels, then in further rows.
    block = shards * (cell + GAP)
    per_row = max(1, min(replicas, 720 // (block + 24)))
    head_x, head_y = 44, 20
    # Only one of several replicas needs a title, which takes 18 pixels.
    label = layout.dp_replicate > 1
    title_height = 18 * label
    row_height = tps * (cell + GAP) + head_y + title_height
    width = head_x + per_row * (block + 24) - 24
    height = math.ceil(replicas / per_row) * row_height

    shapes = []
    for replica in range(replicas):
        block_x = head_x + replica % per_row * (block + 24)
        top = replica // per_row * row_height + head_y + title_height
        if label:
            shapes.append(f'<text class="strong" x="{block_x}" y="{top - 22}">replica {replica}</text>')

        for shard in range(shards):
            if cell > CELL or shard % 8 == 0:
                centre = block_x + shard * (cell + GAP) + cell / 2
                shapes.append(
                    f'<text class="mid" x="{centre:g}" y="{top - 6}">{"s" if cell > CELL else ""}{shard}</text>'
                )

            for tp in range(tps):
                x, y = block_x + shard * (cell + GAP), top + tp * (cell + GAP)
                shapes.append(_cell(rank_of(layout, replica, shard, tp), x, y, cell, per_node, hosts))

    for row in range(math.ceil(replicas / per_row)):
        for tp in range(tps):
            y = row * row_height + head_y + title_height + tp * (cell + GAP) + cell / 2 + 4
            shapes.append(f'<text class="end" x="{head_x - 8}" y="{y:g}">tp {tp}</text>')

    return _svg(width, height, "ranks", "".join(shapes))


def _cell(rank: int, x: float, y: float, size: int, per_node: int, hosts: list[str]) -> str:
    """Returns the SVG of a rank's cell at (x, y), `size` pixels wide and high, coloured by its node; its number is
    written into a cell larger than CELL.

    Args:
        per_node: ranks of a node.
        hosts: host of each node, as far as known.
    """
    node = rank // per_node
    host = f" on {hosts[node]}" if node < len(hosts) else ""
    title = escape(f"rank {rank}, node {node}{host}")
    text = ""
    if size > CELL:
        text = f'<text class="mid cell" x="{x + size / 2:g}" y="{y + size / 2 + 4:g}">{rank}</text>'

    return (
        f'<g><title>{title}</title><rect class="node{node % NODE_COLOURS}" x="{x:g}" y="{y:g}" width="{size}" '
        f'height="{size}" rx="4"/>{text}</g>'
    )


def parameter_picture(kind: Kind, layout: Layout) -> Markup:
    """Returns the picture (SVG) of a parameter as a rectangle divided into its shards; padding is hatched, the shard of
    rank 0 is filled. Along each side at most DRAWN shards are drawn, and one area for all others."""
    placement = kind.placement
    shape, axes = _as_matrix(placement)
    height, width = _proportions(shape)
    rows = _cuts(axes[0], placement, layout)
    columns = _cuts(axes[1], placement, layout)

    shapes = []
    for row in range(min(rows, DRAWN)):
        for column in range(min(columns, DRAWN)):
            x, y = column * width / columns, row * height / rows
            of_rank_0 = " own" if row == 0 and column == 0 else ""
            ranks = _holders(layout, placement, axes, row, column)
            shapes.append(
                f'<g><title>{escape(_words(ranks))}</title><rect class="part{of_rank_0}" x="{x:.2f}" y="{y:.2f}" '
                f'width="{width / columns:.2f}" height="{height / rows:.2f}"/>'
            )

            # The ranks are written into a shard that is large enough, and always in its title.
            label = _short(ranks)
            if width / columns > 6 + LETTER * len(label) and height / rows > 14:
                centre, baseline = x + width / columns / 2, y + height / rows / 2 + 4
                shapes.append(
                    f'<text class="mid{of_rank_0}" x="{centre:.1f}" y="{baseline:.1f}">{escape(label)}</text>'
                )

            shapes.append("</g>")

    shapes.append(_padding(placement, axes, width, height))

    if rows > DRAWN or columns > DRAWN:
        x, y = min(1, DRAWN / columns) * width, min(1, DRAWN / rows) * height
        shapes.append(f'<path class="rest" d="M{x:.1f} 0H{width:.1f}V{height:.1f}H0V{y:.1f}H{x:.1f}Z"/>')

    return _svg(width, height, "parameter", "".join(shapes))


def facts_of(kind: Kind, layout: Layout) -> dict[str, str]:
    """Returns the picture of a kind and the texts beside it, by their names in the page's template."""
    placement = kind.placement
    splits = []

    if placement.tp_dim is not None and layout.tp > 1:
        padded, size = placement.padded[placement.tp_dim], placement.logical[placement.tp_dim]
        padding = f" (padded from {size:,} to {padded:,})" if padded != size else ""
        splits.append(f"dim {placement.tp_dim} by tp\u00a0{layout.tp}{padding}")
    if layout.shards > 1:
        axes = "dp_shard" if layout.cp == 1 else "dp_shard\u00a0x\u00a0cp"
        splits.append(f"dim {placement.fsdp_dim} by {axes}\u00a0{layout.shards}")

    number = f"{kind.count} of " if kind.count > 1 else ""
    return {
        "name": kind.name,
        "picture": parameter_picture(kind, layout),
        "shape": number + " × ".join(f"{size:,}" for size in placement.logical),
        "elements": f"{readable_count(kind.elements)} in all",
        "cut": ", ".join(splits) or "whole on every rank",
        "held": gib(kind.count * math.prod(placement.local(layout)) * ELEMENT_BYTES),
    }


def _as_matrix(placement: Placement) -> tuple[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns a parameter as (rows, columns), and the dimensions behind each: heads and their width are rows."""
    shape = placement.padded
    if len(shape) == 3:
        return (shape[0] * shape[1], shape[2]), ((0, 1), (2,))

    return (shape[0], shape[1]), ((0,), (1,))


def _proportions(shape: tuple[int, int]) -> tuple[float, float]:
    # A long rectangle would look like a line.
    ratio = min(4.0, max(0.25, shape[0] / shape[1]))
    return PICTURE * min(1.0, ratio), PICTURE / max(1.0, ratio)


def _cuts(dims: tuple[int, ...], placement: Placement, layout: Layout) -> int:
    splits = ((placement.tp_dim, layout.tp), (placement.fsdp_dim, layout.shards))
    return math.prod(ranks for dim, ranks in splits if dim in dims)


def _holders(
    layout: Layout, placement: Placement, axes: tuple[tuple[int, ...], tuple[int, ...]], row: int, column: int
) -> list[int]:
    """Returns the ranks that hold the shard at (row, column) of a parameter's picture, in all replicas.

    Args:
        axes: dimensions of the parameter behind rows and columns, see `_as_matrix`.
    """
    position_on = {0: row, 1: column}
    axis_of = {dim: number for number, dims in enumerate(axes) for dim in dims}
    # Every tensor-parallel rank has the shard of a parameter that tp does not split.
    tps: Sequence[int] = range(layout.tp)
    if placement.tp_dim is not None and layout.tp > 1:
        tps = [position_on[axis_of[placement.tp_dim]]]
    shard = 0
    if layout.shards > 1:
        shard = position_on[axis_of[placement.fsdp_dim]]

    return [rank_of(layout, replica, shard, tp) for replica in range(layout.dp_replicate) for tp in tps]


def _padding(placement: Placement, axes: tuple[tuple[int, ...], tuple[int, ...]], width: float, height: float) -> str:
    """Returns the SVG of the padding in a picture of `width` x `height` pixels; empty without padding. `axes` as in
    `_holders`."""
    if placement.tp_dim is None or placement.padded == placement.logical:
        return ""

    logical_share = placement.logical[placement.tp_dim] / placement.padded[placement.tp_dim]
    x, y = 0.0, 0.0
    # Padding lies at the end of the dimension that tp divides.
    if placement.tp_dim in axes[0]:
        y = height * logical_share
    else:
        x = width * logical_share

    return f'<rect class="padding" x="{x:.2f}" y="{y:.2f}" width="{width - x:.2f}" height="{height - y:.2f}"/>'


def _words(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {_enumeration(ranks)}"


def _short(ranks: list[int]) -> str:
    if len(ranks) <= 3:
        return _enumeration(ranks)
    return f"{ranks[0]}, {ranks[1]} …"


def _enumeration(ranks: list[int]) -> str:
    if len(ranks) <= 24:
        return ", ".join(_ranges(ranks))
    return f"{', '.join(map(str, ranks[:24]))} and {len(ranks) - 24} more"


def _ranges(ranks: list[int]) -> Iterator[str]:
    """Yields ascending numbers as text, three and more consecutive ones as a range such as `0-3`."""
    start = 0
    for stop in range(1, len(ranks) + 1):
        if stop == len(ranks) or ranks[stop] != ranks[stop - 1] + 1:
            # Two neighbours are no range: `4, 5` reads better than `4-5`.
            if stop - start > 2:
                yield f"{ranks[start]}-{ranks[stop - 1]}"
            else:
                yield from map(str, ranks[start:stop])
            start = stop


def _svg(width: float, height: float, kind: str, content: str) -> Markup:
    # Every value in `content` is a number, or was escaped.
    return Markup(  # noqa: S704
        f'<svg class="{kind}" width="{width + 2:.0f}" height="{height + 2:.0f}" '
        f'viewBox="-1 -1 {width + 2:.0f} {height + 2:.0f}" role="img">{content}</svg>'
    )
