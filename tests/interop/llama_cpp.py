"""llama.cpp's server (package xllamacpp) in a process of its own.

As a program: serve the GGUF file `argv[1]` on a free port of 127.0.0.1 until stdin ends; the key is in LLAMA_KEY.
"""

import json
import os
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.patience import patient


class LlamaServer:
    def __init__(self, address: str, key: str) -> None:
        self._address, self._headers = address, {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}

    def ask(self, path: str, **values: Any) -> dict[str, Any]:
        request = urllib.request.Request(self._address + path, json.dumps(values).encode(), self._headers)
        with urllib.request.urlopen(request, timeout=patient(120)) as answer:
            return json.load(answer)

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """No text becomes a special token."""
        return self.ask("/tokenize", content=text, add_special=add_special, parse_special=False)["tokens"]

    def log_probabilities(self, prompt: list[int], count: int) -> dict[int, float]:
        """Of the `count` likeliest tokens behind `prompt`."""
        answer = self.ask("/completion", prompt=prompt, n_predict=1, n_probs=count, temperature=0, cache_prompt=False)
        (first,) = answer["completion_probabilities"]
        return {token["id"]: token["logprob"] for token in first["top_logprobs"]}


@contextmanager
def llama_server(model: Path) -> Iterator[LlamaServer]:
    key = secrets.token_hex(16)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.interop.llama_cpp", str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"LLAMA_KEY": key},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, process.communicate()[1][-2000:]
        yield LlamaServer(address, key)
    finally:
        process.stdin.close()
        process.stdin = None
        try:
            process.communicate(timeout=patient(120))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def main() -> None:
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = sys.argv[1]
    options.hostnames, options.port, options.api_keys = ["127.0.0.1"], 0, [os.environ["LLAMA_KEY"]]
    options.n_ctx, options.n_parallel, options.verbosity = 256, 1, 1
    options.cpuparams.n_threads = 1
    server = xllamacpp.Server(options)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
