"""`python -m dist_lm VERB` = `dist-lm VERB`: every command that does not run a stage.

This module and `verbs` only declare the commands. Each verb imports its package when it is called, which keeps `--help`
quick.
"""

from pathlib import Path
from typing import Annotated

import typer

from dist_lm.bench.command import bench
from dist_lm.errors import ArtefactError, require, require_folder_name
from dist_lm.launcher.process import run_program
from dist_lm.storage import outputs
from dist_lm.tracking.console import Console
from dist_lm.tracking.readable import OutputConsole, gib, say
from dist_lm.verbs.arguments import CheckpointPath, DeviceName, TokenizerPath
from dist_lm.verbs.checkpoint import checkpoint
from dist_lm.verbs.generate import generate
from dist_lm.verbs.lm_eval import lm_eval
from dist_lm.verbs.replay import replay
from dist_lm.verbs.serve import serve

app = typer.Typer(
    name="dist-lm",
    help="Work with runs, corpora and checkpoints. Stages run with `python -m dist_lm.launch stage=S`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Look at corpora, describe data of your own.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(checkpoint, name="checkpoint")
recipe = typer.Typer(help="Write an experiment for a model and data of your own.", no_args_is_help=True)
app.add_typer(recipe, name="recipe")
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
app.command("generate")(generate)
app.command("lm-eval")(lm_eval)
app.command("replay")(replay)
app.command("serve")(serve)


@data.command("inspect")
def data_inspect(
    corpus: Annotated[Path, typer.Argument(help="A corpus folder, such as work/corpora/code.")],
) -> None:
    """Print counts by language and split, shards, sources, licences, and a document of each language."""
    from dist_lm.data.inspect import print_corpus

    if not print_corpus(corpus, OutputConsole()):
        raise ArtefactError(
            f"{corpus} differs from its manifest: remove damaged tars and run stage=shards, which builds them again; "
            "move files of others away"
        )


@data.command("list")
def data_list(
    work: Annotated[Path, typer.Argument(help="A work directory.")] = Path("work"),
    unused: Annotated[
        bool, typer.Option("--unused", help="Print commands that remove the corpora that no run uses; removes nothing.")
    ] = False,
) -> None:
    """List the corpora of a work directory: size, age, sources, and the runs that use them."""
    from dist_lm.storage.run_directory import WorkDirectory
    from dist_lm.verbs.data_list import print_corpora

    print_corpora(WorkDirectory(work), OutputConsole(), unused=unused)


@data.command("attach")
def data_attach(
    url: Annotated[str, typer.Argument(help="A corpus folder behind http, s3 or gs.", metavar="URL")],
    name: Annotated[str, typer.Argument(help="The folder to make in WORK/corpora.")],
    cache: Annotated[Path, typer.Option(help="A folder on a local disk of each node, for pieces of tars.")],
    cache_gib: Annotated[float, typer.Option(help="Most GiB in that folder.")] = 100.0,
    work: Annotated[Path, typer.Option(help="The work directory.")] = Path("work"),
) -> None:
    """Use a remote corpus of texts or conversations where it is: training reads its tars through a cache."""
    require_folder_name("NAME", name)
    from dist_lm.data.attach import attach, tokenizer_note
    from dist_lm.storage.run_directory import WorkDirectory

    require(abs(cache_gib) < 1e9, "--cache-gib", cache_gib, "a number of GiB")  # nan is none
    manifest = attach(url, WorkDirectory(work).corpus(name), cache, int(cache_gib * 2**30))
    tokens = manifest.splits["train"].counts.tokens
    say(f"attached {name}: {tokens:,} training tokens; corpus.folders.CORPUS={name} trains on it as corpus CORPUS")
    say(tokenizer_note(manifest, WorkDirectory(work)))
    tar_bytes = sum(shard.size for split in manifest.splits.values() for shard in split.shards)
    if tar_bytes > cache_gib * 2**30:
        say(
            f"the cache holds {cache_gib:g} GiB of {gib(tar_bytes)}: train with stage.order=windows, or give a larger "
            "--cache-gib; other orders fetch a piece of 4 MiB for a few documents"
        )


@data.command("step")
def data_step(
    run: Annotated[Path, typer.Argument(help="A run directory, such as work/runs/code/default.")],
    step: Annotated[int, typer.Argument(help="A step, from 1, as in metrics and in the names of checkpoints.")],
    text: Annotated[bool, typer.Option("--text", help="Print the beginning of each part of a document.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each part, a line each.")] = False,
) -> None:
    """Print the documents that a training step was made of, with their sources and licences."""
    from dist_lm.storage.run_directory import RunDirectory
    from dist_lm.verbs.data_step import print_step

    print_step(RunDirectory(run), step, OutputConsole(), as_json=json, with_text=text)


@data.command("where")
def data_where(
    run: Annotated[Path, typer.Argument(help="A run directory, such as work/runs/code/default.")],
    text: Annotated[str, typer.Argument(help="The text to look for; with --file, the name of a file that holds it.")],
    file: Annotated[bool, typer.Option("--file", help="TEXT is the name of a file.")] = False,
    most: Annotated[int, typer.Option(help="Most places of a corpus.", min=1)] = 100,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each place, a line each.")] = False,
) -> None:
    """Print the training documents of a run and its ancestors that hold a text, and the steps that read it."""
    from dist_lm.storage.run_directory import RunDirectory
    from dist_lm.verbs.data_where import print_places

    if file:
        try:
            text = Path(text).read_text()
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{text}: cannot be read as text ({error})") from error
    print_places(RunDirectory(run), text, most, OutputConsole(), as_json=json)


@data.command("without")
def data_without(
    run: Annotated[Path, typer.Argument(help="A run directory, such as work/runs/code/default.")],
    documents: Annotated[
        Path, typer.Option(help="A file of documents, CORPUS:NUMBER or a line of `data where --json` each.")
    ],
    near_duplicates: Annotated[
        bool, typer.Option("--near-duplicates", help="Leave out documents that nearly equal one of these, too.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Train a run again without learning from some documents, from the last checkpoint before their first use.

    Ancestors that have read them are trained again first. Prints the cost, and asks. Old runs stay as they are.
    """
    from dist_lm.storage.run_directory import RunDirectory
    from dist_lm.verbs.data_without import train_without

    if code := train_without(RunDirectory(run), documents, with_near_duplicates=near_duplicates, is_sure=yes):
        raise typer.Exit(code)


@data.command("new")
def data_new(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders, globs or URLs.", metavar="PATH...")],
    out: Annotated[Path, typer.Option("--out", help="The file to write: DIR/corpus/NAME.yaml.")],
    sample: Annotated[int, typer.Option(help="MiB of text that are read of each corpus.", min=1)] = 256,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    question: Annotated[str, typer.Option(help="The column of questions, with --answer.")] = "",
    answer: Annotated[str, typer.Option(help="The column of answers, with --question.")] = "",
    prompt_column: Annotated[str, typer.Option(help="Preferences: the column of prompts.")] = "",
    chosen_column: Annotated[str, typer.Option(help="Preferences: the column of better answers.")] = "",
    rejected_column: Annotated[str, typer.Option(help="Preferences: the column of worse answers.")] = "",
) -> None:
    """Look at data and write a corpus file for it: readers, columns, languages, licences, and what would be dropped.

    The first command of the file is tried in a temporary folder: its plan, and all corpora of texts and conversations
    on 200 rows.
    """
    # A mistake in the options shows before the imports, which take seconds.
    outputs.new_file("--out", out, force=force)
    from dist_lm.data.new import new_corpus
    from dist_lm.data.propose import PairColumns
    from dist_lm.prepare.conf_folders import choices
    from dist_lm.verbs.data_trial import try_all_corpora

    new_corpus(
        inputs,
        out,
        OutputConsole(),
        sample_bytes=sample << 20,
        force=force,
        reserved_names=choices("corpus"),
        trial=try_all_corpora,
        question=question,
        answer=answer,
        pair=PairColumns(prompt_column, chosen_column, rejected_column),
    )


@recipe.command("new")
def recipe_new(
    model: Annotated[str, typer.Argument(help="hf:FOLDER, hf:ID of a model on the hub, or a run.")],
    data: Annotated[list[str], typer.Option("--data", help="Conversations: files, folders, globs, URLs; repeatable.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write: DIR/experiment/NAME.yaml.")],
    preferences: Annotated[
        list[str] | None, typer.Option(help="Preferences: stage preference follows; may be repeated.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts: stage rlhf follows, with --reward.")] = None,
    reward: Annotated[str, typer.Option(help="The reward of --prompts: module:function.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the files if they exist.")] = False,
    question: Annotated[str, typer.Option(help="The column of questions, with --answer.")] = "",
    answer: Annotated[str, typer.Option(help="The column of answers, with --question.")] = "",
    prompt_column: Annotated[str, typer.Option(help="Preferences: the column of prompts.")] = "",
    chosen_column: Annotated[str, typer.Option(help="Preferences: the column of better answers.")] = "",
    rejected_column: Annotated[str, typer.Option(help="Preferences: the column of worse answers.")] = "",
) -> None:
    """Look at a model, conversations and this machine, and write an experiment that fine-tunes (docs/finetune.md)."""
    outputs.new_file("--out", out, force=force)
    from dist_lm.data.propose import PairColumns
    from dist_lm.verbs.recipe import new_recipe

    console = OutputConsole()
    new_recipe(
        model,
        data,
        out,
        console,
        preferences=preferences or [],
        prompts=prompts,
        reward=reward,
        force=force,
        question=question,
        answer=answer,
        pair=PairColumns(prompt_column, chosen_column, rejected_column),
    )


@app.command("metrics")
def metrics(
    stage: Annotated[str | None, typer.Option(help="Only the metrics of this stage.")] = None,
) -> None:
    """Print every metric: name, unit, better direction, stages, meaning. docs/metrics.md is this output."""
    from dist_lm.tracking.metrics_page import page

    say(page(stage).removesuffix("\n"))


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
    outputs.folder_to_write("--output", output)
    from dist_lm.gpu_check.run import check_gpus

    if not check_gpus(only or [], gpus, output, table, rehearse=rehearse, say=say):
        raise typer.Exit(1)


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
    from dist_lm.stages.exporting.folder import refuse_files_of_others
    from dist_lm.stages.exporting.stage import check_repository, push_folder

    refuse_files_of_others(folder)
    outputs.folder_to_write("FOLDER", folder)
    if push:
        check_repository("--push", push)
    from dist_lm.stages.exporting.files import export

    say(f"{folder}: {export(path, folder, dtype, tokenizer, gguf, merge, base)}")
    if push:
        push_folder(folder, push)
        say(f"{folder}: uploaded to {push}")


@app.command("import")
def import_model(
    source: Annotated[
        str,
        typer.Argument(help="A folder that transformers or peft saved, a GGUF file, or the id of a model on the hub."),
    ],
    name: Annotated[str, typer.Argument(help="The run to write: WORK_DIR/runs/import/NAME.")],
    work_dir: Annotated[Path, typer.Option(help="The work_dir of the launches that start from it.")] = Path("work"),
    base: Annotated[
        str, typer.Option(help="Base of adapters: a folder, hub id, or run. Default: what the adapters name.")
    ] = "",
) -> None:
    """Write a model of transformers or llama.cpp as a run that stages start from (docs/in_and_out.md)."""
    from dist_lm.storage.run_directory import WorkDirectory

    work = WorkDirectory(work_dir)
    outputs.new_folder("NAME", work.run("import", name).path)
    from dist_lm.stages.importing.snapshot import import_model

    run = import_model(source, name, work, base, say=say).path
    say(f"{run}: train with --config-dir {run}/conf model={name} tokenizer={run}/tokenizer stage.init_from={run}")


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
    outputs.file_to_write("--output", output)
    from dist_lm.report.page import write_report
    from dist_lm.tracking.readable import gib

    path, size = write_report(runs, output, run_id)
    say(f"{path} ({gib(size)})")


@cluster.command("status")
def cluster_status(
    work_dir: Annotated[Path, typer.Argument(help="The work_dir of a launch.")],
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="run_id of the command. Default: the newest command.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Print stages, step, throughput, nodes, ranks, restarts and last error of a running or finished command."""
    from dist_lm.verbs.cluster_status import as_json, read_status

    status = read_status(work_dir, run_id)
    if json:
        print(as_json(status))
        return
    from dist_lm.verbs.cluster_status import print_status

    print_status(status, OutputConsole())


@tools.command("bfcl")
def tools_bfcl(
    path: CheckpointPath,
    limit: Annotated[int, typer.Option(help="Most questions of a category; 0: all.")] = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write one JSON object for each question to this file.")
    ] = None,
    tokenizer: TokenizerPath = None,
    device: DeviceName = "auto",
    constrain_calls: Annotated[
        bool, typer.Option("--constrain-calls", help="Draw only calls that fit the schema of their function.")
    ] = False,
) -> None:
    """Score a model on the single-turn questions of the Berkeley Function Calling Leaderboard (package bfcl-eval)."""
    outputs.file_to_write("--json", json)
    from dist_lm.evaluation.bfcl import evaluate

    evaluate(path, tokenizer, limit, json, device, constrain_calls)


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

    push(boards(board), entity, project, os.environ, say)


@dashboard.command("show")
def dashboard_show(
    board: BoardName = None,
    offline: Annotated[
        Path | None, typer.Option("--offline", help="A run (work/runs/STAGE/RUN_ID) whose curves to show.")
    ] = None,
) -> None:
    """Print the panels of the views as a table, or with --offline show the curves of a run in the terminal."""
    from dist_lm.storage.run_directory import RunDirectory
    from dist_lm.tracking.dashboard import boards
    from dist_lm.tracking.dashboard_show import open_in_leet, print_boards

    if offline is not None:
        require(board is None, "board", board, "no name of a view beside --offline, which shows all curves of a run")
        open_in_leet(RunDirectory(offline))
    print_boards(boards(board), Console())


@profile.command("summarize")
def profile_summarize(
    run: Annotated[Path, typer.Argument(help="A run (work/runs/STAGE/RUN_ID) with profile.steps.")],
) -> None:
    """Print where a step went: computation, messages hidden and exposed, idle time, host waits, operators."""
    from dist_lm.storage.run_directory import RunDirectory
    from dist_lm.training.profile_summary import summarize

    summarize(RunDirectory(run), Console())


def main() -> None:
    """Run a verb. A user error prints one line to standard error; the exit code is 2."""
    run_program(app, lambda text: Console().error(text))


if __name__ == "__main__":
    main()
