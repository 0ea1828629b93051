"""`python -m dist_lm bench NAME` builds the variants of a case, checks that their losses agree and times them in turn.

Timing goes in rounds. Every variant runs once per round, so that a busy minute of the machine slows all variants alike.
"""

import math
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dist_lm.bench.case import Case, GroupSize, Record, benchmark_at, records_of, table_of
from dist_lm.bench.progress import progress
from dist_lm.bench.rank_groups import rank_groups
from dist_lm.cluster.node_facts import local_gpus
from dist_lm.config.root import save_config
from dist_lm.errors import ConfigError, UserError
from dist_lm.parallel.sharding import compute_dtype
from dist_lm.storage.process import cores

BENCHMARKS = {
    "tp": "dist_lm.bench.tp",
    "fsdp": "dist_lm.bench.training:FSDP",
    "checkpointing": "dist_lm.bench.training:CHECKPOINTING",
    "compile": "dist_lm.bench.training:COMPILE",
    "generate": "dist_lm.bench.generate",
    "serve": "dist_lm.bench.serve",
    "constraints": "dist_lm.bench.constraints",
    "adapters": "dist_lm.bench.adapters",
    "likelihood": "dist_lm.bench.likelihood",
    "reward": "dist_lm.bench.reward",
    "preference": "dist_lm.bench.preference",
    "rlhf": "dist_lm.bench.rlhf",
    "data": "dist_lm.bench.data",
    "loader": "dist_lm.bench.loader",
    "metrics": "dist_lm.bench.metrics",
    "saving": "dist_lm.bench.saving",
    "tracking": "dist_lm.bench.tracking",
    "sandbox": "dist_lm.bench.sandbox",
}
"""Name -> module, or module:object, with `cases` and `build` as in `case.Benchmark`."""
ROUND_S = 0.5  # seconds of a variant in a round
LONGEST_ROUND = 50  # steps of a variant in a round, at most
QUICK_ROUNDS = 3
QUICK_ROUND_S = 0.1
SAME_LOSS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # largest relative difference over the first steps

Ask = Callable[[GroupSize, Mapping[str, Any]], list[dict[str, Any]]]
"""A function of (group of ranks, request) that returns the answer of each rank."""


class NotTheSameError(UserError):
    """Two variants of the same computation have different losses, so their times are not comparable."""


