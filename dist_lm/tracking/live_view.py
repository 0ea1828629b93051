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
LEAST_BAR = 8  # cells; a shorter bar shows nothing
DETAILS_WORTH = 4  # at least this number of details is shown before every stage gets a row
STYLES = {"done": "green", "running": "cyan", "waiting": "dim"}
INDENT, LABEL = 2, 10  # cells
REMARKS_FROM = 66  # columns; a narrower terminal has no room for remarks
MOST_NODES = 8  # most rows of nodes
QUIET_S = 10.0  # a rank without a heartbeat for this long is named

Row = tuple[int, Text]
"""(importance, text) of a row; 0 is the most important."""


def view_lines(state: LiveState, now: float, width: int, height: int, glyphs: Glyphs = UNICODE) -> list[Text]:
    """Returns the most important lines: at most `height` (at least one) lines of at most `width` cells. `now` is
    seconds, by the clock of the state."""
    height = max(1, height)
    details = _details(state, now, width, glyphs)
    stage_rows = [_stage_row(stage, state, now, width, glyphs) for stage in state.stages]
    header: list[Text] = []
    if state.title:
        header.append(_header(state, now, width, glyphs))

    if not stage_rows:
        rows = [_work_row(work, now, width, glyphs) for work in state.works]
        return (rows + [text for _, text in details])[-height:]

    # Stages give up their rows in two steps: finished and waiting ones are counted, then only the running one stays.
    stages = header + stage_rows
    if len(stages) + min(len(details), DETAILS_WORTH) > height:
        stages = header + _counted_stages(state, now, width, glyphs)
    if len(stages) + min(len(details), 1) > height:
        stages = [
            row for row, stage in zip(stage_rows, state.stages, strict=True) if stage.state == "running"
        ] or header
    stages = (stages or stage_rows)[:height]

    # The remaining rows go to the most important details, which keep their order on the screen.
    free = height - len(stages)
    blank = [Text()] if details and len(details) < free else []
    by_importance = sorted(range(len(details)), key=lambda index: (details[index][0], index))
    return stages + blank + [details[index][1] for index in sorted(by_importance[:free])]


def _header(state: LiveState, now: float, width: int, glyphs: Glyphs) -> Text:
    num_done = sum(stage.state == "done" for stage in state.stages)
    position = min(num_done + 1, len(state.stages))
    right = f"stage {position} of {len(state.stages)} {glyphs.dot} {duration(now - state.began)}"
    return line(Text(state.title, style="bold"), Text(right, style="dim"), width, glyphs.cut)


def _stage_row(stage: StageLine, state: LiveState, now: float, width: int, glyphs: Glyphs) -> Text:
    """Returns the row of a stage: mark, name, and its detail with the time it took; for the running one its first work,
    with progress, and the time since its start."""
    # All names have one width, so that details start in one column.
    name_width = max(len(line.name) for line in state.stages)
    mark = _spinner(now, glyphs) if stage.state == "running" else glyphs.marks[stage.state]
    name_style = {"running": "bold", "waiting": "dim"}.get(stage.state, "")

    left = Text.assemble((mark, STYLES[stage.state]), " ", (f"{stage.name:<{name_width}}", name_style), "  ")
    if stage.state != "running":
        elapsed = ""
        if stage.ended is not None and stage.began is not None:
            elapsed = span(stage.ended - stage.began)
        left.append(stage.detail, "dim")
        return line(left, Text(elapsed, "dim"), width, glyphs.cut)

    # The outermost work is the stage's; works inside it have rows of their own.
    elapsed = 0.0
    if stage.began is not None:
        elapsed = now - stage.began
    if not state.works:
        return line(left.append("starting"), Text(duration(elapsed), "dim"), width, glyphs.cut)
    return _work_in(left, state.works[0], now, elapsed, width, glyphs)


