"""The live view as lines of text: a pure function of the state, the time and the size of the terminal.

    rlhf  run default in work                                 stage 4 of 8 · 12:41 min
    ✓ tokenizer  4,096 pieces from corpus=local                                  3.1 s
    ⠹ code       ━━━━━━━━━━━━━━━━━━━━━━────────────────────  214/400  1:12 min left
    · tools      1,500 steps from the code checkpoint

      loss       1.842                  █▇▆▅▄▄▃▃▂▂▂▁▁▁▁▁                     from 6.320
      val        2.146 bits/byte @ 200  █▃▁                                  from 2.456
      speed      7,222 tokens/s         ▆▆▇▇▇▇▇▇▇▇▇▇▇▇▇▇                     MFU 12.3%

A value that was measured at an earlier step is shown with that step. On a small terminal the least important details
are dropped first, then finished and waiting stages are only counted; the row of the running stage stays.
"""

from collections import Counter

from rich.text import Text

from dist_lm.tracking.live_drawing import UNICODE, Glyphs, bar, fitted, line, sparkline
from dist_lm.tracking.live_state import FIGURES, Figure, LiveState, RankPulse, StageLine, TrainingState, Work
from dist_lm.tracking.readable import counted, duration, gib, percent, span

SPIN_PER_S = 8
LEAST_BAR = 8
DETAILS_WORTH = 4  # this many details go before a row for each stage
STYLES = {"done": "green", "running": "cyan", "waiting": "dim"}
INDENT, LABEL = 2, 10
REMARKS_FROM = 66  # columns
MOST_NODES = 8  # rows of nodes
QUIET_S = 10.0  # a rank without a heartbeat for this long is named

Row = tuple[int, Text]
"""The importance of a row (0 most), and the row."""


def view_lines(state: LiveState, now: float, width: int, height: int, glyphs: Glyphs = UNICODE) -> list[Text]:
    """The most important lines: at most `height`, each at most `width` cells."""
    height = max(1, height)
    details = _details(state, now, width, glyphs)
    header = [_header(state, now, width, glyphs)] if state.title else []
    full = [_stage_row(stage, state, now, width, glyphs) for stage in state.stages]
    if not full:
        rows = [_work_row(work, now, width, glyphs) for work in state.works]
        return (rows + [text for _, text in details])[-height:]
    stages = header + full
    if len(stages) + min(len(details), DETAILS_WORTH) > height:
        stages = header + _counted_stages(state, now, width, glyphs)
    if len(stages) + min(len(details), 1) > height:
        stages = [row for row, stage in zip(full, state.stages, strict=True) if stage.state == "running"] or header
    stages = (stages or full)[:height]
    free = height - len(stages)
    blank = [Text()] if details and len(details) < free else []
    kept = sorted(sorted(range(len(details)), key=lambda place: (details[place][0], place))[:free])
    return stages + blank + [details[place][1] for place in kept]


def _header(state: LiveState, now: float, width: int, glyphs: Glyphs) -> Text:
    over = sum(stage.state == "done" for stage in state.stages)
    at = min(over + 1, len(state.stages))
    right = f"stage {at} of {len(state.stages)} {glyphs.dot} {duration(now - state.began)}"
    return line(Text(state.title, style="bold"), Text(right, style="dim"), width, glyphs.cut)


def _stage_row(stage: StageLine, state: LiveState, now: float, width: int, glyphs: Glyphs) -> Text:
    names = max(len(one.name) for one in state.stages)
    mark = _spinner(now, glyphs) if stage.state == "running" else glyphs.marks[stage.state]
    name_style = {"running": "bold", "waiting": "dim"}.get(stage.state, "")
    left = Text.assemble((mark, STYLES[stage.state]), " ", (f"{stage.name:<{names}}", name_style), "  ")
    if stage.state != "running":
        took = span(stage.ended - stage.began) if stage.ended is not None and stage.began is not None else ""
        left.append(stage.detail, "dim")
        return line(left, Text(took, "dim"), width, glyphs.cut)
    work = state.works[0] if state.works else None
    began = stage.began if stage.began is not None else now
    if work is None:
        return line(left.append("starting"), Text(duration(now - began), "dim"), width, glyphs.cut)
    return _work_in(left, work, now - began, width, glyphs)


