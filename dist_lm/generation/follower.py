"""`python -m dist_lm.generation.follower SOCKET RANK PARENT`: one rank of a model that generates, led by another.

It is started by `followers.py` and does what it is told, in order, so that ranks cannot disagree about who computes
what; tokens are chosen by rank 0 alone. It ends when its socket closes, also from within a message that never comes.
"""

import json
import os
import select
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from dist_lm.config.model import ModelConfig
from dist_lm.generation.cache_choice import build_cache
from dist_lm.generation.decoder import Decoder
from dist_lm.generation.paged_cache import Piece, Plan
from dist_lm.generation.parallel_region import LEADER
from dist_lm.generation.shard import part_shapes, share_of
from dist_lm.parallel.mesh import join_ranks
from dist_lm.storage.process import die_with_parent


class Follower:
    """What there is of a rank between two commands, each of which is a method."""

    def __init__(self, setup: dict[str, Any], rank: int) -> None:
        """Join the other ranks."""
        config = ModelConfig(**setup["model"])
        tp, page_tokens, dtype = setup["tp"], setup["page_tokens"], getattr(torch, setup["dtype"])
        torch.set_num_threads(setup["threads"])
        self._device = torch.device(setup["device"], rank) if setup["device"] == "cuda" else torch.device("cpu")
        share = share_of(config, tp, rank)
        self._shapes, self._dtype = part_shapes(config, share), dtype
        self._group = join_ranks(self._device, dist.FileStore(setup["store"], tp), rank, tp, setup["timeout_s"])
        cache = build_cache(share, setup["n_pages"], page_tokens, dtype, self._device)
        self._decoder = Decoder(config, cache, page_tokens, dtype, self._device, share, self._group)
        self._plan: Plan | None = None
        self._saved: dict[int, Any] = {}

    def load(self) -> None:
        """Its parts of all parameters follow, in the order in which decoders look them up."""

        def receive(name: str) -> torch.Tensor:
            part = torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)
            dist.recv(part, group=self._group.group, group_src=LEADER)
            return part

        self._decoder.build(receive)

    def prefill(self, pieces: list[tuple[list[int], int, list[int]]]) -> None:
        """See `Runner`."""
        self._decoder.prefill([Piece(*piece) for piece in pieces])

    def plan(self, pages: list[list[int]], positions: list[int]) -> None:
        """See `Runner`; the plan of all steps until the next one comes."""
        self._plan = self._decoder.plan(pages, positions)

    def advance(self) -> None:
        """See `Plan`."""
        assert self._plan
        self._plan.advance()

    def decode(self, tokens: list[int]) -> None:
        """See `Runner`."""
        assert self._plan
        self._decoder.decode(torch.tensor(tokens, device=self._device), self._plan)

    def copy_page(self, source: int, target: int) -> None:
        """See `Runner`."""
        self._decoder.copy_page(source, target)

    def clear(self, pages: list[int]) -> None:
        """See `Runner`."""
        self._decoder.clear(pages)

    def save(self, ticket: int, pages: list[int]) -> None:
        """Keep what is in `pages` in host memory, under a number."""
        self._saved[ticket] = self._decoder.save(pages)

    def restore(self, ticket: int, pages: list[int]) -> None:
        """Put back what was kept."""
        self._decoder.restore(pages, self._saved.pop(ticket))

    def forget(self, ticket: int) -> None:
        """Keep it no longer."""
        del self._saved[ticket]


COMMANDS = ("load", "prefill", "plan", "advance", "decode", "copy_page", "clear", "save", "restore", "forget")


def end_at_hang_up(connection: Connection) -> None:
    """End this process once the other end of its socket is closed, whatever it is doing."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP if hasattr(select, "POLLRDHUP") else select.POLLHUP)
    poll.poll()
    os._exit(0)


def main() -> None:
    """Serve until the socket closes."""
    channel, rank, parent = map(int, sys.argv[1:])
    die_with_parent(parent)
    connection = Connection(channel)
    threading.Thread(target=end_at_hang_up, args=[connection], daemon=True).start()
    setup = json.loads(connection.recv_bytes())
    connection.send_bytes(b"ready")
    try:
        _serve(connection, setup, rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: who leads must not wait in a message while this process tidies up


@torch.inference_mode()
def _serve(connection: Connection, setup: dict[str, Any], rank: int) -> None:
    follower = Follower(setup, rank)
    while True:
        command, *arguments = json.loads(connection.recv_bytes())
        assert command in COMMANDS, command
        getattr(follower, command)(*arguments)


if __name__ == "__main__":
    main()
