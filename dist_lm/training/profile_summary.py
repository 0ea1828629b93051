"""Shows where the time of profiled steps went, from the trace files of a run alone: `dist-lm profile summarize RUN`.

On a GPU computation and communication are kernels and copies; on a CPU they are operators and gloo's messages.
Communication is hidden while the same device computes, else exposed. Idle is the rest of a step: on a GPU the host was
late or waited, on a CPU Python ran or the process waited.
"""

import gzip
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lm.errors import ArtefactError
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.console import Console
from dist_lm.tracking.readable import percent
from dist_lm.training.step_profiler import LAP, START, STEP

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of the work of a GPU
HOST_CALLS = ("cuda_runtime", "cuda_driver")
WAITS = (  # calls in which the host waits for the GPU
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaFree"),
    *("cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"),
)
WRAPPERS = ("c10d", "_c10d_functional", "autograd", "torch")  # namespaces whose operators contain others or messages
LISTED_OPERATORS = 15
NAME_WIDTH = 70  # characters of an operator

Interval = tuple[float, float]  # begin, end: microseconds
Work = tuple[str, Interval, float]  # operator, when, microseconds without the operators that it calls


@dataclass(frozen=True)
class RankProfile:
    """Means of a rank over its profiled steps, in seconds: step = compute + exposed + idle."""

    steps: tuple[int, ...]  # step numbers
    on_gpu: bool
    step: float
    compute: float
    hidden: float  # communication during computation
    exposed: float  # communication at other times
    idle: float
    waits: float  # number of calls in which the host waited for the GPU
    waited: float  # seconds in these calls
    pageable: float  # copies between the GPU and pageable memory
    parts: Mapping[str, float]  # time of the host by part of a step; `rest`: metrics, evaluation, checkpoint
    operators: Mapping[str, tuple[float, float]]  # calls, seconds


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns the same points as sorted intervals that do not touch; intervals without length are dropped."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > begin:
            merged.append((begin, end))
    return merged


def length(intervals: Sequence[Interval]) -> float:
    """Returns the sum of the lengths."""
    return sum(end - begin for begin, end in intervals)


def clipped(intervals: Iterable[Interval], window: Interval) -> list[Interval]:
    """Returns the parts of the intervals inside `window`."""
    first, last = window
    return [(max(first, begin), min(last, end)) for begin, end in intervals if begin < last and end > first]