def _work_row(work: Work, now: float, width: int, glyphs: Glyphs) -> Text:
    left = Text.assemble((_spinner(now, glyphs), STYLES["running"]), " ", f"{work.label}  ")
    return _work_in(left, work, now - work.began, width, glyphs, with_label=False)


def _work_in(left: Text, work: Work, elapsed: float, width: int, glyphs: Glyphs, with_label: bool = True) -> Text:
    """A bar where the total is known, else the progress text; at the right the count and the time left."""
    if work.training and not work.training.step:
        ranks = work.training.ranks
        doing = ranks[0].doing if ranks else "starting ranks" if work.training.gang else "asking for nodes"
        return line(left.append(doing), Text(duration(elapsed), "dim"), width, glyphs.cut)
    if not work.total:
        words = work.text()
        text = ": ".join(part for part in (work.label if with_label else "", words) if part)
        return line(left.append(text), Text(duration(elapsed), "dim"), width, glyphs.cut)
    done = work.training.step if work.training else work.done
    right = Text(f"{done:,}/{work.total:,}")
    left_s = work.training.seconds_left() if work.training else _seconds_left(work, elapsed)
    if left_s is not None:
        right.append(f"  {duration(left_s)} left")
    free = width - left.cell_len - right.cell_len - 2
    if free < LEAST_BAR:  # a percentage takes less space than the count
        right = Text(f"{done / work.total:.0%}") + (Text(f"  {duration(left_s)}") if left_s is not None else Text())
        free = width - left.cell_len - right.cell_len - 2
    if free >= LEAST_BAR:
        left = left + bar(done / work.total, free, glyphs)
    return line(left, right, width, glyphs.cut)


def _seconds_left(work: Work, elapsed: float) -> float | None:
    if not work.total or not 0 < work.done < work.total:
        return None
    return elapsed / work.done * (work.total - work.done)


def _counted_stages(state: LiveState, now: float, width: int, glyphs: Glyphs) -> list[Text]:
    """One row for all finished stages, the running stage, one row for all waiting stages."""
    rows, over, coming = [], [], []
    for stage in state.stages:
        if stage.state == "done":
            over.append(stage.name)
        elif stage.state == "waiting":
            coming.append(stage.name)
        else:
            rows.append(_stage_row(stage, state, now, width, glyphs))
    if over:
        text = Text.assemble((glyphs.marks["done"], STYLES["done"]), f" {len(over)} done: ", (", ".join(over), "dim"))
        rows.insert(0, fitted(text, width, glyphs.cut))
    if coming:
        text = Text(f"{glyphs.marks['waiting']} {len(coming)} to come: {', '.join(coming)}", "dim")
        rows.append(fitted(text, width, glyphs.cut))
    return rows


def _details(state: LiveState, now: float, width: int, glyphs: Glyphs) -> list[Row]:
    """The rows below the stages."""
    rows: list[Row] = []
    if state.training:
        rows += _training_rows(state.training, now, width, glyphs)
    if state.running:
        rows += [(10, _labelled(glyphs.marks["done"], Text(text, "dim"), width, glyphs)) for text in state.over[-4:]]
        counted_work = [work for work in state.works if not work.training and work.total]
        rows += [(6, _labelled("now", Text(f"{work.label}: {work.text()}"), width, glyphs)) for work in counted_work]
    if state.warning:
        ago = f"{duration(max(0.0, now - state.warned_at))} ago"
        label = "warning" if state.warnings == 1 else f"{state.warnings} warned"
        text = Text.assemble((f"{ago}: ", "dim"), (state.warning, "yellow"))
        rows.append((3, _labelled(label, text, width, glyphs)))
    return rows


