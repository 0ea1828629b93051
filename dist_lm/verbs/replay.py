"""The verb `replay`: shows that what a run of stage `rlhf` recorded is what happened."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_lm.errors import ArtefactError, require
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tracking.readable import counted, say

if TYPE_CHECKING:
    from dist_lm.rlhf.episodes import Episode
    from dist_lm.stages.rlhf.fork import Fork
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
    fork: Annotated[
        int | None,
        typer.Option(
            help="Print the conversation of --rollout as it goes on from this turn of the model, from 1. The turns "
            "before are executed again in a fresh environment.",
            min=1,
        ),
    ] = None,
    edit: Annotated[
        str | None,
        typer.Option(help="Text in place of that turn, with marks such as <tool_call>. Default: the model draws it."),
    ] = None,
    edit_file: Annotated[
        Path | None, typer.Option(help="A file with that text.", exists=True, dir_okay=False, readable=True)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object for each iteration, or for the fork, a line each.")
    ] = False,
) -> None:
    """Draw a run's recorded conversations again from its weights and compare them, or fork one. Exit code 1 if they
    differ."""
    from dist_lm.stages.rlhf.config import RlhfRunConfig
    from dist_lm.stages.rlhf.record import recorded_run
    from dist_lm.stages.rlhf.replay import Chosen, draw_again, execute_again
    from dist_lm.verbs.data_step import config_of

    edit_option = "--edit" if edit_file is None else "--edit-file"
    has_edit = edit is not None or edit_file is not None
    require(fork is not None or not has_edit, edit_option, "...", "--fork beside it")
    require(fork is None or not verify, "--verify", "true", "no --fork beside it")
    text = edited_text(edit, edit_file)
    chosen, directory = Chosen(iteration, rollout), RunDirectory(run)
    config = config_of(directory)
    if not isinstance(config, RlhfRunConfig):
        raise ArtefactError(
            f"{run}: stage {config.stage.name} holds no conversations; expected a run of stage rlhf with "
            "rlhf.environment"
        )
    record = recorded_run(directory, config)
    if fork is not None:
        from dist_lm.stages.rlhf.fork import fork as forked

        if not print_fork(forked(record, chosen, fork, text, edit_option), as_json=as_json):
            raise typer.Exit(DIFFERENT)
        return
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


# --- a fork ---


def edited_text(edit: str | None, edit_file: Path | None) -> str | None:
    """Returns the text of an edited turn, that of a file without the line break at its end; None if neither is given:
    the model draws the turn.

    Raises:
        ConfigError: both are given.
        ArtefactError: the file is not UTF-8, or cannot be read.
    """
    if edit_file is None:
        return edit
    require(edit is None, "--edit-file", edit_file, "no --edit beside it")
    try:
        # Editors end a file with a line break, which is no part of the turn.
        return edit_file.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"--edit-file {edit_file}: cannot be read ({error})") from error


def print_fork(fork: "Fork", *, as_json: bool) -> bool:
    """Prints a fork; returns whether it is the recorded conversation, or was edited."""
    if as_json:
        print(json.dumps(value_of(fork)), flush=True)
    else:
        say("\n".join(lines_of(fork)))
    return fork.is_edited or fork.forked.difference is None


def value_of(fork: "Fork") -> dict[str, Any]:
    """Returns a fork as a JSON value."""
    now, difference = fork.now, fork.forked.difference
    turns = [
        {"origin": spoken.origin, "text": text, **asdict(turn)}
        for spoken, text, turn in zip(fork.forked.spoken, fork.texts, now.turns, strict=False)
    ]

    return {
        "iteration": fork.iteration,
        "rollout": fork.rollout,
        "fork": fork.turn,
        "edited": fork.is_edited,
        "weights": fork.weights,
        "threads": fork.threads,
        "equal": None if fork.is_edited else difference is None,
        "difference": asdict(difference) if difference else None,
        # The conversation as it ended now, and the recorded one.
        "task": now.position,
        "sample": now.sample,
        "opening": now.opening,
        "turns": turns,
        "cut": now.cut or None,
        "verdict": asdict(now.verdict),
        "reward": now.reward,
        "recorded": {
            "turns": len(fork.recorded.turns),
            "cut": fork.recorded.cut or None,
            "verdict": asdict(fork.recorded.verdict),
            "reward": fork.recorded.reward,
        },
    }


def lines_of(fork: "Fork") -> list[str]:
    """Returns a fork for people: all turns of the conversation, then how it ended."""
    now, action = fork.now, "edited" if fork.is_edited else "drawn again"
    lines = [
        f"iteration {fork.iteration}, rollout {fork.rollout} (task {now.position}, sample {now.sample}), forked at "
        f"turn {fork.turn}, which is {action}"
    ]
    opening: Any = now.opening or {"messages": [], "tools": []}
    if opening["tools"]:
        lines.append("tools: " + ", ".join(tool[0] for tool in opening["tools"]))
    for message in opening["messages"]:
        lines += _lines_of_message(message)

    for number, turn in enumerate(now.turns, 1):
        if number <= len(fork.texts):
            spoken = fork.forked.spoken[number - 1]
            reward = f", reward {turn.reward:g}" if turn.reward else ""
            lines += [f"--- model, turn {number}: {spoken.origin}, {counted(turn.new_tokens, 'token')}{reward}"]
            lines.append(fork.texts[number - 1])
        step: Any = turn.step or {"observation": {"messages": []}}
        for message in step["observation"]["messages"]:
            lines += _lines_of_message(message)

    lines.append(f"--- {_ending(now)}; recorded: {_ending(fork.recorded)}")
    if fork.is_edited:
        return lines
    difference = fork.forked.difference
    return [*lines, "equal to the record" if difference is None else f"differs from the record: {difference}"]


def _lines_of_message(message: Any) -> list[str]:
    lines = [f"--- {message['role']}"]
    if message["content"]:
        lines.append(message["content"])
    return lines + [json.dumps(result, ensure_ascii=False) for result in message["results"]]


def _ending(episode: "Episode") -> str:
    cut = f", cut by {episode.cut}" if episode.cut else ""
    if episode.reward is None:
        return f"no verdict ({episode.verdict.failure_reason}: {episode.verdict.detail}){cut}"
    return f"reward {episode.reward:g} after {counted(len(episode.turns), 'turn')}{cut}"


# --- iterations ---


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
