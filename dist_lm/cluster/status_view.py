"""The status of a work directory for people: what is running where, how far it is, and what went wrong last."""

import time

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dist_lm.cluster.status import PipelineStatus, RunStatus, node_rows
from dist_lm.tracking.readable import duration, four_digits, percent, three_decimals

WORDS = {
    "running": ("running", "bold green"),
    "lost": ("should be running, but nobody is at it: the same command continues", "bold red"),
    "done": ("done", "green"),
    "failed": ("failed", "bold red"),
    "stopped": ("stopped: the same command continues", "yellow"),
}
COLOURS = {
    "done": "green",
    "running": "bold green",
    "failed": "bold red",
    "stopped": "yellow",
    "waiting": "dim",
    "lost": "bold red",
}


def print_status(status: PipelineStatus, console: Console) -> None:
    """Print stages, run, nodes and the last error."""
    now = time.time()
    facts, (words, style) = status.facts, WORDS[status.state]
    until = now if status.state == "running" else facts["updated"]
    job = f", job {facts['job']}" if facts["job"] else ""
    console.print(Text.assemble((status.name, "bold"), ": ", (words, style)))
    console.print(
        Text(
            f"on {facts['host']} (process {facts['process']}{job}), "
            f"{duration(until - facts['started'])} since {_clock(facts['started'])}",
            style="dim",
        )
    )
    stages = Table(box=None, pad_edge=False)
    for column in ("stage", "state", ""):
        stages.add_column(column)
    for stage in facts["stages"]:
        stages.add_row(stage["name"], Text(stage["state"], style=COLOURS[stage["state"]]), Text(stage["detail"]))
    console.print(stages)
    if facts["error"]:
        console.print(Text.assemble(("error: ", "bold red"), facts["error"]), soft_wrap=True)
    if status.run:
        console.print()
        _print_run(status.run, console, now)
    if status.others:
        console.print(Text(f"also here: {', '.join(status.others)}", style="dim"), soft_wrap=True)


def _print_run(run: RunStatus, console: Console, now: float) -> None:
    console.print(Text(run.path, style="bold"), soft_wrap=True)
    console.print(Text(_progress(run)), soft_wrap=True)
    if run.attempt:
        n_nodes, per_node = len(run.attempt["nodes"]), run.attempt["ranks_per_node"]
        nodes = f"{n_nodes} node" if n_nodes == 1 else f"{n_nodes} nodes"
        speed = f", first all-reduce {run.links['bus_gb_per_s']:.2f} GB/s" if run.links.get("bus_gb_per_s") else ""
        slowest = run.attempt.get("slowest_link_mb_per_s")
        speed += f", slowest link {slowest:,} MB/s" if slowest else ""
        console.print(
            Text(
                f"{nodes} x {per_node} ranks on {run.attempt['device']}, {run.attempt['layout']}, "
                f"from step {run.attempt['step']:,}; restarts after failures: {run.restarts}{speed}"
            ),
            soft_wrap=True,
        )
        table = Table(box=None, pad_edge=False)
        for column in ("node", "host", "address", "ranks", "step", "state", "heard"):
            table.add_column(column)
        for row in node_rows(run, now):
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    if run.last_error:
        at = f"last error, {duration(now - run.last_error_at)} ago: "
        console.print(Text.assemble((at, "yellow"), run.last_error), soft_wrap=True)


def _progress(run: RunStatus) -> str:
    of = f"/{run.steps:,}" if run.steps else ""
    parts = [f"step {run.step:,}{of}"]
    for name, words, form in (
        ("train/loss", "loss {}", three_decimals),
        ("val/bits_per_byte", "val {} bits/byte", three_decimals),
        ("perf/tokens_per_s", "{} tokens/s", four_digits),
        ("perf/mfu", "MFU {}", percent),
    ):
        if name in run.metrics:
            parts.append(words.format(form(run.metrics[name])))
    parts.append(f"newest checkpoint {run.checkpoint or 'none yet'}")
    return "  ".join(parts)


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
