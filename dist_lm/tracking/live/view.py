"""The live view as lines of text: a pure function of what there is to show, the time and the size of the terminal.

    rlhf  run default in work                                 stage 4 of 8 · 12:41 min
    ✓ tokenizer  4,096 pieces from corpus=local                                  3.1 s
    ⠹ code       ━━━━━━━━━━━━━━━━━━━━━━────────────────────  214/400  1:12 min left
    · tools      1,500 steps from the code checkpoint

      loss       1.842             █▇▆▅▄▄▃▃▂▂▂▁▁▁▁▁                          from 6.320
      speed      7,222 tokens/s    ▆▆▇▇▇▇▇▇▇▇▇▇▇▇▇▇                          MFU 12.3%

Where rows are scarce, details go first, those that matter least before the others; then stages that are done and
those to come are counted; the row of the stage under way is the last to stay.
"""

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from dist_lm.tracking.live.glyphs import UNICODE, Glyphs
from dist_lm.tracking.live.lines import bar, line
from dist_lm.tracking.live.state import LiveState, StageLine, Work
from dist_lm.tracking.live.training_rows import Row, labelled, training_rows
from dist_lm.tracking.readable import duration, span

SPIN_PER_S = 8
LEAST_BAR = 8
DETAILS_WORTH = 4  # so many details are worth more than a row for each stage
STYLES = {"done": "green", "running": "cyan", "waiting": "dim"}


@dataclass(frozen=True)
class View:
    """The live view as something that rich can print: all of it, or what fits `height` rows."""

    state: LiveState
    now: float
    glyphs: Glyphs = UNICODE
    height: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from view_lines(self.state, self.now, options.max_width, self.height or options.size.height, self.glyphs)


def view_lines(state: LiveState, now: float, width: int, height: int, glyphs: Glyphs = UNICODE) -> list[Text]:
    """At most `height` lines of at most `width` cells; the most important ones."""
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
    room = height - len(stages)
    blank = [Text()] if details and len(details) < room else []
    kept = sorted(sorted(range(len(details)), key=lambda place: (details[place][0], place))[:room])
    return stages + blank + [details[place][1] for place in kept]


def _header(state: LiveState, now: float, width: int, glyphs: Glyphs) -> Text:
    over = sum(stage.state == "done" for stage in state.stages)
    at = min(over + 1, len(state.stages))
    right = f"stage {at} of {len(state.stages)} {glyphs.dot} {duration(now - state.began)}"
    return line(Text(state.title, style="bold"), Text(right, style="dim"), width, glyphs.cut)


def _stage_row(stage: StageLine, state: LiveState, now: float, width: int, glyphs: Glyphs) -> Text:
    names = max(len(one.name) for one in state.stages)
    mark = _spinner(now, glyphs) if stage.state == "running" else glyphs.marks[stage.state]
    left = Text.assemble((mark, STYLES[stage.state]), " ", (f"{stage.name:<{names}}", _name_style(stage)), "  ")
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
    """A bar where the end is known, else words; at the right how far it is."""
    if work.training and not work.training.step:
        ranks = work.training.ranks
        doing = ranks[0].doing if ranks else "starting ranks" if work.training.gang else "asking for nodes"
        return line(left.append(doing), Text(duration(elapsed), "dim"), width, glyphs.cut)
    if not work.total:
        words = work.words()
        text = ": ".join(part for part in (work.label if with_label else "", words) if part)
        return line(left.append(text), Text(duration(elapsed), "dim"), width, glyphs.cut)
    done = work.training.step if work.training else work.done
    right = Text(f"{done:,}/{work.total:,}")
    left_s = work.training.seconds_left() if work.training else _seconds_left(work, elapsed)
    if left_s is not None:
        right.append(f"  {duration(left_s)} left")
    room = width - left.cell_len - right.cell_len - 2
    if room < LEAST_BAR:  # of the count, the share is enough
        right = Text(f"{done / work.total:.0%}") + (Text(f"  {duration(left_s)}") if left_s is not None else Text())
        room = width - left.cell_len - right.cell_len - 2
    if room >= LEAST_BAR:
        left = left + bar(done / work.total, room, glyphs)
    return line(left, right, width, glyphs.cut)


def _seconds_left(work: Work, elapsed: float) -> float | None:
    if not work.total or not 0 < work.done < work.total:
        return None
    return elapsed / work.done * (work.total - work.done)


def _counted_stages(state: LiveState, now: float, width: int, glyphs: Glyphs) -> list[Text]:
    """What is over and what is to come in a row each, and the stage under way."""
    rows, over, coming = [], [], []
    for stage in state.stages:
        if stage.state == "done":
            over.append(stage.name)
        elif stage.state == "waiting":
            coming.append(stage.name)
        else:
            rows.append(_stage_row(stage, state, now, width, glyphs))
    nothing = Text()
    if over:
        text = Text.assemble((glyphs.marks["done"], STYLES["done"]), f" {len(over)} done: ", (", ".join(over), "dim"))
        rows.insert(0, line(text, nothing, width, glyphs.cut))
    if coming:
        text = Text(f"{glyphs.marks['waiting']} {len(coming)} to come: {', '.join(coming)}", "dim")
        rows.append(line(text, nothing, width, glyphs.cut))
    return rows


def _details(state: LiveState, now: float, width: int, glyphs: Glyphs) -> list[Row]:
    """Rows below the stages, with how much each matters."""
    rows: list[Row] = []
    training = state.training
    if training:
        rows += training_rows(training, now, width, glyphs)
    if state.running:
        rows += [(10, labelled(glyphs.marks["done"], Text(text, "dim"), width, glyphs)) for text in state.over[-4:]]
        counted_work = [work for work in state.works if not work.training and work.total]
        rows += [(6, labelled("now", Text(f"{work.label}: {work.words()}"), width, glyphs)) for work in counted_work]
    if state.warning:
        ago = f"{duration(max(0.0, now - state.warned_at))} ago"
        label = "warning" if state.warnings == 1 else f"{state.warnings} warned"
        text = Text.assemble((f"{ago}: ", "dim"), (state.warning, "yellow"))
        rows.append((3, labelled(label, text, width, glyphs)))
    return rows


def _spinner(now: float, glyphs: Glyphs) -> str:
    return glyphs.spinner[int(now * SPIN_PER_S) % len(glyphs.spinner)]


def _name_style(stage: StageLine) -> str:
    return {"running": "bold", "waiting": "dim"}.get(stage.state, "")
