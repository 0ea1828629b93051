"""Measures servers with several clients at a time: new tokens per second, and the time to the first token.

Every client streams one answer of stage.seq_len tokens to a prompt of about 64 tokens; a wave is over when all have
their answers. The model is small and untrained unless stage.init_from names a checkpoint. All servers have its weights
in fp32, and one thread of a CPU. The ceiling is our engine with the same requests in one process, without a server.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import httpx
import torch

from dist_lm.bench.case import Case, Comparison, GroupSize, configurations, why_absent
from dist_lm.bench.models import initial_model
from dist_lm.bench.rank import Trial
from dist_lm.bench.serve_peers import HOST, OURS, SERVERS, SLOTS, TRANSFORMERS, Server
from dist_lm.config.corpus import TokenizerConfig
from dist_lm.config.root import Config
from dist_lm.errors import UserError
from dist_lm.generation.engine import Engine
from dist_lm.generation.load import LoadedModel, load_model
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.generation.session import build_engine
from dist_lm.parallel.mesh import World
from dist_lm.stages.exporting.files import export
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tokenizer.train import train_tokenizer
from dist_lm.training import checkpoint, checkpoint_saver
from dist_lm.training.state import TrainState

CEILING = "engine alone"
CLIENTS = (1, 8, 32)
FIRST_MS = "first token ms"
WAVES = 3  # the time to the first token is their median
ROUNDS = 5
PROMPT_WORDS, WORD_LETTERS = 24, 5  # about 64 tokens
START_S = 300.0  # for a server to answer
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 0.95}
SHAPE = (
    *("model=llama_1b", "model.d_model=256", "model.n_layers=6", "model.n_heads=4", "model.n_kv_heads=2"),
    *("model.d_ff=768", "model.vocab_size=4096", "model.max_seq_len=1024"),
    *("model.rope_scaling=none", "model.rope_factor=1"),
    *("device=cpu", "stage.seq_len=64"),
)


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns a case for 1, 8 and 32 clients; `quick`: for 8 clients alone. Overrides choose another model or
    checkpoint (stage.init_from), other sizes, and with stage.global_batch the number of clients.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    names_clients = any(text.startswith("stage.global_batch=") for text in overrides)
    numbers = CLIENTS[1:2] if quick else CLIENTS
    shapes = [(*SHAPE, f"stage.global_batch={number}", *overrides) for number in numbers]
    return [_case(config) for config in configurations(shapes[:1] if names_clients else shapes, (), quick=False)]


def _case(config: Config) -> Case:
    reasons = {name: why_absent([server.package]) for name, server in SERVERS.items()}
    if reasons[OURS]:
        raise UserError(f"bench serve: {reasons[OURS]}: pip install 'dist_lm[serve]'")
    # It decodes a stream token by token, and ends at bytes that are no text, which an untrained model draws.
    if config.stage.init_from == "none" and not reasons[TRANSFORMERS]:
        reasons[TRANSFORMERS] = "streams trained models alone (stage.init_from)"
    peers = [name for name in SERVERS if name != OURS]
    available = [name for name in peers if not reasons[name]]

    comparisons: list[Comparison] = []
    for peer in peers:
        if reason := reasons[peer]:
            comparisons.append(Comparison(OURS, peer_name=f"{peer}: {reason}", ceiling=CEILING))
            continue
        comparisons += [Comparison(OURS, peer, ceiling=CEILING), Comparison(OURS, peer, fact=FIRST_MS)]
    n_clients = config.stage.global_batch
    return Case(
        name=f"{n_clients} client{'s' * (n_clients != 1)}, {config.stage.seq_len} tokens",
        config=config,
        variants=dict.fromkeys([OURS, *available, CEILING], GroupSize(1)),
        comparisons=comparisons,
        rounds=ROUNDS,
    )


def build(variant: str, config: Config, world: World) -> Trial:
    """Starts a server, or builds the engine of the ceiling, in one process.

    Raises:
        UserError: the server does not start; its last lines say why.
        ConfigError: the peer cannot hold the model.
    """
    folder = tempfile.TemporaryDirectory(prefix="dlm-bench-serve-")
    model, tokenizer = _checkpoint(config, Path(folder.name), world)
    prompts = Prompts(config.stage.global_batch)
    n_new = config.stage.seq_len
    if variant == CEILING:
        loaded = load_model(model, tokenizer)
        return Trial(_Alone(loaded, prompts, n_new).wave, losses=list)

    served = SERVERS[variant]
    if variant == OURS:
        location = f"{model}\n{tokenizer or ''}"
    else:
        export(model, Path(folder.name) / "export", dtype="fp32", tokenizer=tokenizer, gguf="F32")
        location = served.model_of(Path(folder.name) / "export")
    eot = load_model(model, tokenizer).tokenizer.eot_id
    server = RunningServer(variant, served, location, folder, eot)
    _wave(server, prompts, n_new)  # the first requests of a server may be slow
    first_tokens = [seconds for _ in range(WAVES) for seconds in _wave(server, prompts, n_new)]

    def step() -> float:
        _wave(server, prompts, n_new)
        return 0.0

    return Trial(step, facts=lambda: {FIRST_MS: 1000 * statistics.median(first_tokens)}, losses=list)


@dataclass
class Prompts:
    """Prompts of a wave, other ones each time: no server may have read them before."""

    n: int
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(7))

    def next(self) -> list[str]:
        """Returns `n` prompts of words without meaning."""
        letters = torch.randint(26, (self.n, PROMPT_WORDS, WORD_LETTERS), generator=self._generator).tolist()
        return [" ".join("".join(ascii_lowercase[letter] for letter in word) for word in prompt) for prompt in letters]


class RunningServer:
    """A server in a process of its own, which ends when this object is dropped."""

    def __init__(
        self, name: str, server: Server, model: str, folder: tempfile.TemporaryDirectory[str], eot: int
    ) -> None:
        """Starts it, and waits until it answers.

        Args:
            model: as `server.run` takes it.
            folder: holds the model, and is removed with this object.

        Raises:
            UserError: it ends, or does not answer within `START_S`.
        """
        self.name, self.server, self.eot = name, server, eot
        self.model = "bench" if name == OURS else model
        self._folder = folder
        with socket.create_server((HOST, 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"http://{HOST}:{port}"
        log = Path(folder.name) / "server.log"
        with log.open("w") as output:
            command = [sys.executable, "-m", "dist_lm.bench.serve_peers", str(os.getpid()), str(port), name, model]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        weakref.finalize(self, _end, process)

        deadline = time.monotonic() + START_S
        while not self._answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"{name}: does not start: {' '.join(log.read_text()[-600:].split())}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def first_token_s(self, prompt: str, n_new: int, seed: int) -> float:
        """Streams one answer of `n_new` tokens; returns the seconds to its first text.

        Raises:
            UserError: the server refuses, or the answer has another length.
        """
        fields = self.server.fields({**SAMPLING, "seed": seed, "max_tokens": n_new}, self.eot)
        body = {"model": self.model, "prompt": prompt, "stream": True, **fields}
        began = time.perf_counter()
        first: float | None = None
        usage: dict[str, Any] = {}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=START_S) as response:
            if response.status_code != 200:
                raise UserError(f"{self.name}: {response.read().decode()[:300]}")
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise UserError(f"{self.name}: {str(event['error'])[:300]}")
                if first is None and any(choice.get("text") for choice in event.get("choices", ())):
                    first = time.perf_counter() - began
                usage = event.get("usage") or usage

        # An answer that was cut short would count as speed.
        if usage.get("completion_tokens") != n_new or first is None:
            raise UserError(f"{self.name}: {usage.get('completion_tokens')} tokens; expected {n_new}")
        return first


def _wave(server: RunningServer, prompts: Prompts, n_new: int) -> list[float]:
    """Lets every client stream an answer; returns the seconds to their first texts."""
    texts = prompts.next()
    with ThreadPoolExecutor(len(texts)) as clients:
        return list(clients.map(lambda seed: server.first_token_s(texts[seed], n_new, seed), range(len(texts))))


class _Alone:
    """Our engine with the same requests, without a server."""

    def __init__(self, loaded: LoadedModel, prompts: Prompts, n_new: int) -> None:
        self._tokenizer = loaded.tokenizer
        self._engine: Engine = build_engine(loaded, torch.device("cpu"), SLOTS, cache_tokens=SLOTS * 1024)
        self._prompts = prompts
        self._n_new = n_new

    def wave(self) -> float:
        """Computes the answers of a wave."""
        params = SamplingParams(max_new_tokens=self._n_new, ignore_eot=True, **SAMPLING)
        for seed, text in enumerate(self._prompts.next()):
            self._engine.submit(Request(str(seed), self._tokenizer.encode_prompt(text), params, seed))
        answers = [answer for answer in self._engine.run() if isinstance(answer, Answer)]
        assert sum(len(answer.tokens) for answer in answers) == self._n_new * self._prompts.n
        return 0.0


def _checkpoint(config: Config, folder: Path, world: World) -> tuple[Path, Path | None]:
    """Returns the checkpoint to serve and its tokenizer (None: that of its run): stage.init_from as it is given, or
    initial values and a tokenizer trained on the sources of this package, both written to `folder`.

    Raises:
        UserError: a vocabulary of this size cannot be learned from these texts.
        CheckpointWriteError: the checkpoint cannot be written.
    """
    if config.stage.init_from != "none":
        return Path(config.stage.init_from), None

    tokenizer = folder / "tokenizer.model"
    package = Path(__file__).parents[1]
    texts = (path.read_text() for path in sorted(package.rglob("*.py")))
    train_tokenizer(texts, tokenizer, TokenizerConfig(vocab_size=config.model.vocab_size))
    tensors = checkpoint.tensors_of(initial_model(config), None, config.model)
    state = TrainState(step=1, tokenizer=Tokenizer.load(tokenizer).sha256)
    checkpoint_saver.write(folder / "checkpoints", tensors, state, config.model, world)
    return folder / "checkpoints", tokenizer


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