def _work_row(work: Work, now: float, width: int, glyphs: Glyphs) -> Text:
    left = Text.assemble((_spinner(now, glyphs), STYLES["running"]), " ", f"{work.label}  ")
    return _work_in(left, work, now, now - work.began, width, glyphs, with_label=False)


def _work_in(
    left: Text, work: Work, now: float, elapsed: float, width: int, glyphs: Glyphs, with_label: bool = True
) -> Text:
    """Returns a line of `left` with a bar if the total is known, else with the progress text; at the right the count
    and the time left, or the time elapsed. Before the first step of a training it says what the first rank does.

    Args:
        elapsed: seconds since the work, or the stage that it is part of, began.
        with_label: whether the progress text follows the label of the work.
    """
    # Nothing is counted before the first step.
    if work.training and not work.training.step:
        ranks = work.training.ranks
        if ranks:
            doing = ranks[0].doing
        elif work.training.gang:
            doing = "starting ranks"
        else:
            doing = "asking for nodes"
        return line(left.append(doing), Text(duration(elapsed), "dim"), width, glyphs.cut)

    if not work.total:
        text = work.text()
        if with_label:
            text = ": ".join(filter(None, (work.label, text)))
        return line(left.append(text), Text(duration(elapsed), "dim"), width, glyphs.cut)

    completed, left_s = work.done, _seconds_left(work, now)
    if work.training:
        # Only the steps of this attempt tell how long a step takes.
        completed, left_s = work.training.step, work.training.seconds_left()
    right = Text(f"{completed:,}/{work.total:,}")
    if left_s is not None:
        right.append(f"  {duration(left_s)} left")

    free = width - left.cell_len - right.cell_len - 2
    if free < LEAST_BAR:
        # A percentage takes less space than the count.
        right = Text(f"{completed / work.total:.0%}")
        if left_s is not None:
            right.append(f"  {duration(left_s)}")
        free = width - left.cell_len - right.cell_len - 2

    if free >= LEAST_BAR:
        left = left + bar(completed / work.total, free, glyphs)

    return line(left, right, width, glyphs.cut)


def _seconds_left(work: Work, now: float) -> float | None:
    """Returns the time left of work that does not train; None: unknown."""
    if not work.total or not 0 < work.done < work.total:
        return None
    if work.seconds_left:
        return work.seconds_left()
    # A stage may have done other work before.
    return (now - work.began) / work.done * (work.total - work.done)


def _counted_stages(state: LiveState, now: float, width: int, glyphs: Glyphs) -> list[Text]:
    """Returns one row for all finished stages, the row of the running stage, and one row for all waiting stages, each
    only if there are such stages."""
    rows: list[Text] = []
    done: list[str] = []
    waiting: list[str] = []

    for stage in state.stages:
        if stage.state == "done":
            done.append(stage.name)
        elif stage.state == "waiting":
            waiting.append(stage.name)
        else:
            rows.append(_stage_row(stage, state, now, width, glyphs))

    if done:
        text = Text.assemble((glyphs.marks["done"], STYLES["done"]), f" {len(done)} done: ", (", ".join(done), "dim"))
        rows.insert(0, fitted(text, width, glyphs.cut))

    if waiting:
        text = Text(f"{glyphs.marks['waiting']} {len(waiting)} to come: {', '.join(waiting)}", "dim")
        rows.append(fitted(text, width, glyphs.cut))

    return rows


def _details(state: LiveState, now: float, width: int, glyphs: Glyphs) -> list[Row]:
    """Returns the rows below the stages: training, other work, the last warning."""
    rows: list[Row] = []

    if state.training:
        rows += _training_rows(state.training, now, width, glyphs)

    if state.running:
        rows += [(10, _labelled(glyphs.marks["done"], Text(text, "dim"), width, glyphs)) for text in state.over[-4:]]

        # The first work has its bar in the row of the stage; counted work beside a training has a row here.
        counted_work = [work for work in state.works if not work.training and work.total]
        rows += [(6, _labelled("now", Text(f"{work.label}: {work.text()}"), width, glyphs)) for work in counted_work]

    if state.warning:
        ago = f"{duration(max(0.0, now - state.warned_at))} ago"
        label = "warning" if state.warnings == 1 else f"{state.warnings} warned"
        text = Text.assemble((f"{ago}: ", "dim"), (state.warning, "yellow"))
        rows.append((3, _labelled(label, text, width, glyphs)))

    return rows