def profile_of(events: Iterable[Mapping[str, Any]]) -> RankProfile:
    """Returns the profile of a rank, means in seconds per step, from the events of its trace (Chrome's format, in
    microseconds).

    Raises:
        ValueError: no step is annotated.
        KeyError, TypeError, AttributeError: an event has another form.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in spans if _is_annotation(event) and event["name"].startswith(STEP)]
    steps = sorted(map(_interval, marks))
    if not steps:
        raise ValueError(f"no annotation {STEP}N")

    device = [event for event in spans if event.get("cat") in DEVICE]
    work, messages = _gpu_work(spans, device) if device else _cpu_work(spans)

    # A GPU may end a step after the host has ended it.
    window = (steps[0][0], max([steps[-1][1], *(_interval(event)[1] for event in device)]))
    compute = union(clipped((interval for _, interval, _ in work), window))
    communication = union(clipped((interval for _, interval, _ in messages), window))
    total = window[1] - window[0]
    busy = length(union([*compute, *communication]))
    hidden = length(compute) + length(communication) - busy

    waits = [event for event in spans if event.get("cat") in HOST_CALLS and event["name"] in WAITS]
    waits_inside = clipped(map(_interval, waits), window)

    calls, microseconds = Counter[str](), defaultdict[str, float](float)
    # Operators count in the step in which they begin.
    for name, (begin, _), duration in [*work, *messages]:
        if window[0] <= begin < window[1]:
            calls[name] += 1
            microseconds[name] += duration

    n_steps = len(steps)
    scale = 1e6 * n_steps  # microseconds in all steps -> seconds in one
    return RankProfile(
        steps=tuple(sorted(int(event["name"].removeprefix(STEP)) for event in marks)),
        on_gpu=bool(device),
        step=total / scale,
        compute=length(compute) / scale,
        hidden=hidden / scale,
        exposed=(length(communication) - hidden) / scale,
        idle=(total - busy) / scale,
        waits=len(waits_inside) / n_steps,
        waited=length(waits_inside) / scale,
        pageable=sum("Pageable" in event["name"] for event in device) / n_steps,
        parts={part: time / scale for part, time in _parts(spans, steps).items()},
        operators={name: (calls[name] / n_steps, microseconds[name] / scale) for name in calls},
    )


def _gpu_work(spans: Sequence[Mapping[str, Any]], device: Sequence[Mapping[str, Any]]) -> tuple[list[Work], list[Work]]:
    """Returns computation and communication of a GPU, in microseconds, from its kernels and copies; NCCL's kernels are
    the communication. A kernel has the name of the operator that launched it, if the trace has it."""
    operators = {
        event["args"].get("External id"): event["name"]
        for event in spans
        if event.get("cat") == "cpu_op" and _is_operator(event["name"])
    }

    work, messages = [], []
    for event in device:
        begin, end = _interval(event)
        if "nccl" in event["name"].lower():
            messages.append((event["name"].partition("(")[0], (begin, end), end - begin))
        else:
            operator = operators.get(event.get("args", {}).get("External id"))
            work.append((operator or event["name"], (begin, end), end - begin))
    return work, messages


def _cpu_work(spans: Sequence[Mapping[str, Any]]) -> tuple[list[Work], list[Work]]:
    """Returns computation and communication of a CPU, in microseconds, the first without the calls inside each call.

    The operators in gloo's threads belong to its messages.
    """
    messages = [event for event in spans if event["name"].startswith("gloo:")]
    main_threads = {event["tid"] for event in spans if event["name"].startswith(STEP)}  # these begin some messages, too
    gloo_threads = {event["tid"] for event in messages} - main_threads

    calls_of_thread = defaultdict[Any, list[tuple[str, Interval]]](list)
    for event in spans:
        if event.get("cat") == "cpu_op" and event.get("tid") not in gloo_threads and _is_operator(event["name"]):
            calls_of_thread[event["tid"]].append((event["name"], _interval(event)))
    work = [call for calls in calls_of_thread.values() for call in _exclusive_times(calls)]
    return work, [(event["name"], _interval(event), event["dur"]) for event in messages]


def _exclusive_times(calls: Iterable[tuple[str, Interval]]) -> list[Work]:
    """Returns the calls of one thread with their microseconds, less those of the calls inside them, by begin."""
    ordered = sorted(calls, key=lambda call: (call[1][0], -call[1][1]))
    exclusive: list[float] = []
    outer: list[int] = []  # indices of the calls that contain the present one
    for index, (_, (begin, end)) in enumerate(ordered):
        while outer and ordered[outer[-1]][1][1] <= begin:
            outer.pop()
        if outer:
            exclusive[outer[-1]] -= end - begin
        outer.append(index)
        exclusive.append(end - begin)
    return [(name, interval, time) for (name, interval), time in zip(ordered, exclusive, strict=True)]


def _parts(spans: Sequence[Mapping[str, Any]], steps: Sequence[Interval]) -> dict[str, float]:
    """Returns microseconds of the host by part, summed over the steps: `data`, the names of laps, and `rest` after the
    last lap; empty without marks of laps."""
    marks = sorted(
        (_interval(event)[1], {START: "data"}.get(event["name"], event["name"].removeprefix(LAP)))
        for event in spans
        if _is_annotation(event) and (event["name"] == START or event["name"].startswith(LAP))
    )
    if not marks:
        return {}

    parts: dict[str, float] = {}
    for begin, end in steps:
        previous = begin
        for time, part in [mark for mark in marks if begin <= mark[0] <= end] + [(end, "rest")]:
            parts[part] = parts.get(part, 0.0) + time - previous
            previous = time
    return parts


def _is_operator(name: str) -> bool:
    namespace, separator, _ = name.partition("::")
    return bool(separator) and namespace not in WRAPPERS


def _is_annotation(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "user_annotation"


def _interval(event: Mapping[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def read_profile(path: Path) -> RankProfile:
    """Reads the profile in a trace file.

    Raises:
        ArtefactError: the file is damaged, or not a trace of a run.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return profile_of(json.load(file)["traceEvents"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as error:
        raise ArtefactError(f"{path}: not a trace of profile.steps ({error}); profile the run again") from error


def summarize(run: RunDirectory, console: Console) -> None:
    """Prints where the time of the profiled steps of a run went, by rank and as means over all ranks: tables of times
    (ms a step), of parts and of operators. It also says if the traces are older than the newest attempt.

    Raises:
        ArtefactError: there is no such run, it has no traces, or one is damaged.
    """
    if not run.config.is_file():
        raise ArtefactError(f"{run.path}: not a run: expected a folder such as work/runs/STAGE/RUN_ID")
    profiles = {rank: read_profile(path) for rank, path in sorted(run.traces().items())}
    if not profiles:
        raise ArtefactError(f"{run.profile}: no traces; run the stage with profile.steps=[FIRST,LAST]")
    ranks = list(profiles.values())
    on_gpu = any(profile.on_gpu for profile in ranks)

    # Ranks do the same steps, so each has the same weight in a mean.
    def mean(name: str) -> float:
        return sum(getattr(profile, name) for profile in ranks) / len(ranks)

    columns = {"step": "step", "compute": "computing", "exposed": "messages exposed", "idle": "idle"}
    columns["hidden"] = "messages hidden"
    if on_gpu:
        columns["waited"] = "host waits for GPU"
    rows = [[str(rank), *(_ms(getattr(profile, name)) for name in columns)] for rank, profile in profiles.items()]
    rows += [["mean", *(_ms(mean(name)) for name in columns)]]
    rows += [["share", *(percent(mean(name) / mean("step")) for name in columns)]]
    title = f"Time of the {'GPU' if on_gpu else 'CPU'}, ms a step, {steps_in_words(ranks[0].steps)}"
    console.table(title, ("rank", *columns.values()), rows)

    if max(path.stat().st_mtime for path in run.traces().values()) < run.config.stat().st_mtime:
        console.line("these traces are older than the newest attempt of the run")
    if on_gpu:
        console.line(
            f"a step, the host waits {mean('waits'):.1f} times for the GPU and copies {mean('pageable'):.1f} tensors "
            "from or to pageable memory (pinned memory needs no waiting)"
        )

    if parts := list(dict.fromkeys(part for profile in ranks for part in profile.parts)):
        rows = [[str(rank), *(_ms(p.parts.get(part, 0.0)) for part in parts)] for rank, p in profiles.items()]
        console.table("Time of the Python thread by part of a step, ms a step", ("rank", *parts), rows)

    rows = [
        (name[:NAME_WIDTH], f"{calls:.1f}", _ms(seconds), percent(seconds / mean("step")))
        for name, calls, seconds in top_operators(ranks)[:LISTED_OPERATORS]
    ]
    console.table("Operators, a step, mean of all ranks", ("operator", "calls", "ms", "share"), rows)


def steps_in_words(steps: Sequence[int]) -> str:
    """Returns `step 3`, or `mean of steps 3 to 5`."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"mean of steps {steps[0]} to {steps[-1]}"


def top_operators(profiles: Sequence[RankProfile]) -> list[tuple[str, float, float]]:
    """Returns (operator, calls, seconds), means over ranks, longest first."""
    calls, seconds = defaultdict[str, float](float), defaultdict[str, float](float)
    for profile in profiles:
        for name, (n_calls, time) in profile.operators.items():
            calls[name] += n_calls / len(profiles)
            seconds[name] += time / len(profiles)
    return [(name, calls[name], seconds[name]) for name in sorted(seconds, key=lambda name: -seconds[name])]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
