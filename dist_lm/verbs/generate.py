"""The verb `generate`."""

from pathlib import Path
from typing import Annotated

import typer

from dist_lm.verbs.arguments import CheckpointPath, DeviceName, TokenizerPath


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
    opening: Annotated[
        bool,
        typer.Option(
            help="Put the token that opens a document (mostly end-of-text) before the text. --no-opening: the text "
            "alone, as transformers does for tokenizers that add no token."
        ),
    ] = True,
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
    constraint: Annotated[
        str | None,
        typer.Option(
            help='What answers must be: {"json_schema": ...}, {"regex": ...}, {"lark": ...} or {"choice": [...]}, or a '
            "file of it."
        ),
    ] = None,
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
    tool_choice: Annotated[
        str,
        typer.Option(help="With --tools: auto, required (a call first), none, or the name of the function to call."),
    ] = "auto",
    parallel_calls: Annotated[bool, typer.Option(help="With --tools: a turn may have several calls.")] = True,
    tool_seconds: Annotated[float, typer.Option(help="With --tools: time limit of a call.")] = 10.0,
    tool_characters: Annotated[
        int, typer.Option(help="With --tools: longest result of a call; the rest is cut off.")
    ] = 4000,
) -> None:
    """Continue a text: one prompt, or a session at the terminal (docs/generation.md)."""
    from dist_lm.generation.call_grammar import ToolChoice
    from dist_lm.generation.terminal import generate
    from dist_lm.generation.tool_chat import ToolOptions
    from dist_lm.tools.use.toolbox import Limits

    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }

    # Without tools and turns the model continues the text of a prompt.
    options = None
    if tools or chat:
        options = ToolOptions(
            tools, max_rounds, Limits(tool_seconds, tool_characters), ToolChoice(tool_choice, parallel_calls)
        )
    raise typer.Exit(
        generate(
            path, prompt, tokenizer, sampling, stop or [], seed, n, device, tp, options, suffix, opening, constraint
        )
    )
