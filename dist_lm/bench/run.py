"""`python -m dist_lm bench NAME`: build the ways of every case, check that they compute the same, time them in turn."""

import importlib
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console

from dist_lm.bench.case import Case, CrewSize
from dist_lm.bench.crew import crews
from dist_lm.bench.record import Record, records_of, table_of
from dist_lm.bench.rounds import seconds_per_step
from dist_lm.cluster.node_facts import local_gpus
from dist_lm.config.file import save_config
from dist_lm.errors import ConfigError, UserError
from dist_lm.storage.process import cores

NAMES = ("tp", "fsdp", "checkpointing", "compile", "generate", "reward", "rlhf", "metrics", "tracking")
QUICK_ROUNDS = 3
QUICK_ROUND_S = 0.1
SAME_LOSS = 1e-4  # relative, over the first steps in fp32

Ask = Callable[[CrewSize, Mapping[str, Any]], list[dict[str, Any]]]
"""(crew, request) -> the answer of each of its ranks."""


class NotTheSameError(UserError):
    """Two ways that should compute the same show different losses, so their times say nothing."""


def run_benchmark(
    name: str, overrides: Sequence[str], console: Console, *, quick: bool, json_file: Path | None
) -> list[Record]:
    """Run one benchmark and show it; a line of JSON a record goes to `json_file` as soon as a case is done.

    Raises:
        ConfigError: no such benchmark, or overrides that cannot run.
        RankFailedError, NotTheSameError: see there.
    """
    if name not in NAMES:
        raise ConfigError(f"bench {name}: expected one of {', '.join(NAMES)}")
    module = f"dist_lm.bench.{name}"
    benchmark = importlib.import_module(module)
    planned: list[Case] = benchmark.cases(overrides, quick)
    device = _device(planned)
    records: list[Record] = []
    with ExitStack() as stack:
        file = stack.enter_context(json_file.open("w")) if json_file else None
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dlm-bench-")))
        running = stack.enter_context(crews(module, device, work))
        status = stack.enter_context(console.status(""))
        for case in planned:
            status.update(f"{name}: {case.name}")
            own = run_case(name, case, lambda crew, request: running[crew].ask(request), work, quick=quick)
            _write(own, file)
            records += own
    rounds = QUICK_ROUNDS if quick else max(case.rounds for case in planned)
    console.print(table_of(f"{name}: medians of {rounds} rounds on {_machine(device)}", records))
    return records


def run_case(name: str, case: Case, ask: Ask, work: Path, *, quick: bool) -> list[Record]:
    """Build every way of a case, check their losses, time them, free them."""
    path = work / "config.yaml"
    save_config(case.config, path)
    built = {way: ask(crew, {"do": "build", "way": way, "config": str(path)})[0] for way, crew in case.ways.items()}
    if case.same_losses:
        check_same({way: built[way]["losses"] for way in case.ways if way in case.same_losses})

    def time_steps(way: str, steps: int) -> float:
        return max(answer["seconds"] for answer in ask(case.ways[way], {"do": "time", "way": way, "steps": steps}))

    if quick:
        seconds = seconds_per_step(list(case.ways), QUICK_ROUNDS, time_steps, QUICK_ROUND_S)
    else:
        seconds = seconds_per_step(list(case.ways), case.rounds, time_steps)
    for crew in sorted(set(case.ways.values()), key=repr):
        ask(crew, {"do": "forget"})
    return records_of(name, case, seconds, {way: built[way]["facts"] for way in case.ways})


def check_same(losses: Mapping[str, Sequence[float]]) -> None:
    """Refuse ways whose first losses differ.

    Raises:
        NotTheSameError: names the two ways and the step.
    """
    first, *others = losses.items()
    for way, own in others:
        for step, (expected, loss) in enumerate(zip(first[1], own, strict=True)):
            if not abs(loss - expected) <= SAME_LOSS * abs(expected):
                raise NotTheSameError(
                    f"'{way}' and '{first[0]}' do not compute the same: loss {loss} and {expected} at step {step}"
                )


def _write(records: Sequence[Record], file: IO[str] | None) -> None:
    if file is not None:
        file.writelines(record.to_json() + "\n" for record in records)
        file.flush()


def _device(planned: Sequence[Case]) -> str:
    """`device` of the configuration; `auto`: GPUs where there is one for every rank, else the CPU."""
    asked, ranks = planned[0].config.device, max(crew.ranks for case in planned for crew in case.ways.values())
    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() and local_gpus() >= ranks else "cpu"


def _machine(device: str) -> str:
    what = torch.cuda.get_device_name() if device == "cuda" else f"{cores()} cores {platform.machine()}"
    return f"{what}, torch {torch.__version__}"