def _training_rows(state: TrainingState, now: float, width: int, glyphs: Glyphs) -> list[Row]:
    """Returns rows for the figures that have a value, the newest checkpoint, ranks and nodes of a training stage, with
    their importance."""
    # A copy: another thread may replace it.
    series = dict(state.series)

    figures = [figure for figure in FIGURES if figure.metric in series]
    figure_texts = [_value(figure, state, width) for figure in figures]
    column = max(map(len, figure_texts), default=0) + 2

    rows: list[Row] = []
    # The number is bold; the unit behind it is padded, so that all curves start in one column.
    for figure, figure_text in zip(figures, figure_texts, strict=True):
        number = figure_text.partition(" ")[0]
        text = Text.assemble((number, "bold"), figure_text[len(number) :].ljust(column - len(number)))

        # At the right stands the first value, or for the speed the MFU.
        points = series[figure.metric]
        remark = ""
        if figure.metric == "perf/tokens_per_s":
            remark = state.shown("perf/mfu", "MFU {}", percent)
        elif figure.metric != "train/lr" and points.first is not None and points.count > 1:
            remark = f"from {figure.form(points.first)}"
        if width < REMARKS_FROM:
            remark = ""

        free = width - INDENT - LABEL - text.cell_len - (len(remark) + 2 if remark else 0)
        text.append(sparkline(points.points(), free, glyphs.ramp, floor=figure.floor), "cyan")

        left = Text.assemble(" " * INDENT, (f"{figure.label:<{LABEL - 1}} ", "dim"), text)
        rows.append((figure.importance, line(left, Text(remark, "dim"), width, glyphs.cut)))

    if saved := _saved(state, now, glyphs):
        rows.append((4, _labelled("saved", Text(saved), width, glyphs)))

    if state.gang:
        lines = _wrapped(_ranks(state, now, glyphs), width - INDENT - LABEL, glyphs)
        for position, text in enumerate(lines):
            importance, label = (7, "") if position else (5, "ranks")
            rows.append((importance, _labelled(label, text, width, glyphs)))
        rows += [(20 + position, row) for position, row in enumerate(_nodes(state, now, width, glyphs))]

    return rows


def _labelled(label: str, text: Text, width: int, glyphs: Glyphs) -> Text:
    return fitted(Text.assemble(" " * INDENT, (f"{label:<{LABEL - 1}} ", "dim"), text), width, glyphs.cut)


def _value(figure: Figure, state: TrainingState, width: int) -> str:
    """Returns a text such as `2.146 bits/byte`, followed by the step if the value is older than the newest step."""
    unit = figure.unit
    if width < REMARKS_FROM:
        unit = unit.replace("tokens/", "tok/").replace("bits/byte", "b/byte")
    return state.shown(figure.metric, f"{{}} {unit}".rstrip(), figure.form)


def _saved(state: TrainingState, now: float, glyphs: Glyphs) -> str:
    """Returns step and age of the newest checkpoint, and the step of the lowest val/loss; empty if neither is known.

    Args:
        now: seconds, by the clock of `state`.
    """
    facts = []
    if state.saved:
        step, at = state.saved
        saved = f"step {step:,}"
        if at is not None:
            saved += f", {duration(max(0.0, now - at))} ago"
        facts.append(saved)
    if state.best:
        facts.append(f"best val at step {state.best[0]:,}")
    return f" {glyphs.dot} ".join(facts)


