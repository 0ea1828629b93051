"""One actor of a pool, from where its driver stands: a reserved place on a node, and what it was asked."""

import time
from dataclasses import dataclass
from typing import Any

from dist_lm.cluster.pool_actor import EngineSpec, PoolActor, WorkReport
from dist_lm.cluster.ray_cluster import Node
from dist_lm.cluster.ray_errors import first_line, last_line
from dist_lm.errors import UserError
from dist_lm.generation.request import Request


class MemberLostError(Exception):
    """An actor has died, or does not answer; the message says which and why."""


@dataclass(frozen=True)
class Weights:
    """Weights in Ray's object store, once for all actors."""

    reference: Any
    version: int


class Member:
    """An actor in its place. Ray starts it as soon as the place is free."""

    def __init__(
        self, spec: EngineSpec, node: Node, *, cores: int, gpus: int, devices: tuple[int, ...], name: str
    ) -> None:
        """Reserve a place on `node` and ask for an actor there; a bundle takes one CPU, as an agent's does.

        Args:
            cores: that it computes with.
            gpus: that Ray gives it.
            devices: GPUs of the node that it uses without Ray's doing.
            name: of the reservation.
        """
        from ray.util import placement_group

        self.node = node
        self.pid = 0  # of the actor's process, once it is there
        self.version: int | None = None  # of its weights, once they are there
        self._spec, self._cores, self._gpus, self._devices = spec, cores, gpus, devices
        self._group = placement_group(
            [{"CPU": 1.0} | ({"GPU": float(gpus)} if gpus else {})],
            strategy="SPREAD",
            name=name,
            bundle_label_selector=[{"ray.io/node-id": node.id}],
        )
        self._actor: Any = None
        self._loading: tuple[Any, int] | None = None  # the open call, and the version it brings
        self._working: tuple[Any, float] | None = None  # the open call, and when it was made

    @property
    def is_ready(self) -> bool:
        """Whether it can be asked to work: calls go in their order, so newer weights may still be on their way."""
        return self.is_up and self._working is None

    @property
    def next_version(self) -> int | None:
        """Of the weights that it has when it comes to the next call."""
        return self._loading[1] if self._loading else self.version

    @property
    def is_up(self) -> bool:
        """Whether it has weights, old or new."""
        return self.version is not None

    @property
    def open_call(self) -> Any:
        """The Ray reference that comes next, if there is one."""
        call = self._loading or self._working
        return call[0] if call else None

    def start(self, weights: Weights) -> None:
        """Start an actor, the first one or one in the place of one that died."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        remote = ray.remote(num_cpus=1, num_gpus=self._gpus, max_restarts=0, max_task_retries=0)(PoolActor)
        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=0)
        self._actor = remote.options(scheduling_strategy=strategy).remote(self._spec, self._cores, self._devices)
        self.version = self._working = None
        self.load(weights)

    def load(self, weights: Weights) -> None:
        """Have it go on with other weights."""
        assert self._working is None
        self._loading = (self._actor.load.remote(weights.reference, weights.version), weights.version)

    def work(self, requests: list[Request]) -> None:
        """Hand it requests, and have it work for a moment."""
        assert self.is_ready
        self._working = (self._actor.work.remote(requests), time.monotonic())

    def take(self, patience_s: float) -> WorkReport | None:
        """What became of the open calls: a report if it worked and has come back, else None.

        Args:
            patience_s: how long it may be at work without an answer.

        Raises:
            MemberLostError: it is gone.
            UserError: it was given what it cannot use.
        """
        if self._loading:
            pid = self._answer(self._loading[0])
            if pid is None:
                return None
            self.pid, self.version = pid, self._loading[1]
            self._loading = None
            if self._working:  # begins now
                self._working = (self._working[0], time.monotonic())
        if not self._working:
            return None
        report: WorkReport | None = self._answer(self._working[0])
        if report is not None:
            self._working = None
        elif time.monotonic() - self._working[1] > patience_s:
            raise MemberLostError(f"{self}: no answer for {patience_s:.0f} s")
        return report

    def _answer(self, call: Any) -> Any:
        """What a call has returned; None: nothing yet."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        if not ray.wait([call], timeout=0)[0]:
            return None
        try:
            return ray.get(call)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from error
            raise MemberLostError(f"{self}: {last_line(error)}") from error
        except RayError as error:  # it died, or the weights went with the node that held them, and the like
            raise MemberLostError(f"{self}: {first_line(error)}") from error

    def drop_all(self) -> None:
        """Have it forget all requests; what it still says of them is not listened to."""
        self._working = None
        if self.is_up:
            self._actor.drop_all.remote()

    def end(self) -> None:
        """End the actor; its place is kept."""
        import ray
        from ray.exceptions import RayError

        self.version = self._loading = self._working = None
        try:
            ray.kill(self._actor)
        except RayError:
            return  # it has died already

    def release(self) -> None:
        """End the actor and give its place back."""
        from ray.util import remove_placement_group

        if self._actor is not None:
            self.end()
        remove_placement_group(self._group)

    def __str__(self) -> str:
        return f"actor {self.pid or '(starting)'} on {self.node.address}"
