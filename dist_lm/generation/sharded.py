"""A model on several devices of one node: rank 0 leads inside the engine's process, the other ranks follow.

`ShardedDecoder` sends every command to the followers and then executes it too, so all ranks meet in the collectives of
`shard.py`. Only rank 0 has whole logits, and it alone chooses tokens. `Follower` executes the same commands in order,
so ranks cannot disagree about what is computed. Its process, started by `followers.py`, is `python -m
dist_lm.generation.sharded SOCKET RANK PARENT`; it ends when its socket closes, even inside a collective that never
completes.
"""

import json
import os
import select
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ConfigError
from dist_lm.generation.decoder import Decoder, check_weights
from dist_lm.generation.followers import Followers
from dist_lm.generation.paged_cache import Piece, Plan
from dist_lm.generation.shard import LEADER, check_tp, cut, part_shapes, share_of
from dist_lm.parallel.mesh import join_ranks, leave_ranks
from dist_lm.storage.process import die_with_parent

TIMEOUT_S = 120.0  # for ranks to meet, and for a living rank to join a collective


class ShardedDecoder:
    """The methods of `Decoder`, on all ranks. The thread that creates it has to live as long as it is used."""

    def __init__(
        self,
        config: ModelConfig,
        n_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        tp: int,
    ) -> None:
        """Start the followers, each with as many threads as this process, and connect to them.

        Raises:
            ConfigError: the model cannot be cut into `tp` parts, there are fewer GPUs, or this is not Linux.
            RankLostError: a follower did not start.
            RuntimeError: this process already is a rank of a process group.
        """
        if sys.platform != "linux":
            raise ConfigError(f"tp={tp}: expected 1 on {sys.platform}; several devices need Linux")
        gpu = device.type == "cuda"
        check_tp(config, tp, torch.cuda.device_count() if gpu else None)
        if dist.is_initialized():
            raise RuntimeError(
                "this process is a rank already: create a model on several devices in a process of its own"
            )
        device = torch.device("cuda", 0) if gpu else device
        place = tempfile.TemporaryDirectory(prefix="dist_lm_ranks_")  # readable by its owner only
        store = str(Path(place.name) / "store")
        setup = {
            "model": asdict(config),
            "tp": tp,
            "store": store,
            "n_pages": n_pages,
            "page_size": page_size,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "timeout_s": TIMEOUT_S,
        }
        self._config, self._dtype, self._device = config, dtype, device
        self._shares = [share_of(config, tp, rank) for rank in range(tp)]
        self._tickets = count()
        self._followers = Followers(tp, setup, on_loss=lambda: _unblock(device))
        self._end = weakref.finalize(self, _end, self._followers, device, place)
        try:
            with self._in_step():
                self._axis = join_ranks(device, dist.FileStore(store, tp), LEADER, tp, TIMEOUT_S)
            if not gpu:  # NCCL keeps reading the file
                place.cleanup()
            self._decoder = Decoder(config, n_pages, page_size, dtype, device, self._shares[LEADER], self._axis)
        except BaseException:
            self.close()
            raise

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Decoder`. Parameters are sent one by one, so no device ever holds all of them."""
        check_weights(self._config, {name: tuple(value.shape) for name, value in weights.items()})

        def hand_out(name: str) -> torch.Tensor:
            whole = weights[name].detach().to(self._device, self._dtype)
            for rank, share in enumerate(self._shares[1:], 1):
                dist.send(cut(name, whole, share).contiguous(), group=self._axis.group, group_dst=rank)
            return cut(name, whole, self._shares[LEADER]).contiguous()

        with self._in_step("load"):
            self._decoder.build(hand_out)

    def prefill(self, pieces: Sequence[Piece]) -> torch.Tensor:
        told = [(list(piece.tokens), piece.start, list(piece.pages)) for piece in pieces]
        with self._in_step("prefill", told):
            return self._decoder.prefill(pieces)

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> Plan:
        with self._in_step("plan", [list(own) for own in pages], list(positions)):
            return SharedPlan(self._decoder.plan(pages, positions), lambda: self._in_step("advance"))

    def decode(self, token_B: torch.Tensor, plan: Plan) -> torch.Tensor:
        assert isinstance(plan, SharedPlan)
        with self._in_step("decode", token_B.tolist()):
            return self._decoder.decode(token_B, plan.own)

    def copy_page(self, source: int, target: int) -> None:
        with self._in_step("copy_page", source, target):
            self._decoder.copy_page(source, target)

    def clear(self, pages: Sequence[int]) -> None:
        with self._in_step("clear", list(pages)):
            self._decoder.clear(pages)

    def save(self, pages: Sequence[int]) -> "Saved":
        """See `Decoder`. Each rank keeps its own part."""
        ticket = next(self._tickets)
        with self._in_step("save", ticket, list(pages)):
            return Saved(ticket, self._decoder.save(pages))

    def restore(self, pages: Sequence[int], content: "Saved") -> None:
        with self._in_step("restore", content.ticket, list(pages)):
            self._decoder.restore(pages, content.own)

    def forget(self, content: "Saved") -> None:
        """Tell the followers to drop content that `save` returned."""
        with self._in_step("forget", content.ticket):
            pass

    def check(self) -> None:
        """Raise `RankLostError` if a follower has ended, so that the last results may be wrong."""
        self._followers.check()

    def close(self) -> None:
        """End the followers."""
        self._end()

    @contextmanager
    def _in_step(self, *command: object) -> Iterator[None]:
        """Send a command to the followers before this rank executes it. After an exception in between, ranks are at
        different places, so the model is abandoned."""
        self._followers.check()
        try:
            if command:
                self._followers.tell(command)
            yield
        except (RuntimeError, OSError) as error:
            self._followers.explain(error)
            self._followers.abandon(f"the model cannot be used any more: one of its steps failed ({error})")
            raise
        except BaseException as error:
            self._followers.abandon(
                f"the model cannot be used any more: one of its steps was interrupted ({type(error).__name__})"
            )
            raise


@dataclass(frozen=True)
class Saved:
    """Saved content of pages: this rank's, and the number under which followers keep theirs."""

    ticket: int
    own: Any


class SharedPlan:
    """A `Plan` that advances on all ranks."""

    def __init__(self, own: Plan, in_step: Callable[[], AbstractContextManager[None]]) -> None:
        self.own, self._in_step = own, in_step
        self.position_B, self.written_B = own.position_B, own.written_B

    def advance(self) -> None:
        with self._in_step():
            self.own.advance()


def _unblock(device: torch.device) -> None:
    """End a collective that this process waits in. Only NCCL needs it: gloo notices a lost peer itself."""
    if device.type == "cuda":
        leave_ranks(device)


def _end(followers: Followers, device: torch.device, place: tempfile.TemporaryDirectory[str]) -> None:
    followers.end()
    leave_ranks(device)
    place.cleanup()


class Follower:
    """A rank other than 0. Every method in `COMMANDS` executes one command."""

    def __init__(self, setup: dict[str, Any], rank: int) -> None:
        """Join the other ranks."""
        config, tp, dtype = ModelConfig(**setup["model"]), setup["tp"], getattr(torch, setup["dtype"])
        torch.set_num_threads(setup["threads"])
        self._device = torch.device(setup["device"], rank) if setup["device"] == "cuda" else torch.device("cpu")
        share = share_of(config, tp, rank)
        self._shapes, self._dtype = part_shapes(config, share), dtype
        self._axis = join_ranks(self._device, dist.FileStore(setup["store"], tp), rank, tp, setup["timeout_s"])
        sizes = setup["n_pages"], setup["page_size"]
        self._decoder = Decoder(config, *sizes, dtype, self._device, share, self._axis)
        self._plan: Plan | None = None
        self._saved: dict[int, Any] = {}

    def load(self) -> None:
        """Receive this rank's part of every parameter, in the order in which `Decoder.build` asks for them."""

        def receive(name: str) -> torch.Tensor:
            part = torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)
            dist.recv(part, group=self._axis.group, group_src=LEADER)
            return part

        self._decoder.build(receive)

    def prefill(self, pieces: list[tuple[list[int], int, list[int]]]) -> None:
        self._decoder.prefill([Piece(*piece) for piece in pieces])

    def plan(self, pages: list[list[int]], positions: list[int]) -> None:
        """Set the plan of all decode steps until the next plan."""
        self._plan = self._decoder.plan(pages, positions)

    def advance(self) -> None:
        assert self._plan
        self._plan.advance()

    def decode(self, tokens: list[int]) -> None:
        assert self._plan
        self._decoder.decode(torch.tensor(tokens, device=self._device), self._plan)

    def copy_page(self, source: int, target: int) -> None:
        self._decoder.copy_page(source, target)

    def clear(self, pages: list[int]) -> None:
        self._decoder.clear(pages)

    def save(self, ticket: int, pages: list[int]) -> None:
        self._saved[ticket] = self._decoder.save(pages)

    def restore(self, ticket: int, pages: list[int]) -> None:
        self._decoder.restore(pages, self._saved.pop(ticket))

    def forget(self, ticket: int) -> None:
        del self._saved[ticket]


COMMANDS = ("load", "prefill", "plan", "advance", "decode", "copy_page", "clear", "save", "restore", "forget")


def main() -> None:
    """Run one follower until its socket closes."""
    channel, rank, parent = map(int, sys.argv[1:])
    die_with_parent(parent)
    connection = Connection(channel)
    threading.Thread(target=_exit_at_hang_up, args=[connection], daemon=True).start()
    setup = json.loads(connection.recv_bytes())
    connection.send_bytes(b"ready")
    try:
        _serve(connection, setup, rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: rank 0 must not wait in a collective while this process cleans up


def _exit_at_hang_up(connection: Connection) -> None:
    """End this process as soon as the other end of its socket closes, whatever it is doing."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP if hasattr(select, "POLLRDHUP") else select.POLLHUP)
    poll.poll()
    os._exit(0)


@torch.inference_mode()
def _serve(connection: Connection, setup: dict[str, Any], rank: int) -> None:
    follower = Follower(setup, rank)
    while True:
        command, *arguments = json.loads(connection.recv_bytes())
        assert command in COMMANDS, command
        getattr(follower, command)(*arguments)


if __name__ == "__main__":
    main()
