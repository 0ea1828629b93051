"""The verb `bench`: its options, and the program behind each name."""

from pathlib import Path
from typing import Annotated

import typer

from dist_lm.errors import ConfigError
from dist_lm.storage import outputs
from dist_lm.tracking.readable import OutputConsole

LEARN = ("recipe", "peer", "budget", "seeds", "curves", "points")
SCALING = ("widths", "tokens", "seeds")
OPTIONS = {"learn": LEARN, "scaling": SCALING}  # benchmark -> its options; all others take --quick


def bench(
    context: typer.Context,
    name: Annotated[
        str,
        typer.Argument(
            help="tp, fsdp, checkpointing, compile, generate, serve, adapters, constraints, likelihood, reward, "
            "preference, rlhf, metrics, saving, tracking, data, loader or sandbox (docs/bench.md); learn or scaling "
            "(docs/recipes.md)."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of your own workload, instead of the built-in ones: model=tiny stage.seq_len=256"
        ),
    ] = None,
    config_dir: Annotated[
        list[str] | None, typer.Option("--config-dir", help="A folder of configuration files; may be repeated.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the first workload, with few rounds.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write JSON lines to this file.")] = None,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", help="learn: 'NAME: KEY=VALUE ...'; may be repeated.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="learn: 'neox: KEY=VALUE ...' or 'nanochat: CHECKOUT'; may be repeated."),
    ] = None,
    budget: Annotated[str, typer.Option(help="learn: what each recipe may spend: 2e6tokens, 1e14flops, 60s.")] = "60s",
    seeds: Annotated[int, typer.Option(help="learn, scaling: seeds, each for initial values and order of data.")] = 1,
    curves: Annotated[Path | None, typer.Option(help="learn: a folder for curves.jsonl and curves.svg.")] = None,
    points: Annotated[int, typer.Option(help="learn: measurements of a recipe in training.")] = 10,
    widths: Annotated[str, typer.Option(help="scaling: widths of the models, such as 64,96,128.")] = "",
    tokens: Annotated[str, typer.Option(help="scaling: tokens that each width trains on, such as 1e5,2e5,4e5.")] = "",
) -> None:
    """Measure speed or memory against a peer and a ceiling, in the same rounds on the same machine; with `learn`, what
    recipes learn within one budget; with `scaling`, what a configuration will learn, from runs of narrow models."""
    # `learn` and `scaling` make the folders that they write to.
    outputs.file_to_write("--json", json, makes_folders=name in OPTIONS)
    if curves:
        outputs.folder_to_write("--curves", curves)
    from dist_lm.prepare.conf_folders import with_config_dir

    # An option that the benchmark ignores would let a user believe in a setting that had no effect.
    accepted_options = OPTIONS.get(name, ("quick",))
    for option in ("quick", *LEARN, *SCALING):
        source = context.get_parameter_source(option)
        if option not in accepted_options and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"bench {name} does not use --{option}: expected settings or --json, --{', --'.join(accepted_options)}"
            )

    folders = [f"--config-dir={folder}" for folder in config_dir or []]
    settings = with_config_dir([*folders, *(overrides or [])])

    # Each program is imported when it is chosen: `--help` must not wait for torch.
    if name == "learn":
        from dist_lm.bench.learn import run_learning

        run_learning(
            settings,
            OutputConsole(),
            recipes=recipe or [],
            peers=peer or [],
            budget=budget,
            seeds=seeds,
            json_file=json,
            curves_in=curves,
            points=points,
        )
        return

    if name == "scaling":
        from dist_lm.bench.scaling import run_scaling

        run_scaling(settings, OutputConsole(), widths=widths, tokens=tokens, seeds=seeds, json_file=json)
        return

    from dist_lm.bench.run import run_benchmark

    run_benchmark(name, settings, OutputConsole(), quick=quick, json_file=json)
