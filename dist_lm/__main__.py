"""`python -m dist_lm VERB` = `dist-lm VERB`: every command that does not run a stage.

This module only declares the verbs. Each verb imports its package when it is called.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dist_lm.bench.command import bench
from dist_lm.errors import ArtefactError
from dist_lm.launcher.process import run_program

app = typer.Typer(
    name="dist-lm",
    help="Work with runs, corpora and checkpoints. Stages run with `python -m dist_lm.launch stage=S`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Look at corpora, describe data of your own.", no_args_is_help=True)
app.add_typer(data, name="data")
checkpoint = typer.Typer(help="Inspect, verify, average and consolidate checkpoints.", no_args_is_help=True)
app.add_typer(checkpoint, name="checkpoint")
cluster = typer.Typer(help="Look at the nodes and ranks of a run.", no_args_is_help=True)
app.add_typer(cluster, name="cluster")
tools = typer.Typer(help="Examine a model that calls functions.", no_args_is_help=True)
app.add_typer(tools, name="tools")
dashboard = typer.Typer(help="Save views in wandb, or show an offline run in the terminal.", no_args_is_help=True)
app.add_typer(dashboard, name="dashboard")
profile = typer.Typer(help="Look at the traces of profile.steps.", no_args_is_help=True)
app.add_typer(profile, name="profile")
gpu = typer.Typer(help="Check the GPUs of this machine.", no_args_is_help=True)
app.add_typer(gpu, name="gpu")
app.command("bench")(bench)

CheckpointPath = Annotated[
    Path, typer.Argument(help="A checkpoint, or a folder of checkpoints or a run (LATEST is used).")
]

TokenizerPath = Annotated[
    Path | None,
    typer.Option(
        help="Tokenizer: a file, or a folder such as work/tokenizer. Default: that of the run's work directory."
    ),
]
DeviceName = Annotated[str, typer.Option(help="auto (a GPU, if there is one), cpu or cuda.")]


@data.command("inspect")
def data_inspect(
    corpus: Annotated[Path, typer.Argument(help="A corpus folder, such as work/corpora/code.")],
) -> None:
    """Print counts by language and split, shards, sources, licences, and a document of each language."""
    from rich.console import Console

    from dist_lm.data.inspect import print_corpus

    if not print_corpus(corpus, Console()):
        raise ArtefactError(
            f"{corpus} differs from its manifest: remove damaged tars and run stage=shards, which builds them again; "
            "move files of others away"
        )


@data.command("new")
def data_new(
    places: Annotated[list[str], typer.Argument(help="Files, folders, globs or URLs.", metavar="PATH...")],
    out: Annotated[Path, typer.Option("--out", help="The file to write: DIR/corpus/NAME.yaml.")],
    sample: Annotated[int, typer.Option(help="MiB of text that are read of each corpus.", min=1)] = 256,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Look at data and write a corpus file for it: readers, columns, languages, licences, and what would be dropped."""
    from rich.console import Console

    from dist_lm.data.new import new_corpus
    from dist_lm.launcher.conf_folders import choices

    new_corpus(places, out, Console(), sample_bytes=sample << 20, force=force, taken=choices("corpus"))


@app.command("metrics")
def metrics(
    stage: Annotated[str | None, typer.Option(help="Only the metrics of this stage.")] = None,
) -> None:
    """Print every metric: name, unit, better direction, stages, meaning. docs/metrics.md is this output."""
    from dist_lm.tracking.metrics_page import page

    print(page(stage), end="")


@gpu.command("check")
def gpu_check(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Only this check (docs/gpu.md); may be repeated.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs to use; 2 or more add NCCL, FSDP, tp, kill and hang.")] = 1,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="On the CPU, at tiny sizes.")] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for results.json and logs. Results of this machine in it are kept.")
    ] = Path("work/gpu_check"),
    table: Annotated[
        Path | None, typer.Option(help="Page whose table the results replace, such as docs/gpu.md.")
    ] = None,
) -> None:
    """Run all checks that one GPU can, within ten minutes. Exit code 1 if one failed, 2 without a GPU (docs/gpu.md)."""
    from dist_lm.gpu_check.run import check_gpus

    if not check_gpus(only or [], gpus, output, table, rehearse=rehearse, say=print):
        raise typer.Exit(1)


