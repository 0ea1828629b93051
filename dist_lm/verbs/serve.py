"""The verb `serve`."""

from pathlib import Path
from typing import Annotated

import typer

from dist_lm.verbs.arguments import DeviceName, TokenizerPath


def serve(
    paths: Annotated[
        list[Path], typer.Argument(help="Checkpoints, or folders of checkpoints or runs (LATEST is used).")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0: a free one.")] = 8000,
    tokenizer: TokenizerPath = None,
    device: DeviceName = "auto",
    tp: Annotated[int, typer.Option("--tp", help="GPUs that share a model too large for one.")] = 1,
    name: Annotated[
        list[str] | None, typer.Option(help="A further name of the model; of several models one for each, in order.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further host name of this server; may be repeated.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of a web page that may call, such as https://chat.example.org.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Load new checkpoints of the runs; later requests get their weights.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge adapters, also where models could share the weights of one base.")
    ] = False,
    actors: Annotated[
        int,
        typer.Option(help="Engines of each model, as actors in a Ray cluster; -1: one for each --tp GPUs. 0: none."),
    ] = 0,
    ray: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the head of a running Ray, for --actors; RAY_AUTH_TOKEN_PATH names its token."),
    ] = None,
    nodes: Annotated[
        int,
        typer.Option(help="Most nodes of --ray with actors, also of nodes that join later; 0: those that are there."),
    ] = 0,
    cache_tokens: Annotated[int, typer.Option(help="Tokens of prompts and answers that are under way together.")] = (
        65536
    ),
    max_tokens: Annotated[int, typer.Option(help="Most new tokens of an answer.")] = 4096,
    max_n: Annotated[int, typer.Option(help="Most answers to a prompt.")] = 16,
    max_requests: Annotated[int, typer.Option(help="Most requests under way; others get status 429.")] = 256,
    queue_seconds: Annotated[float, typer.Option(help="Longest wait for the first step.")] = 60.0,
    stop_seconds: Annotated[float, typer.Option(help="Time for answers under way when the server ends.")] = 10.0,
) -> None:
    """Serve models under OpenAI's API (docs/serve.md). The variable DIST_LM_API_KEY holds the key, if there is one."""
    from dist_lm.server.command import ServeOptions, serve
    from dist_lm.server.served import ServeLimits

    options = ServeOptions(
        host=host,
        port=port,
        device=device,
        tp=tp,
        names=name or (),
        hosts=allow_host or (),
        origins=allow_origin or (),
        cache_tokens=cache_tokens,
        most_requests=max_requests,
        queue_s=queue_seconds,
        stop_s=stop_seconds,
        follow=follow,
        actors=actors,
        ray=ray,
        nodes=nodes,
        merge=merge,
        limits=ServeLimits(max_tokens=max_tokens, n=max_n),
    )
    serve(paths, tokenizer, options)