def _ranks(state: TrainingState, now: float, glyphs: Glyphs) -> list[Text]:
    """Returns facts on the ranks of an attempt: nodes and device, attempt (from the second on), what ranks do, memory
    of a rank, layout. The attempt (`state.gang`) must be known."""
    gang = state.gang
    assert gang
    nodes = f"{counted(len(gang.hosts), 'node')} {glyphs.times} {gang.ranks_per_node} on {gang.device}"
    facts = [Text(nodes)]

    if gang.attempt > 1:
        facts.append(Text(f"attempt {gang.attempt}", style="yellow"))
    if state.ranks:
        facts.append(_doing(state.ranks, now - state.ranks_at))
    if memory := state.shown("perf/memory_gib", "{} a rank", lambda value: gib(value * 2**30)):
        facts.append(Text(memory))

    return [*facts, Text(gang.layout, style="dim")]


def _wrapped(facts: list[Text], width: int, glyphs: Glyphs) -> list[Text]:
    """Returns facts (at least one) on as many lines of `width` cells as they need, separated by dots; a fact that is
    wider than a line gets its own line and is not cut."""
    lines = [facts[0]]
    for fact in facts[1:]:
        longer = Text(f" {glyphs.dot} ").join([lines[-1], fact])
        if longer.cell_len <= width:
            lines[-1] = longer
        else:
            lines.append(fact)
    return lines


def _doing(ranks: tuple[RankPulse, ...], since: float) -> Text:
    """Returns what most ranks do; or names the rank with the oldest heartbeat, if it is older than `QUIET_S`."""
    # The commonest phase stands for all ranks, but a rank that is silent for long is named instead.
    commonest, _ = Counter(rank.doing for rank in ranks).most_common(1)[0]
    silent = max(ranks, key=lambda rank: rank.age_s)
    if silent.age_s + since > QUIET_S:
        return Text(f"rank {silent.rank} {silent.doing}, silent {duration(silent.age_s + since)}", style="yellow")
    return Text(commonest)


def _nodes(state: TrainingState, now: float, width: int, glyphs: Glyphs) -> list[Text]:
    """Returns a row for each node, for its rank with the fewest steps, if there are several nodes and heartbeats; of
    more than `MOST_NODES` the slowest, and a row with the number of others."""
    gang = state.gang
    if gang is None or len(gang.hosts) < 2 or not state.ranks:
        return []

    # Ranks are numbered node by node.
    by_node: dict[int, list[RankPulse]] = {}
    for rank in state.ranks:
        # The rank with the fewest steps stands for its node, since all others wait for it.
        by_node.setdefault(rank.rank // gang.ranks_per_node, []).append(rank)

    slowest = {node: max(ranks, key=lambda rank: (-rank.step, rank.age_s)) for node, ranks in by_node.items()}
    order = sorted(slowest, key=lambda node: (slowest[node].step, -slowest[node].age_s, node))

    # With few nodes all are shown, in their order.
    if len(order) <= MOST_NODES:
        order.sort()

    rows = []
    for node in order[:MOST_NODES]:
        rank = slowest[node]
        host = gang.hosts[node] if node < len(gang.hosts) else "?"

        first = node * gang.ranks_per_node
        numbers = f"{first}"
        if gang.ranks_per_node > 1:
            numbers += f"-{first + gang.ranks_per_node - 1}"

        age = rank.age_s + now - state.ranks_at
        text = Text(f"ranks {numbers}, step {rank.step:,}, {rank.doing}", style="yellow" if age > QUIET_S else "")
        rows.append(_labelled("", Text.assemble((f"{host} ", "dim"), text), width, glyphs))

    if len(order) > MOST_NODES:
        rows.append(_labelled("", Text(f"and {counted(len(order) - MOST_NODES, 'node')} more", "dim"), width, glyphs))

    return rows


def _spinner(now: float, glyphs: Glyphs) -> str:
    return glyphs.spinner[int(now * SPIN_PER_S) % len(glyphs.spinner)]