@app.command("generate")
def generate(
    path: CheckpointPath,
    prompt: Annotated[
        str | None,
        typer.Option(help="The text to continue. Default: prompts typed at the terminal, or all of standard input."),
    ] = None,
    suffix: Annotated[
        str | None,
        typer.Option(help="The text behind the answer: the model fills the middle (trained with stage.fim_rate)."),
    ] = None,
    tokenizer: TokenizerPath = None,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0: the likeliest token.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Sample from this number of likeliest tokens; 0: off.")] = 50,
    top_p: Annotated[
        float, typer.Option(help="Sample from the smallest set of tokens with this probability; 1: off.")
    ] = 0.95,
    min_p: Annotated[
        float, typer.Option(help="Sample from tokens with at least this share of the largest probability; 0: off.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that have occurred are less likely; 1: off.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends an answer (\\n \\t as in a string); may be repeated.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Equal seeds give equal answers. Default: a new seed for every call.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Number of answers to the prompt.")] = 1,
    device: DeviceName = "auto",
    tp: Annotated[int, typer.Option("--tp", help="GPUs that share a model too large for one.")] = 1,
    tools: Annotated[
        Path | None,
        typer.Option(help="A Python file whose functions the model may call. Prompts are then requests to the model."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are requests to the model, which it answers in turn.")
    ] = False,
    max_rounds: Annotated[int, typer.Option(help="With --tools: most turns with calls for one request.")] = 8,
    tool_seconds: Annotated[float, typer.Option(help="With --tools: time limit of a call.")] = 10.0,
    tool_characters: Annotated[
        int, typer.Option(help="With --tools: longest result of a call; the rest is cut off.")
    ] = 4000,
) -> None:
    """Continue a text: one prompt, or a session at the terminal (docs/generation.md)."""
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
    options = ToolOptions(tools, max_rounds, Limits(tool_seconds, tool_characters)) if tools or chat else None
    raise typer.Exit(generate(path, prompt, tokenizer, values, stop or [], seed, n, device, tp, options, suffix))


@app.command("export")
def export(
    path: CheckpointPath,
    folder: Annotated[Path, typer.Argument(help="The folder to write: new, empty, or an earlier export.")],
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    tokenizer: TokenizerPath = None,
    gguf: Annotated[str | None, typer.Option(help="F16 or Q8_0: a file for llama.cpp as well.")] = None,
    merge: Annotated[bool, typer.Option(help="Write the merged model of a run with adapters (stage.lora).")] = False,
    base: Annotated[
        str, typer.Option(help="Base for peft: a folder or hub id. Default: where the base was imported from.")
    ] = "",
    push: Annotated[str | None, typer.Option(help="Id of a repository on the hub to upload the folder to.")] = None,
) -> None:
    """Write a model as a folder for transformers, vLLM or llama.cpp, with tokenizer and card (docs/in_and_out.md)."""
    from dist_lm.stages.export import export
    from dist_lm.stages.hf_export import check_repository, push_folder

    if push:
        check_repository("--push", push)
    print(f"{folder}: {export(path, folder, dtype, tokenizer, gguf, merge, base)}")
    if push:
        push_folder(folder, push)
        print(f"{folder}: uploaded to {push}")


@app.command("import")
def import_model(
    source: Annotated[
        str, typer.Argument(help="A folder that transformers saved, a GGUF file, or the id of a model on the hub.")
    ],
    name: Annotated[str, typer.Argument(help="The run to write: WORK_DIR/runs/import/NAME.")],
    work_dir: Annotated[Path, typer.Option(help="The work_dir of the launches that start from it.")] = Path("work"),
) -> None:
    """Write a model of transformers or llama.cpp as a run that stages start from (docs/in_and_out.md)."""
    from dist_lm.stages.importing import import_model
    from dist_lm.storage.run_directory import WorkDirectory

    run = import_model(source, name, WorkDirectory(work_dir)).path
    print(f"{run}: train with --config-dir {run}/conf model={name} tokenizer={run}/tokenizer stage.init_from={run}")


@app.command("report")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Runs (work/runs/STAGE/RUN_ID), the runs of a stage (work/runs/STAGE), or a work directory."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The file to write. Default: report.html in the run, or in this folder for several runs."),
    ] = None,
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="For a work directory: run_id of the command. Default: the newest.")
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
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="run_id of the command. Default: the newest command.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Print stages, step, throughput, nodes, ranks, restarts and last error of a running or finished command."""
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
    limit: Annotated[int, typer.Option(help="Most questions of a category; 0: all.")] = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write one JSON object for each question to this file.")
    ] = None,
    tokenizer: TokenizerPath = None,
    device: DeviceName = "auto",
) -> None:
    """Score a model on the single-turn questions of the Berkeley Function Calling Leaderboard (package bfcl-eval)."""
    from dist_lm.evaluation.bfcl import evaluate

    evaluate(path, tokenizer, limit, json, device)


