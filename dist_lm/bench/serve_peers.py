"""Servers that `bench serve` compares: ours, llama.cpp's and that of transformers, each in a process of its own.

`python -m dist_lm.bench.serve_peers PARENT PORT NAME MODEL` becomes one of them, and ends with its parent. All listen
on loopback, compute in fp32 on one thread of a CPU, and take OpenAI's completions.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dist_lm.storage.process import die_with_parent

SLOTS = 32  # requests that a server computes together
HOST = "127.0.0.1"
NO_ID = 1 << 30  # no token has it


@dataclass(frozen=True)
class Server:
    """One of the servers."""

    package: str  # the one that it needs
    run: Callable[[int, str], None]  # (port, model) -> never returns
    model_of: Callable[[Path], str]  # the model in a folder of an export, as `run` takes it
    fields: Callable[[Mapping[str, Any], int], dict[str, Any]]  # (sampling, end-of-text) -> fields of a request


def _run_ours(port: int, model: str) -> None:
    checkpoint, _, tokenizer = model.partition("\n")
    command = [sys.executable, "-m", "dist_lm", "serve", checkpoint, "--port", str(port), "--device", "cpu"]
    command += ["--name", "bench", "--tokenizer", tokenizer] if tokenizer else ["--name", "bench"]
    # In place of this process, so the server itself ends with its parent.
    os.execv(sys.executable, command)  # noqa: S606 - no shell is wanted


def _run_llama(port: int, model: str) -> None:
    """Serves the GGUF file `model` by llama.cpp on `port`, with SLOTS slots of 1024 tokens and one thread; returns
    after a signal.
    """
    xllamacpp = import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = SLOTS
    # llama.cpp divides this context among its slots.
    params.n_ctx = SLOTS * 1024
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.hostnames = [HOST]
    params.port = port
    server = xllamacpp.Server(params)
    signal.pause()
    del server


def _run_transformers(port: int, model: str) -> None:
    where = ["--host", HOST, "--port", str(port)]
    how = ["--device", "cpu", "--dtype", "float32", "--log-level", "error"]
    os.execvp("transformers", ["transformers", "serve", model, *where, *how])  # noqa: S606 - no shell is wanted


def _ours(sampling: Mapping[str, Any], eot: int) -> dict[str, Any]:
    # No server may end an answer before its limit: all compute the same number of tokens.
    return {**sampling, "logit_bias": {str(eot): -100}, "stream_options": {"include_usage": True}}


def _of_llama(sampling: Mapping[str, Any], eot: int) -> dict[str, Any]:
    return {**sampling, "ignore_eos": True, "stream_options": {"include_usage": True}}


def _of_transformers(sampling: Mapping[str, Any], eot: int) -> dict[str, Any]:
    config = {key: sampling[key] for key in ("temperature", "top_k", "top_p")}
    # Without an end-of-text of the request, that of the model counts.
    config |= {"do_sample": True, "pad_token_id": eot, "eos_token_id": NO_ID}
    return {"seed": sampling["seed"], "max_tokens": sampling["max_tokens"], "generation_config": json.dumps(config)}


OURS, TRANSFORMERS = "dist_lm", "transformers serve"
SERVERS: dict[str, Server] = {
    OURS: Server("fastapi", _run_ours, lambda folder: str(folder), _ours),
    "llama.cpp": Server("xllamacpp", _run_llama, lambda folder: str(folder / "model-F32.gguf"), _of_llama),
    TRANSFORMERS: Server("transformers", _run_transformers, lambda folder: str(folder), _of_transformers),
}


def main() -> None:
    """Becomes the server that the command line names.

    Raises:
        OSError: the kernel refuses to tie this process to its parent.
    """
    parent, port, name, model = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    die_with_parent(parent)
    SERVERS[name].run(port, model)


if __name__ == "__main__":
    main()
