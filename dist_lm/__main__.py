"""`python -m dist_lm VERB` = `dist-lm VERB`: everything that is not a stage.

A thin list: each verb lives in its room and is imported only when it is called.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dist_lm.errors import ArtefactError
from dist_lm.launcher.process import run_program

app = typer.Typer(
    name="dist-lm",
    help="What is not a stage. Stages run with `python -m dist_lm.launch stage=S`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Look at corpora.", no_args_is_help=True)
app.add_typer(data, name="data")
checkpoint = typer.Typer(help="Look at checkpoints, check them, put one into a single file.", no_args_is_help=True)
app.add_typer(checkpoint, name="checkpoint")
cluster = typer.Typer(help="Look at the nodes and ranks of a run.", no_args_is_help=True)
app.add_typer(cluster, name="cluster")
tools = typer.Typer(help="Examine a model that calls functions.", no_args_is_help=True)
app.add_typer(tools, name="tools")
dashboard = typer.Typer(help="Look at runs in wandb: views of a project, or an offline run here.", no_args_is_help=True)
app.add_typer(dashboard, name="dashboard")

CheckpointPath = Annotated[
    Path, typer.Argument(help="A checkpoint, a folder of them, or a run (then LATEST is meant).")
]


@app.callback()
def verbs() -> None:
    """Keep verbs apart from options, even while there is one."""


@data.command("inspect")
def data_inspect(
    corpus: Annotated[Path, typer.Argument(help="A corpus folder, such as work/corpora/code.")],
) -> None:
    """Documents, tokens and bytes by language and split; shards, sources, licences; a few documents."""
    from rich.console import Console

    from dist_lm.data.inspect import print_corpus

    if not print_corpus(corpus, Console()):
        raise ArtefactError(
            f"{corpus}: not every shard is as its manifest says; remove the folder and run stage=shards"
        )


@app.command("metrics")
def metrics(
    stage: Annotated[str | None, typer.Option(help="Only what runs of this stage write.")] = None,
) -> None:
    """Print every metric: name, unit, which way is good, stages, meaning (docs/metrics.md is made by this)."""
    from dist_lm.tracking.registry import page

    print(page(stage), end="")


@app.command("bench")
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="tp, fsdp, checkpointing, compile, generate, reward, rlhf, metrics or tracking (docs/bench.md)."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="One workload of your own in place of the usual ones: model=tiny stage.seq_len=256 ..."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The first workload only, few rounds.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write one JSON object a line to this file.")] = None,
) -> None:
    """Measure against a peer and a ceiling, in the same rounds on the same machine."""
    from rich.console import Console

    from dist_lm.bench.run import run_benchmark

    run_benchmark(name, overrides or [], Console(), quick=quick, json_file=json)


@app.command("generate")
def generate(
    path: CheckpointPath,
    prompt: Annotated[
        str | None,
        typer.Option(help="The text to go on with; without it a prompt at the terminal, or all of standard input."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.model, if not that of the work directory the run lies in.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Only from so many of the likeliest tokens; 0: off.")] = 50,
    top_p: Annotated[float, typer.Option(help="Only from the fewest with this much probability; 1: off.")] = 0.95,
    min_p: Annotated[
        float, typer.Option(help="Only from those with this share of the likeliest one's probability; 0: off.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens seen are less likely; 1: off.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends an answer (\\n \\t as in a string); may be repeated.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same one gives the same answers. By default another at every call.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Answers to the prompt.")] = 1,
    device: Annotated[str, typer.Option(help="auto (a GPU, if there is one), cpu or cuda.")] = "auto",
    tp: Annotated[int, typer.Option("--tp", help="GPUs that share a model too large for one.")] = 1,
    tools: Annotated[
        Path | None,
        typer.Option(help="A Python file whose functions the model may call; a prompt is then a request to it."),
    ] = None,
    max_rounds: Annotated[int, typer.Option(help="With --tools: turns with calls for one request, at most.")] = 8,
    tool_seconds: Annotated[float, typer.Option(help="With --tools: of a call, before it is ended.")] = 10.0,
    tool_characters: Annotated[int, typer.Option(help="With --tools: of a result, the rest is cut off.")] = 4000,
) -> None:
    """Go on with a text: one prompt, or many at the terminal (docs/generation.md)."""
    from dist_lm.generation.terminal import generate
    from dist_lm.generation.tool_chat import ToolOptions
    from dist_lm.tools.use.toolbox import Limits

    values = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    options = ToolOptions(tools, max_rounds, Limits(tool_seconds, tool_characters)) if tools else None
    raise typer.Exit(generate(path, prompt, tokenizer, values, stop or [], seed, n, device, tp, options))


@app.command("report")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Runs (work/runs/STAGE/RUN_ID), all of a stage (work/runs/STAGE), or a work directory."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="The file; by default report.html in RUN, or here if there are several.")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="Of a work directory's command; by default the newest.")
    ] = None,
) -> None:
    """Write one HTML file: curves, samples, layout, data, timeline, hardware, configuration (docs/report.md)."""
    from dist_lm.report.page import write_report
    from dist_lm.tracking.readable import gib

    path, size = write_report(runs, output, run_id)
    print(f"{path} ({gib(size)})")


@cluster.command("status")
def cluster_status(
    work_dir: Annotated[Path, typer.Argument(help="The work_dir of a launch.")],
    run_id: Annotated[str | None, typer.Option("--run-id", help="Of the command; by default the newest.")] = None,
    json: Annotated[bool, typer.Option("--json", help="All of it as JSON, for programs.")] = False,
) -> None:
    """Stages, step, throughput, nodes, ranks, restarts, last error of a command, while it runs and afterwards."""
    from dist_lm.cluster.status import as_json, read_status

    status = read_status(work_dir, run_id)
    if json:
        print(as_json(status))
        return
    from rich.console import Console

    from dist_lm.cluster.status import print_status

    print_status(status, Console())


@tools.command("bfcl")
def tools_bfcl(
    path: CheckpointPath,
    limit: Annotated[int, typer.Option(help="Questions of a category, at most; 0: all.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write one JSON object a question to this file.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.model, if not that of the work directory the run lies in.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU, if there is one), cpu or cuda.")] = "auto",
) -> None:
    """Ask the questions of one turn of the Berkeley Function Calling Leaderboard (package bfcl-eval)."""
    from dist_lm.evaluation.bfcl import evaluate

    evaluate(path, tokenizer, limit, json, device)


BoardName = Annotated[
    str | None,
    typer.Argument(help="overview, language, code, tools, reward, rlhf or generate; all of them if left out."),
]


@dashboard.command("push")
def dashboard_push(
    board: BoardName = None,
    project: Annotated[str, typer.Option(help="Of wandb; the `tracking.project` of the runs.")] = "dist_lm",
    entity: Annotated[str | None, typer.Option(help="User or team; by default that of the login.")] = None,
) -> None:
    """Save a view a stage, and an overview, in a project of wandb; the ones of the last push are renewed."""
    import os

    from dist_lm.tracking.dashboard import boards_named
    from dist_lm.tracking.dashboard_push import push

    push(boards_named(board), entity, project, os.environ, print)


@dashboard.command("show")
def dashboard_show(
    board: BoardName = None,
    offline: Annotated[
        Path | None, typer.Option("--offline", help="A run (work/runs/STAGE/RUN_ID): open its curves here instead.")
    ] = None,
) -> None:
    """The panels of the views, as a table; with --offline the curves of a run in the terminal, without a network."""
    from dist_lm.errors import require
    from dist_lm.storage.run_directory import RunDirectory
    from dist_lm.tracking.console import Console
    from dist_lm.tracking.dashboard import boards_named
    from dist_lm.tracking.dashboard_show import open_in_leet, print_boards

    if offline is not None:
        require(board is None, "board", board, "no name of a view beside --offline, which shows all curves of a run")
        open_in_leet(RunDirectory(offline))
    print_boards(boards_named(board), Console())


@checkpoint.command("inspect")
def checkpoint_inspect(path: CheckpointPath) -> None:
    """Step, model, tensors by kind, files, and who points at it; tensors are not read."""
    from rich.console import Console

    from dist_lm.training.checkpoint_inspect import print_checkpoint

    print_checkpoint(path, Console())


@checkpoint.command("verify")
def checkpoint_verify(path: CheckpointPath) -> None:
    """Read every file and compare it with the manifest; exit 2 and a line for each that is not as it was written."""
    from dist_lm.training import checkpoint_files

    directory = checkpoint_files.find_checkpoint(path)
    damage = list(checkpoint_files.damage(directory))
    for line in damage:
        print(line)
    if damage:
        raise ArtefactError(f"checkpoint {directory}: not as it was written (files: {len(damage)})")
    print(f"{directory}: {len(checkpoint_files.read_manifest(directory))} files, all as they were written")


@checkpoint.command("consolidate")
def checkpoint_consolidate(
    path: CheckpointPath,
    output: Annotated[Path, typer.Option(help="The file to write: FILE.safetensors; never one that is there.")],
    optimizer: Annotated[bool, typer.Option("--optimizer", help="The optimizer's tensors too.")] = False,
) -> None:
    """Write the whole tensors of the model to one safetensors file."""
    from dist_lm.training.checkpoint_tensors import consolidate

    count = consolidate(path, output, with_optimizer=optimizer)
    print(f"{output}: {count:,} tensors, {output.stat().st_size:,} bytes")


def main() -> None:
    """Run a verb; what a user can mend is one line on standard error and exit code 2."""
    run_program(app, lambda text: print(f"error: {text}", file=sys.stderr))


if __name__ == "__main__":
    main()