@app.command("lm-eval")
def lm_eval(
    path: CheckpointPath,
    tasks: Annotated[
        list[str], typer.Option("--tasks", help="Tasks, groups or task files, separated by commas; may be repeated.")
    ],
    num_fewshot: Annotated[
        int | None, typer.Option("--num_fewshot", help="Examples in a context. Default: what the task says.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="Documents of a task, at most; below 1: this share of them.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply_chat_template", help="Contexts are conversations in the model's layout.")
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option("--system_instruction", help="The first turn or text of every context.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include_path", help="A folder with task files of your own.")
    ] = None,
    gen_kwargs: Annotated[
        str | None, typer.Option("--gen_kwargs", help="Sampling of answers: do_sample=true,temperature=0.8")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of examples and of sampled answers.")] = 1234,
    output: Annotated[Path | None, typer.Option(help="Write the results of lm_eval to this JSON file.")] = None,
    samples: Annotated[Path | None, typer.Option(help="Write a JSON object a document to this file.")] = None,
    tokenizer: TokenizerPath = None,
    device: DeviceName = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: bfloat16 on a GPU.")] = "auto",
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm_run_unsafe_code", help="Refused: generated code runs in the sandbox alone.")
    ] = False,
) -> None:
    """Evaluate a model on tasks of lm-evaluation-harness (docs/lm_eval.md)."""
    from dist_lm.errors import require
    from dist_lm.evaluation.harness import WAY_OUT, HarnessOptions, evaluate

    require(not confirm_run_unsafe_code, "--confirm_run_unsafe_code", "true", f"no such option here: {WAY_OUT}")
    options = HarnessOptions(
        tasks,
        num_fewshot,
        limit,
        apply_chat_template,
        system_instruction,
        include_path,
        gen_kwargs,
        seed,
    )
    evaluate(path, options, tokenizer, device, dtype, output, samples)


BoardName = Annotated[
    str | None,
    typer.Argument(help="overview, language, code, tools, preference, reward, rlhf or generate. Default: all."),
]


@dashboard.command("push")
def dashboard_push(
    board: BoardName = None,
    project: Annotated[str, typer.Option(help="Project in wandb: the `tracking.project` of the runs.")] = "dist_lm",
    entity: Annotated[str | None, typer.Option(help="User or team in wandb. Default: that of the login.")] = None,
) -> None:
    """Save an overview and a view of each stage in a wandb project. Replaces the views of the last push."""
    import os

    from dist_lm.tracking.dashboard import boards
    from dist_lm.tracking.dashboard_push import push

    push(boards(board), entity, project, os.environ, print)


@dashboard.command("show")
def dashboard_show(
    board: BoardName = None,
    offline: Annotated[
        Path | None, typer.Option("--offline", help="A run (work/runs/STAGE/RUN_ID) whose curves to show.")
    ] = None,
) -> None:
    """Print the panels of the views as a table, or with --offline show the curves of a run in the terminal."""
    from dist_lm.errors import require
    from dist_lm.storage.run_directory import RunDirectory
    from dist_lm.tracking.console import Console
    from dist_lm.tracking.dashboard import boards
    from dist_lm.tracking.dashboard_show import open_in_leet, print_boards

    if offline is not None:
        require(board is None, "board", board, "no name of a view beside --offline, which shows all curves of a run")
        open_in_leet(RunDirectory(offline))
    print_boards(boards(board), Console())


@checkpoint.command("inspect")
def checkpoint_inspect(path: CheckpointPath) -> None:
    """Print step, model, tensors by kind, files and pointers. Reads no tensors."""
    from rich.console import Console

    from dist_lm.training.checkpoint_inspect import print_checkpoint

    print_checkpoint(path, Console())


@checkpoint.command("verify")
def checkpoint_verify(path: CheckpointPath) -> None:
    """Read every file and compare it with the manifest. Exit code 2 and one line for each damaged file."""
    from dist_lm.training import checkpoint_files

    directory = checkpoint_files.find_checkpoint(path)
    damage = list(checkpoint_files.damage(directory))
    for line in damage:
        print(line)
    if damage:
        raise ArtefactError(f"checkpoint {directory}: damaged files: {len(damage)}")
    print(f"{directory}: {len(checkpoint_files.read_manifest(directory))} files, all intact")


@checkpoint.command("consolidate")
def checkpoint_consolidate(
    path: CheckpointPath,
    output: Annotated[Path, typer.Option(help="The file to write, FILE.safetensors. It must not exist.")],
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Add the optimizer's tensors.")] = False,
) -> None:
    """Write the whole tensors of the model to one safetensors file."""
    from dist_lm.training.checkpoint_tensors import consolidate

    count = consolidate(path, output, with_optimizer=optimizer)
    print(f"{output}: {count:,} tensors, {output.stat().st_size:,} bytes")


@checkpoint.command("average")
def checkpoint_average(
    run: Annotated[Path, typer.Argument(help="A run (work/runs/STAGE/RUN_ID).")],
    last: Annotated[int, typer.Option(help="Average the last K checkpoints.", metavar="K")] = 0,
    ema: Annotated[bool, typer.Option("--ema", help="Take the average that stage.ema_decay kept.")] = False,
    evaluate: Annotated[bool, typer.Option(help="Measure it on val, beside the newest checkpoint.")] = True,
    device: DeviceName = "auto",
) -> None:
    """Write averaged weights as a checkpoint, RUN/averages/..., for export, generate and stage.init_from."""
    from rich.console import Console

    from dist_lm.stages.averaging import average
    from dist_lm.storage.run_directory import RunDirectory

    average(RunDirectory(run), last, ema, device if evaluate else "", Console())


@profile.command("summarize")
def profile_summarize(
    run: Annotated[Path, typer.Argument(help="A run (work/runs/STAGE/RUN_ID) with profile.steps.")],
) -> None:
    """Print where a step went: computation, messages hidden and exposed, idle time, host waits, operators."""
    from dist_lm.storage.run_directory import RunDirectory
    from dist_lm.tracking.console import Console
    from dist_lm.training.profile_summary import summarize

    summarize(RunDirectory(run), Console())


def main() -> None:
    """Run a verb. A user error prints one line to standard error; the exit code is 2."""
    run_program(app, lambda text: print(f"error: {text}", file=sys.stderr))


if __name__ == "__main__":
    main()
