"""The verbs `checkpoint inspect`, `verify`, `average` and `consolidate`."""

from pathlib import Path
from typing import Annotated

import typer

from dist_lm.errors import ArtefactError
from dist_lm.storage import outputs
from dist_lm.tracking.readable import OutputConsole, say
from dist_lm.verbs.arguments import CheckpointPath, DeviceName

checkpoint = typer.Typer(help="Inspect, verify, average and consolidate checkpoints.", no_args_is_help=True)


@checkpoint.command("inspect")
def checkpoint_inspect(path: CheckpointPath) -> None:
    """Print step, model, tensors by kind, files and pointers. Reads no tensors."""
    from dist_lm.training.checkpoint_inspect import print_checkpoint

    print_checkpoint(path, OutputConsole())


@checkpoint.command("verify")
def checkpoint_verify(path: CheckpointPath) -> None:
    """Read every file and compare it with the manifest. Exit code 2 and one line for each damaged file."""
    from dist_lm.training import checkpoint_files

    # All damage is listed before the command fails, so that one call is enough.
    directory = checkpoint_files.find_checkpoint(path)

    damage = list(checkpoint_files.damage(directory))
    for line in damage:
        say(line)
    if damage:
        raise ArtefactError(f"checkpoint {directory}: damaged files: {len(damage)}")

    say(f"{directory}: {len(checkpoint_files.read_manifest(directory))} files, all intact")


@checkpoint.command("consolidate")
def checkpoint_consolidate(
    path: CheckpointPath,
    output: Annotated[Path, typer.Option(help="The file to write, FILE.safetensors. It must not exist.")],
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Add the optimizer's tensors.")] = False,
) -> None:
    """Write the whole tensors of the model to one safetensors file."""
    outputs.new_file("--output", output, makes_folders=False)
    from dist_lm.training.checkpoint_tensors import consolidate

    count = consolidate(path, output, with_optimizer=optimizer)
    say(f"{output}: {count:,} tensors, {output.stat().st_size:,} bytes")


@checkpoint.command("average")
def checkpoint_average(
    run: Annotated[Path, typer.Argument(help="A run (work/runs/STAGE/RUN_ID).")],
    last: Annotated[int, typer.Option(help="Average the last K checkpoints.", metavar="K")] = 0,
    ema: Annotated[bool, typer.Option("--ema", help="Take the average that stage.ema_decay kept.")] = False,
    evaluate: Annotated[bool, typer.Option(help="Measure it on val, beside the newest checkpoint.")] = True,
    device: DeviceName = "auto",
) -> None:
    """Write averaged weights as a checkpoint, RUN/averages/..., for export, generate and stage.init_from."""
    from dist_lm.stages.averaging import average
    from dist_lm.storage.run_directory import RunDirectory

    average(RunDirectory(run), last, ema, device if evaluate else "", OutputConsole())
