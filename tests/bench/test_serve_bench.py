"""The benchmark of servers: that clients wait for whole answers of the servers that it compares."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from dist_lm.bench import serve
from dist_lm.bench.serve_peers import OURS, SERVERS
from dist_lm.errors import UserError
from dist_lm.parallel.mesh import World

SMALL = ("model.n_layers=1", "model.d_model=64", "model.d_ff=64", "stage.seq_len=4", "stage.global_batch=2")


@pytest.fixture
def world() -> Iterator[World]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.heavy
def test_cases_are_numbers_of_clients_and_absent_peers_are_named(monkeypatch: pytest.MonkeyPatch):
    """Finds a peer that is left out of the table, and a number of clients that overrides do not reach."""
    monkeypatch.setattr(serve, "why_absent", lambda packages: "not here" if "xllamacpp" in packages else None)
    planned = serve.cases((), quick=False)
    assert [case.config.stage.global_batch for case in planned] == [1, 8, 32]
    absent = [comparison.peer_name for comparison in planned[0].comparisons if comparison.peer is None]
    assert absent == ["llama.cpp: not here", "transformers serve: streams trained models alone (stage.init_from)"]
    assert list(planned[0].variants) == [OURS, serve.CEILING]
    (trained,) = serve.cases(["stage.init_from=work/runs/code/small"], quick=True)
    assert list(trained.variants) == [OURS, "transformers serve", serve.CEILING]
    (case,) = serve.cases(["stage.global_batch=3"], quick=False)
    assert case.name.startswith("3 clients")


@pytest.mark.heavy
@pytest.mark.parametrize(
    "variant", [pytest.param(OURS, marks=pytest.mark.bars), *(name for name in SERVERS if name != OURS), serve.CEILING]
)
def test_every_server_answers_with_all_tokens(variant: str, world: World):
    """Finds a server that is asked in a form that it refuses, or whose answers end before their length."""
    (case,) = serve.cases(SMALL, quick=True)
    if variant not in case.variants:
        pytest.skip(f"{variant} is not installed")
    trial = serve.build(variant, case.config, world)
    trial.step()
    if variant != serve.CEILING:
        assert trial.facts()[serve.FIRST_MS] > 0


def test_a_server_that_ends_at_once_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    """Finds a benchmark that waits for a server that is gone."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    folder = SimpleNamespace(name=str(tmp_path))
    with pytest.raises(UserError, match="does not start"):
        serve.RunningServer(OURS, SERVERS[OURS], "nowhere", cast(Any, folder), 0)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ((b'{"choices": [{"text": "a"}], "usage": {"completion_tokens": 3}}',), "3 tokens; expected 4"),
        ((b'{"choices": [{"text": "a"}]}', b'{"error": "out of memory"}'), "out of memory"),
    ],
)
def test_an_answer_that_was_cut_short_is_no_speed(events: tuple[bytes, ...], message: str):
    """Finds answers that count although tokens are missing."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            for event in events:
                self.wfile.write(b"data: " + event + b"\n\n")

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        played = object.__new__(serve.RunningServer)
        played.name, played.server, played.eot, played.model = OURS, SERVERS[OURS], 0, "bench"
        played.url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(UserError, match=message):
            played.first_token_s("a", 4, 0)
        server.shutdown()