def _training_rows(state: TrainingState, now: float, width: int, glyphs: Glyphs) -> list[Row]:
    """Figures, checkpoints, ranks and nodes of a training stage."""
    series = dict(state.series)  # a copy: another thread may replace it
    figures = [figure for figure in FIGURES if figure.metric in series]
    values = [_value(figure, state, width) for figure in figures]
    column = max(map(len, values), default=0) + 2
    rows: list[Row] = []
    for figure, value in zip(figures, values, strict=True):
        number = value.partition(" ")[0]
        text = Text.assemble((number, "bold"), value[len(number) :].ljust(column - len(number)))
        points = series[figure.metric]
        began = f"from {figure.form(points.first)}" if points.first is not None and points.count > 1 else ""
        remark = {"perf/tokens_per_s": state.shown("perf/mfu", "MFU {}", percent), "train/lr": ""}.get(
            figure.metric, began
        )
        remark = remark if width >= REMARKS_FROM else ""
        free = width - INDENT - LABEL - text.cell_len - (len(remark) + 2 if remark else 0)
        text.append(sparkline(points.points(), free, glyphs.ramp, floor=0.0 if figure.from_zero else None), "cyan")
        left = Text.assemble(" " * INDENT, (f"{figure.label:<{LABEL - 1}} ", "dim"), text)
        rows.append((figure.importance, line(left, Text(remark, "dim"), width, glyphs.cut)))
    if saved := _saved(state, now, glyphs):
        rows.append((4, _labelled("saved", Text(saved), width, glyphs)))
    if state.gang:
        lines = _wrapped(_ranks(state, now, glyphs), width - INDENT - LABEL, glyphs)
        rows += [
            (7 if place else 5, _labelled("" if place else "ranks", text, width, glyphs))
            for place, text in enumerate(lines)
        ]
        rows += [(20 + place, row) for place, row in enumerate(_nodes(state, now, width, glyphs))]
    return rows


def _labelled(label: str, text: Text, width: int, glyphs: Glyphs) -> Text:
    return fitted(Text.assemble(" " * INDENT, (f"{label:<{LABEL - 1}} ", "dim"), text), width, glyphs.cut)


def _value(figure: Figure, state: TrainingState, width: int) -> str:
    """`2.146 bits/byte`, with the step where the value is not of the newest one."""
    unit = figure.unit
    if width < REMARKS_FROM:
        unit = unit.replace("tokens/", "tok/").replace("bits/byte", "b/byte")
    return state.shown(figure.metric, f"{{}} {unit}".rstrip(), figure.form)


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
    what = f"{counted(len(gang.hosts), 'node')} {glyphs.times} {gang.ranks_per_node} on {gang.device}"
    parts = [Text(what)]
    if gang.attempt > 1:
        parts.append(Text(f"attempt {gang.attempt}", style="yellow"))
    if state.ranks:
        parts.append(_doing(state.ranks, now - state.ranks_at))
    if memory := state.shown("perf/memory_gib", "{} a rank", lambda value: gib(value * 2**30)):
        parts.append(Text(memory))
    return [*parts, Text(gang.layout, style="dim")]


def _wrapped(parts: list[Text], width: int, glyphs: Glyphs) -> list[Text]:
    """Facts on as many lines as they need; a fact that is wider than a line has its own."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = Text(f" {glyphs.dot} ").join([lines[-1], part])
        if longer.cell_len <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def _doing(ranks: tuple[RankPulse, ...], since: float) -> Text:
    """What most ranks do; or the rank with the oldest heartbeat, where that is old."""
    commonest, _ = Counter(rank.doing for rank in ranks).most_common(1)[0]
    silent = max(ranks, key=lambda rank: rank.age_s)
    if silent.age_s + since > QUIET_S:
        return Text(f"rank {silent.rank} {silent.doing}, silent {duration(silent.age_s + since)}", style="yellow")
    return Text(commonest)


def _nodes(state: TrainingState, now: float, width: int, glyphs: Glyphs) -> list[Text]:
    """A row for each of several nodes with its slowest rank; of many nodes the slowest `MOST_NODES`."""
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
        rows.append(_labelled("", Text.assemble((f"{host} ", "dim"), text), width, glyphs))
    if len(order) > MOST_NODES:
        rows.append(_labelled("", Text(f"and {counted(len(order) - MOST_NODES, 'node')} more", "dim"), width, glyphs))
    return rows


def _spinner(now: float, glyphs: Glyphs) -> str:
    return glyphs.spinner[int(now * SPIN_PER_S) % len(glyphs.spinner)]
