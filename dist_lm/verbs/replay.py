"""The verb `replay`: shows that what a run of stage `rlhf` recorded is what happened."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_lm.errors import ArtefactError
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.readable import counted, say

if TYPE_CHECKING:
    from dist_lm.stages.rlhf.record import ConversationRecord
    from dist_lm.stages.rlhf.replay import IterationReplay

DIFFERENT = 1  # exit code


def replay(
    run: Annotated[Path, typer.Argument(help="A run with rlhf.environment, such as work/runs/rlhf/agent.")],
    iteration: Annotated[
        int | None, typer.Option(help="Only this iteration, from 1, as in metrics. Default: all.", min=1)
    ] = None,
    rollout: Annotated[
        int | None,
        typer.Option(help="Only this conversation of it, from 1, in the order of tasks and samples.", min=1),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Execute the recorded turns in a fresh environment, without the model."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each iteration, a line each.")
    ] = False,
) -> None:
    """Draw a run's recorded conversations again from its weights and compare them. Exit code 1 if they differ."""
    from dist_lm.stages.rlhf.config import RlhfRunConfig
    from dist_lm.stages.rlhf.record import recorded_run
    from dist_lm.stages.rlhf.replay import Chosen, draw_again, execute_again
    from dist_lm.verbs.data_step import config_of

    chosen, directory = Chosen(iteration, rollout), RunDirectory(run)
    config = config_of(directory)
    if not isinstance(config, RlhfRunConfig):
        raise ArtefactError(
            f"{run}: stage {config.stage.name} holds no conversations; expected a run of stage rlhf with "
            "rlhf.environment"
        )
    record = recorded_run(directory, config)
    results = execute_again(record, chosen) if verify else draw_again(record, chosen)
    if not print_results(results, record, as_json=as_json, verifies=verify):
        raise typer.Exit(DIFFERENT)


def print_results(
    results: "Iterable[IterationReplay]", record: "ConversationRecord", *, as_json: bool, verifies: bool
) -> bool:
    """Prints a line for each iteration as soon as it is compared; returns whether all are equal.

    Raises:
        ArtefactError: no conversation could be compared, or as `results`.
    """
    from dist_lm.stages.rlhf.replay import no_weights

    all_equal, has_compared, result = True, False, None
    for result in results:
        all_equal = all_equal and result.is_equal
        has_compared = has_compared or verifies or result.weights is not None
        if as_json:
            print(json.dumps(asdict(result) | {"equal": result.is_equal}), flush=True)
        else:
            say(line_of(result, record, verifies))

    if result is not None and not has_compared:
        raise ArtefactError(f"{record.run.path}: no conversation was compared: {no_weights(record, result.version)}")
    return all_equal


def line_of(result: "IterationReplay", record: "ConversationRecord", verifies: bool) -> str:
    """Returns what is printed of an iteration."""
    from dist_lm.stages.rlhf.replay import no_weights

    line = f"iteration {result.iteration}: {result.conversations:,} conversations, {result.turns:,} turns, "
    line += f"{result.tokens:,} tokens"
    if not result.is_finished:
        line += " so far"

    if result.difference is not None:
        line += f": {result.differing:,} differ, the first is rollout {result.rollout}, {result.difference}"
    elif verifies or result.weights is not None:
        line += ": equal"
        if result.threads is not None:
            line += f" ({counted(result.threads, 'thread')})"
    else:
        line += f": not drawn again, as {no_weights(record, result.version)}"

    if result.largest_gap:
        line += f"; log-probabilities differ by at most {result.largest_gap:.2g}"
    if result.not_compared:
        line += f"; {result.not_compared:,} ended by a timeout or a failed machine, which is not compared"
    if result.metric_difference is not None:
        metric = result.metric_difference
        line += f"; {metric.name} was written as {metric.written}, its conversations give {metric.computed}"
    elif result.metrics:
        line += f"; {result.metrics} metrics equal"
    return line
