"""A model on several devices of one node: rank 0 leads inside the engine's process, ranks 1 to tp - 1 follow.

`ShardedDecoder` sends every command to the followers and then executes it on rank 0, so all ranks meet in the
collectives of `shard.py`. Ranks execute the same commands in the same order, so they compute the same step. Only rank 0
has the logits of the complete vocabulary, and it alone draws tokens.

`followers.py` starts each follower as `python -m dist_lm.generation.sharded SOCKET RANK PARENT`. A follower ends when
its socket closes, even inside a collective that never completes.
"""

import json
import os
import select
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ConfigError
from dist_lm.generation.decoder import Decoder, Weights, looked_up
from dist_lm.generation.followers import Followers
from dist_lm.generation.paged_cache import DecodePlan, Piece
from dist_lm.generation.shard import LEADER, check_tp, cut, part_shapes, share_of
from dist_lm.parallel.mesh import choose_device, join_ranks, leave_ranks
from dist_lm.storage.process import die_with_parent

TIMEOUT_S = 120.0  # for ranks to meet, and for a living rank to join a collective


class ShardedDecoder:
    """Has the methods of `Decoder`, on all ranks. The thread that creates it has to live as long as it is used."""

    def __init__(
        self,
        config: ModelConfig,
        n_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        tp: int,
    ) -> None:
        """Starts the followers, each with as many threads as this process, and connects to them.

        Raises:
            ConfigError: the model cannot be cut into `tp` parts, there are fewer GPUs, or this is not Linux.
            RankLostError: a follower did not start.
            RuntimeError: this process already is a rank of a process group.
        """
        if sys.platform != "linux":
            raise ConfigError(f"tp={tp}: expected 1 on {sys.platform}; several devices need Linux")
        on_gpu = device.type == "cuda"
        check_tp(config, tp, torch.cuda.device_count() if on_gpu else None)
        if dist.is_initialized():
            raise RuntimeError(
                "this process is a rank already: create a model on several devices in a process of its own"
            )
        if on_gpu:
            device = torch.device("cuda", 0)
        self._config = config
        self._dtype = dtype
        self._device = device
        self._shares = [share_of(config, tp, rank) for rank in range(tp)]
        self._tickets = count()

        # The followers read the setup from their sockets and find each other through a file.
        folder = tempfile.TemporaryDirectory(prefix="dist_lm_ranks_")  # readable by its owner only
        store = str(Path(folder.name) / "store")
        setup = {
            "model": asdict(config),
            "tp": tp,
            "store": store,
            "n_pages": n_pages,
            "page_tokens": page_tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "timeout_s": TIMEOUT_S,
        }
        self._followers = Followers(tp, setup, on_loss=lambda: _unblock(device))
        self._end = weakref.finalize(self, _end, self._followers, device, folder)

        try:
            with self._in_step():
                self._axis = join_ranks(device, dist.FileStore(store, tp), LEADER, tp, TIMEOUT_S)
            if not on_gpu:  # NCCL keeps reading the file
                folder.cleanup()
            decoder = Decoder(config, n_pages, page_tokens, dtype, device, self._shares[LEADER], self._axis)
            self._rank = Rank(decoder, device)
        except BaseException:
            self.close()
            raise

    def load(self, weights: Weights) -> None:
        """Does the same as `Decoder.load` on all ranks. Parameters are sent one by one, so no device ever holds all of
        them.

        Raises:
            ArtefactError: a parameter is missing or has another shape. If a stream shows it late, the model is
                abandoned: every later step raises.
            RankLostError: a follower has ended, or an earlier step failed.
        """
        look_up = looked_up(self._config, weights)

        def send_parts(name: str) -> torch.Tensor:
            # Cast before sending: a message of bf16 is half as long.
            parameter = look_up(name).detach().to(self._device, self._dtype)
            for rank, share in enumerate(self._shares[1:], 1):
                dist.send(cut(name, parameter, share).contiguous(), group=self._axis.group, group_dst=rank)
            return cut(name, parameter, self._shares[LEADER]).contiguous()

        with self._in_step("load"):
            self._rank.decoder.build(send_parts)

    def resize(self, n_pages: int) -> None:
        self._execute("resize", n_pages)

    def sleep(self) -> None:
        self._execute("sleep")

    def wake(self) -> None:
        self._execute("wake")

    def prefill(self, pieces: Sequence[Piece]) -> torch.Tensor:
        return self._execute("prefill", _values(pieces))

    def extend(self, pieces: Sequence[Piece], next_tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._execute("extend", _values(pieces), list(next_tokens))

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> DecodePlan:
        """Does the same as `Decoder.plan`; it replaces the previous plan."""
        plan = self._execute("plan", [list(sequence_pages) for sequence_pages in pages], list(positions))
        return SharedDecodePlan(plan.position_B, plan.cell_B, lambda: self._execute("advance"))

    def decode(self, tokens: Sequence[int], plan: DecodePlan) -> torch.Tensor:
        return self._execute("decode", list(tokens))

    def copy_page(self, source: int, target: int, n_tokens: int) -> None:
        self._execute("copy_page", source, target, n_tokens)

    def clear(self, pages: Sequence[int]) -> None:
        self._execute("clear", list(pages))

    def save(self, pages: Sequence[int]) -> int:
        """Does the same as `Decoder.save`. Each rank stores its part under the returned number.

        Raises:
            RankLostError: another process of the model has ended.
        """
        ticket = next(self._tickets)
        self._execute("save", ticket, list(pages))
        return ticket

    def restore(self, pages: Sequence[int], content: int) -> None:
        self._execute("restore", content, list(pages))

    def forget(self, content: int) -> None:
        self._execute("forget", content)

    def check(self) -> None:
        """Raises `RankLostError` if a follower has ended, so that the last logits may be wrong."""
        self._followers.check()

    def close(self) -> None:
        """Ends the followers."""
        self._end()

    def _execute(self, command: str, *arguments: Any) -> Any:
        """Executes a command on all ranks. Returns what it returns on rank 0."""
        with self._in_step(command, *arguments):
            return getattr(self._rank, command)(*arguments)

    @contextmanager
    def _in_step(self, *command: object) -> Iterator[None]:
        """Sends a command to the followers before rank 0 executes it inside the block.

        After an exception in the block, ranks are at different steps: the followers are killed, and every later step
        raises.

        Raises:
            RankLostError: a follower has ended, or an earlier step failed. An error in the block that no death of a
                follower explains within NOTICE_S seconds passes.
        """
        # After a loss, rank 0 would wait in a collective that nobody joins.
        self._followers.check()

        try:
            if command:
                self._followers.tell(command)
            yield
        except (RuntimeError, OSError) as error:
            # A dead follower explains most errors, and its output says more than the error of a collective.
            self._followers.explain(error)
            self._followers.abandon(f"the model cannot be used any more: one of its steps failed ({error})")
            raise
        except BaseException as error:
            self._followers.abandon(
                f"the model cannot be used any more: one of its steps was interrupted ({type(error).__name__})"
            )
            raise


def _values(pieces: Sequence[Piece]) -> list[tuple[list[int], int, list[int]]]:
    """Returns pieces as JSON values."""
    return [(list(piece.tokens), piece.start, list(piece.pages)) for piece in pieces]


@dataclass
class SharedDecodePlan:
    """A `DecodePlan` that advances on all ranks."""

    position_B: torch.Tensor
    cell_B: torch.Tensor
    advance: Callable[[], None]


def _unblock(device: torch.device) -> None:
    """Ends a collective that this process waits in. Only NCCL needs it: gloo notices a lost peer itself."""
    if device.type == "cuda":
        leave_ranks(device)


def _end(followers: Followers, device: torch.device, folder: tempfile.TemporaryDirectory[str]) -> None:
    followers.end()
    leave_ranks(device)
    folder.cleanup()


class Rank:
    """Executes the commands on one rank. Each method in `COMMANDS` executes one; its arguments are JSON values."""

    def __init__(self, decoder: Decoder, device: torch.device) -> None:
        self.decoder = decoder
        self._device = device
        self._plan: DecodePlan | None = None
        self._saved: dict[int, Any] = {}

    def resize(self, n_pages: int) -> None:
        self._plan = None
        self.decoder.resize(n_pages)

    def sleep(self) -> None:
        self._plan = None
        self.decoder.sleep()

    def wake(self) -> None:
        self.decoder.wake()

    def prefill(self, pieces: list[tuple[list[int], int, list[int]]]) -> torch.Tensor:
        return self.decoder.prefill([Piece(*piece) for piece in pieces])

    def extend(
        self, pieces: list[tuple[list[int], int, list[int]]], next_tokens: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.decoder.extend([Piece(*piece) for piece in pieces], next_tokens)

    def plan(self, pages: list[list[int]], positions: list[int]) -> DecodePlan:
        """Sets the plan of all decode steps until the next plan."""
        self._plan = self.decoder.plan(pages, positions)
        return self._plan

    def advance(self) -> None:
        assert self._plan
        self._plan.advance()

    def decode(self, tokens: list[int]) -> torch.Tensor:
        assert self._plan
        return self.decoder.decode(tokens, self._plan)

    def copy_page(self, source: int, target: int, n_tokens: int) -> None:
        self.decoder.copy_page(source, target, n_tokens)

    def clear(self, pages: list[int]) -> None:
        self.decoder.clear(pages)

    def save(self, ticket: int, pages: list[int]) -> None:
        self._saved[ticket] = self.decoder.save(pages)

    def restore(self, ticket: int, pages: list[int]) -> None:
        self.decoder.restore(pages, self._saved.pop(ticket))

    def forget(self, ticket: int) -> None:
        del self._saved[ticket]


class Follower(Rank):
    """Ranks 1 to tp - 1, which receive their weights from rank 0."""

    def __init__(self, setup: dict[str, Any], rank: int) -> None:
        """Joins all ranks of the model.

        Raises:
            ConfigError: the node has no GPU for this rank.
        """
        torch.set_num_threads(setup["threads"])
        config, tp = ModelConfig(**setup["model"]), setup["tp"]
        device = choose_device(setup["device"], rank)
        share = share_of(config, tp, rank)
        self._shapes = part_shapes(config, share)
        self._dtype = getattr(torch, setup["dtype"])
        self._axis = join_ranks(device, dist.FileStore(setup["store"], tp), rank, tp, setup["timeout_s"])

        decoder = Decoder(config, setup["n_pages"], setup["page_tokens"], self._dtype, device, share, self._axis)
        super().__init__(decoder, device)

    def load(self) -> None:
        """Receives this rank's part of every parameter, in the order in which `Decoder.build` asks for them."""

        def receive(name: str) -> torch.Tensor:
            part = torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)
            dist.recv(part, group=self._axis.group, group_src=LEADER)
            return part

        self.decoder.build(receive)


COMMANDS = (
    *("load", "resize", "sleep", "wake", "prefill", "extend", "plan", "advance", "decode"),
    *("copy_page", "clear", "save", "restore", "forget"),
)


def main() -> None:
    """Runs one follower until its socket closes, which ends the process. Arguments of the command line are
    the socket's number, the rank and the parent's process id.

    An exception after the setup is printed and ends the process at once with code 1, as does a parent that has ended.

    Raises:
        OSError: the kernel refuses to tie this process to its parent.
    """
    socket_number, rank, parent = map(int, sys.argv[1:])
    # First of all: the leader may have died while this process started.
    die_with_parent(parent)
    connection = Connection(socket_number)
    threading.Thread(target=_exit_at_hang_up, args=[connection], daemon=True).start()

    setup = json.loads(connection.recv_bytes())
    # Sent before the ranks join: the leader joins only after all followers have started.
    connection.send_bytes(b"ready")
    try:
        _serve(connection, setup, rank)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: rank 0 must not wait in a collective while this process cleans up


def _exit_at_hang_up(connection: Connection) -> None:
    """Ends this process as soon as the leader's end of its socket closes, even inside a collective."""
    poll = select.poll()
    poll.register(connection, getattr(select, "POLLRDHUP", select.POLLHUP))
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
