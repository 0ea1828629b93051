"""A training stage in a few lines: curves, checkpoints, nodes and ranks."""

from collections import Counter

from rich.text import Text

from dist_lm.tracking.live.glyphs import Glyphs
from dist_lm.tracking.live.lines import fitted, line
from dist_lm.tracking.live.series import Series, sparkline
from dist_lm.tracking.live.training_state import FIGURES, Figure, RankPulse, TrainingState
from dist_lm.tracking.readable import counted, duration, gib, percent

INDENT, LABEL = 2, 10
REMARKS_FROM = 66  # columns
MOST_NODES = 8  # rows of nodes
IMPORTANCE = {"loss": 0, "reward": 0, "speed": 1, "val": 2, "accuracy": 2, "lr": 9}  # 3: others
QUIET_S = 10.0  # a rank that has said nothing for so long is shown

Row = tuple[int, Text]
"""How much a row matters (0 most), and the row."""


def training_rows(state: TrainingState, now: float, width: int, glyphs: Glyphs) -> list[Row]:
    """The rows in the order in which they are shown."""
    series = dict(state.series)  # as it is now: another thread may begin it anew
    rows = [
        (IMPORTANCE.get(figure.label, 3), _figure_row(figure, state, series[figure.metric], width, glyphs))
        for figure in FIGURES
        if figure.metric in series
    ]
    saved = _saved(state, now, glyphs)
    if saved:
        rows.append((4, labelled("saved", Text(saved), width, glyphs)))
    if state.gang:
        lines = _wrapped(_ranks(state, now, glyphs), width - INDENT - LABEL, glyphs)
        rows += [
            (7 if place else 5, labelled("" if place else "ranks", text, width, glyphs))
            for place, text in enumerate(lines)
        ]
        rows += [(20 + place, row) for place, row in enumerate(_nodes(state, now, width, glyphs))]
    return rows


def labelled(label: str, text: Text, width: int, glyphs: Glyphs) -> Text:
    """A row of the details: what it is, and the text."""
    return fitted(Text.assemble(" " * INDENT, (f"{label:<{LABEL - 1}} ", "dim"), text), width, glyphs.cut)


def _figure_row(figure: Figure, state: TrainingState, series: Series, width: int, glyphs: Glyphs) -> Text:
    value = state.values[figure.metric]
    short = width < REMARKS_FROM
    unit = figure.unit.replace("tokens/", "tok/").replace("bits/byte", "b/byte") if short else figure.unit
    value_width = 13 if short else 18
    text = Text.assemble(" " * INDENT, (f"{figure.label:<{LABEL - 1}} ", "dim"), (figure.form(value), "bold"))
    text.append(f" {unit}" if unit else "")
    text.append(" " * max(1, INDENT + LABEL + value_width - text.cell_len))
    remark = "" if short else _remark(figure, state, series)
    room = width - text.cell_len - (len(remark) + 2 if remark else 0)
    curve = sparkline(series.points(), room, glyphs.ramp, floor=0.0 if figure.from_zero else None)
    return line(text.append(curve, "cyan"), Text(remark, "dim"), width, glyphs.cut)


def _remark(figure: Figure, state: TrainingState, series: Series) -> str:
    if figure.metric == "perf/tokens_per_s":
        return f"MFU {percent(state.values['perf/mfu'])}" if "perf/mfu" in state.values else ""
    if figure.metric == "train/lr":
        return ""
    return f"from {figure.form(series.first)}" if series.first is not None and series.count > 1 else ""


def _saved(state: TrainingState, now: float, glyphs: Glyphs) -> str:
    parts = []
    if state.saved:
        step, at = state.saved
        parts.append(f"step {step:,}" + (f", {duration(max(0.0, now - at))} ago" if at is not None else ""))
    if state.best:
        parts.append(f"best val at step {state.best[0]:,}")
    return f" {glyphs.dot} ".join(parts)


def _ranks(state: TrainingState, now: float, glyphs: Glyphs) -> list[Text]:
    gang = state.gang
    assert gang
    nodes = len(gang.hosts)
    what = f"{counted(nodes, 'node')} {glyphs.times} {gang.ranks_per_node} on {gang.device}"
    parts = [Text(what)]
    if gang.attempt > 1:
        parts.append(Text(f"attempt {gang.attempt}", style="yellow"))
    if state.ranks:
        parts.append(_doing(state.ranks, now - state.ranks_at))
    if "perf/memory_gib" in state.values:
        parts.append(Text(f"{gib(state.values['perf/memory_gib'] * 2**30)} a rank"))
    return [*parts, Text(gang.layout, style="dim")]


def _wrapped(parts: list[Text], width: int, glyphs: Glyphs) -> list[Text]:
    """Facts in as many lines as they need; one that is wider than a line has a line of its own."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = Text(f" {glyphs.dot} ").join([lines[-1], part])
        if longer.cell_len <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def _doing(ranks: tuple[RankPulse, ...], since: float) -> Text:
    """What most ranks do; the one that has been silent longest where that is long."""
    commonest, _ = Counter(rank.doing for rank in ranks).most_common(1)[0]
    silent = max(ranks, key=lambda rank: rank.age_s)
    if silent.age_s + since > QUIET_S:
        return Text(f"rank {silent.rank} {silent.doing}, silent {duration(silent.age_s + since)}", style="yellow")
    return Text(commonest)


def _nodes(state: TrainingState, now: float, width: int, glyphs: Glyphs) -> list[Text]:
    """A row a node where there are several, those that have been silent longest first."""
    gang = state.gang
    if gang is None or len(gang.hosts) < 2 or not state.ranks:
        return []
    by_node: dict[int, list[RankPulse]] = {}
    for rank in state.ranks:
        by_node.setdefault(rank.rank // gang.ranks_per_node, []).append(rank)
    slowest = {node: max(ranks, key=lambda rank: (-rank.step, rank.age_s)) for node, ranks in by_node.items()}
    order = sorted(slowest, key=lambda node: (slowest[node].step, -slowest[node].age_s, node))
    if len(order) <= MOST_NODES:
        order.sort()
    rows = []
    for node in order[:MOST_NODES]:
        rank, host = slowest[node], gang.hosts[node] if node < len(gang.hosts) else "?"
        first = node * gang.ranks_per_node
        numbers = f"{first}-{first + gang.ranks_per_node - 1}" if gang.ranks_per_node > 1 else f"{first}"
        age = rank.age_s + now - state.ranks_at
        text = Text(f"ranks {numbers}, step {rank.step:,}, {rank.doing}", style="yellow" if age > QUIET_S else "")
        rows.append(labelled("", Text.assemble((f"{host} ", "dim"), text), width, glyphs))
    if len(order) > MOST_NODES:
        rows.append(labelled("", Text(f"and {counted(len(order) - MOST_NODES, 'node')} more", "dim"), width, glyphs))
    return rows