def run_benchmark(
    name: str, overrides: Sequence[str], console: Console, *, quick: bool, json_file: Path | None
) -> list[Record]:
    """Runs one benchmark in processes of its own, prints its table and returns its records.

    Each record goes to `json_file`, which is written anew, as soon as its case is done, since a later case may fail.

    Args:
        quick: the first workload alone, with few short rounds.

    Raises:
        ConfigError: unknown benchmark, or overrides that cannot run.
        ArtefactError, UserError: as `compose_config`, or a tool that the benchmark needs is missing.
        OSError: `json_file` cannot be written.
        RankFailedError: a rank process failed.
        NotTheSameError: two variants computed different losses.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"bench {name}: expected one of {', '.join([*BENCHMARKS, 'learn', 'scaling'])}")

    planned: list[Case] = benchmark_at(BENCHMARKS[name]).cases(overrides, quick)
    device = _device(planned)

    records: list[Record] = []
    with ExitStack() as stack:
        file = stack.enter_context(json_file.open("w")) if json_file else None
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dlm-bench-")))
        running = stack.enter_context(rank_groups(BENCHMARKS[name], device, work))
        say = stack.enter_context(progress(console))
        for number, case in enumerate(planned, start=1):
            case_records = run_case(
                name,
                case,
                lambda size, request: running[size].ask(request),
                work,
                quick=quick,
                device=device,
                say=partial(_say_of_case, say, f"{name}, case {number} of {len(planned)}, {case.name}"),
            )
            if file:
                file.writelines(record.to_json() + "\n" for record in case_records)
                file.flush()
            records += case_records

    rounds = QUICK_ROUNDS if quick else max(case.rounds for case in planned)
    console.print(table_of(f"{name}: medians of {rounds} rounds on {_machine(device)}", records))
    return records


def _say_of_case(say: Callable[[str], None], case: str, text: str) -> None:
    say(f"{case}: {text}")


def run_case(
    name: str,
    case: Case,
    ask: Ask,
    work: Path,
    *,
    quick: bool,
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> list[Record]:
    """Builds every variant of a case, checks their losses, times them in turn and frees them; returns the case's
    records. The seconds of a step are those of the slowest rank; losses and facts are those of rank 0.

    Args:
        ask: sends a request to a group of ranks.
        work: folder that gets the configuration of the case, as config.yaml.
        quick: few short rounds.
        say: gets what is being done, before each variant is built and each round.

    Raises:
        NotTheSameError: two variants of `case.same_losses` computed different losses.
        RankFailedError: a rank process failed.
        ConfigError: bf16 is asked for on a GPU without it.
    """
    path = work / "config.yaml"
    save_config(case.config, path)

    # Variants that compute something else must not be compared by speed.
    built = {}
    for variant, size in case.variants.items():
        say(f"builds {variant}")
        built[variant] = ask(size, {"do": "build", "variant": variant, "config": str(path)})[0]
    if case.same_losses:
        losses = {variant: built[variant]["losses"] for variant in case.variants if variant in case.same_losses}
        check_same(losses, compute_dtype(case.config.parallel, torch.device(device)))

    def time_steps(variant: str, steps: int) -> float:
        request = {"do": "time", "variant": variant, "steps": steps}
        # The slowest rank counts, since all others wait for it.
        return max(answer["seconds"] for answer in ask(case.variants[variant], request))

    if quick:
        seconds = seconds_per_step(list(case.variants), QUICK_ROUNDS, time_steps, QUICK_ROUND_S, say)
    else:
        seconds = seconds_per_step(list(case.variants), case.rounds, time_steps, say=say)

    # The ranks go on to the next case, which needs the memory of this one.
    for size in sorted(set(case.variants.values()), key=repr):
        ask(size, {"do": "forget"})
    return records_of(name, case, seconds, {variant: built[variant]["facts"] for variant in case.variants})


def check_same(losses: Mapping[str, Sequence[float]], dtype: torch.dtype = torch.float32) -> None:
    """Refuses variants whose first losses differ from those of the first variant by more than SAME_LOSS, relative to
    these, or are NaN.

    Args:
        losses: variant -> losses of its first steps.
        dtype: dtype of the forward and backward pass.

    Raises:
        NotTheSameError: names the two variants and the step.
    """
    (first_variant, first_losses), *remaining = losses.items()
    for variant, variant_losses in remaining:
        for step, (expected, loss) in enumerate(zip(first_losses, variant_losses, strict=True)):
            # Written with `not`, so that a NaN is refused too.
            if not abs(loss - expected) <= SAME_LOSS[dtype] * abs(expected):
                raise NotTheSameError(
                    f"'{variant}' and '{first_variant}' do not compute the same: "
                    f"loss {loss} and {expected} at step {step}"
                )


def order_of_round(variants: Sequence[str], index: int) -> list[str]:
    """Rotates the variants by one each round, so that none always starts with the caches of the same other one."""
    shift = index % len(variants)
    return [*variants[shift:], *variants[:shift]]


def seconds_per_step(
    variants: Sequence[str],
    rounds: int,
    time_steps: Callable[[str, int], float],
    round_s: float = ROUND_S,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """Returns the seconds of a step of each variant, one value per round, after one step of each that is not returned.

    Args:
        time_steps: function of (variant, steps) that returns the seconds that those steps take in total.
        round_s: seconds that a variant should take in a round; they set its number of steps, at most LONGEST_ROUND.
        say: gets the number of each round when it begins.
    """
    # One timed step of each variant gives the number that fills a round.
    steps = {variant: min(LONGEST_ROUND, max(1, math.ceil(round_s / time_steps(variant, 1)))) for variant in variants}

    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for index in range(rounds):
        say(f"round {index + 1} of {rounds}")
        for variant in order_of_round(variants, index):
            seconds[variant].append(time_steps(variant, steps[variant]) / steps[variant])
    return seconds


def _device(planned: Sequence[Case]) -> str:
    """Returns `device` of the configuration; `auto` means GPUs if there is one for every rank, else the CPU."""
    device = planned[0].config.device
    if device != "auto":
        return device

    # Times on a GPU and on a CPU cannot be compared, so the largest group decides for all.
    ranks = max(size.ranks for case in planned for size in case.variants.values())
    return "cuda" if torch.cuda.is_available() and local_gpus() >= ranks else "cpu"


def _machine(device: str) -> str:
    if device == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        processor = f"{cores()} cores {platform.machine()}"
    return f"{processor}, torch {torch.__version__}"
