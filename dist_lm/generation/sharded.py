"""A model over several devices of one node, as one `Runner`: this process leads, the others follow.

Every step is told to the followers first and then done here too, so that all ranks meet in the regions of
`parallel_region.py`. Only this rank has whole logits; it alone chooses tokens.
"""

import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ConfigError
from dist_lm.generation.cache_choice import build_cache
from dist_lm.generation.decoder import Decoder, check_weights
from dist_lm.generation.followers import Followers
from dist_lm.generation.paged_cache import Piece, Plan
from dist_lm.generation.shard import check_tp, cut, share_of
from dist_lm.parallel.mesh import join_ranks, leave_ranks

TIMEOUT_S = 120.0  # for a rank that does not come to a message, although it lives; and for all to meet


class ShardedDecoder:
    """See `Runner`. The thread that makes it has to live as long as it is used."""

    def __init__(
        self,
        config: ModelConfig,
        n_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        tp: int,
    ) -> None:
        """Start the followers, which compute with as many threads as this process does, and meet them.

        Raises:
            ConfigError: the model cannot be cut so, or there are not so many GPUs.
            RankLostError: a follower does not start.
            RuntimeError: this process is among other ranks already.
        """
        if sys.platform != "linux":
            raise ConfigError(f"tp={tp}: expected 1, as this is {sys.platform}; several devices take Linux")
        gpu = device.type == "cuda"
        check_tp(config, tp, torch.cuda.device_count() if gpu else None)
        if dist.is_initialized():
            raise RuntimeError("this process is a rank already: a model over several devices needs one of its own")
        device = torch.device("cuda", 0) if gpu else device
        place = tempfile.TemporaryDirectory(prefix="dist_lm_ranks_")  # only its owner gets in
        store = str(Path(place.name) / "store")
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
        self._config, self._dtype, self._device = config, dtype, device
        self._shares = [share_of(config, tp, rank) for rank in range(tp)]
        self._tickets = count()
        self._followers = Followers(tp, setup, on_loss=lambda: _unblock(device))
        self._end = weakref.finalize(self, _end, self._followers, device, place)
        try:
            with self._in_step():
                self._axis = join_ranks(device, dist.FileStore(store, tp), 0, tp, TIMEOUT_S)
            if not gpu:  # NCCL goes on looking at it
                place.cleanup()
            share = self._shares[0]
            cache = build_cache(share, n_pages, page_tokens, dtype, device)
            self._decoder = Decoder(config, cache, page_tokens, dtype, device, share, self._axis)
        except BaseException:
            self.close()
            raise

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Runner`. Parameters go to the others one by one, so no device ever holds all of them."""
        check_weights(self._config, {name: tuple(value.shape) for name, value in weights.items()})

        def hand_out(name: str) -> torch.Tensor:
            whole = weights[name].detach().to(self._device, self._dtype)
            for rank, share in enumerate(self._shares[1:], 1):
                dist.send(cut(name, whole, share).contiguous(), group=self._axis.group, group_dst=rank)
            return cut(name, whole, self._shares[0]).contiguous()

        with self._in_step("load"):
            self._decoder.build(hand_out)

    def prefill(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """See `Runner`."""
        told = [(list(piece.tokens), piece.start, list(piece.pages)) for piece in pieces]
        with self._in_step("prefill", told):
            return self._decoder.prefill(pieces)

    def plan(self, pages: Sequence[Sequence[int]], positions: Sequence[int]) -> Plan:
        """See `Runner`."""
        with self._in_step("plan", [list(own) for own in pages], list(positions)):
            return SharedPlan(self._decoder.plan(pages, positions), lambda: self._in_step("advance"))

    def decode(self, token_B: torch.Tensor, plan: Plan) -> torch.Tensor:
        """See `Runner`."""
        assert isinstance(plan, SharedPlan)
        with self._in_step("decode", token_B.tolist()):
            return self._decoder.decode(token_B, plan.own)

    def copy_page(self, source: int, target: int) -> None:
        """See `Runner`."""
        with self._in_step("copy_page", source, target):
            self._decoder.copy_page(source, target)

    def clear(self, pages: Sequence[int]) -> None:
        """See `Runner`."""
        with self._in_step("clear", list(pages)):
            self._decoder.clear(pages)

    def save(self, pages: Sequence[int]) -> "Saved":
        """See `Runner`. Each rank keeps its own part."""
        ticket = next(self._tickets)
        with self._in_step("save", ticket, list(pages)):
            return Saved(ticket, self._decoder.save(pages))

    def restore(self, pages: Sequence[int], content: "Saved") -> None:
        """See `Runner`."""
        with self._in_step("restore", content.ticket, list(pages)):
            self._decoder.restore(pages, content.own)

    def forget(self, content: "Saved") -> None:
        """See `Runner`."""
        with self._in_step("forget", content.ticket):
            self._decoder.forget(content.own)

    def check(self) -> None:
        """See `Runner`."""
        self._followers.check()

    def close(self) -> None:
        """See `Runner`."""
        self._end()

    @contextmanager
    def _in_step(self, *command: object) -> Iterator[None]:
        """Tell the followers, and do it; who is interrupted on the way is not where they are any more."""
        self._followers.check()
        try:
            if command:
                self._followers.tell(command)
            yield
        except (RuntimeError, OSError) as error:
            self._followers.explain(error)
            self._followers.abandon(f"the model is gone: a step of it failed ({error})")
            raise
        except BaseException as error:
            self._followers.abandon(f"the model is gone: a step of it was interrupted ({type(error).__name__})")
            raise


@dataclass(frozen=True)
class Saved:
    """Content of some pages: this rank's, and by which number the others have theirs."""

    ticket: int
    own: Any


class SharedPlan:
    """See `Plan`."""

    def __init__(self, own: Plan, in_step: Callable[[], AbstractContextManager[None]]) -> None:
        self.own, self._in_step = own, in_step
        self.position_B, self.written_B = own.position_B, own.written_B

    def advance(self) -> None:
        """See `Plan`."""
        with self._in_step():
            self.own.advance()


def _unblock(device: torch.device) -> None:
    """End a message that this process waits for; gloo does so by itself when a peer is gone."""
    if device.type == "cuda":
        leave_ranks(device)


def _end(followers: Followers, device: torch.device, place: tempfile.TemporaryDirectory[str]) -> None:
    followers.end()
    leave_ranks(device)
    place.cleanup()
