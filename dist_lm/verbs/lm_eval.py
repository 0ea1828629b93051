"""The verb `lm-eval`."""

from pathlib import Path
from typing import Annotated

import typer

from dist_lm.errors import require
from dist_lm.storage import outputs
from dist_lm.verbs.arguments import CheckpointPath, DeviceName, TokenizerPath


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
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: bfloat16 on a GPU that has it.")] = "auto",
    confirm_run_unsafe_code: Annotated[
        bool, typer.Option("--confirm_run_unsafe_code", help="Refused: generated code runs in the sandbox alone.")
    ] = False,
) -> None:
    """Evaluate a model on tasks of lm-evaluation-harness (docs/lm_eval.md)."""
    outputs.file_to_write("--output", output)
    outputs.file_to_write("--samples", samples)
    from dist_lm.evaluation.harness import WAY_OUT, HarnessOptions, evaluate

    # The option of lm_eval would run generated code without a sandbox.
    require(not confirm_run_unsafe_code, "--confirm_run_unsafe_code", "true", f"no such option here: {WAY_OUT}")
    options = HarnessOptions(
        tasks, num_fewshot, limit, apply_chat_template, system_instruction, include_path, gen_kwargs, seed
    )
    evaluate(path, options, tokenizer, device, dtype, output, samples)
