"""A pool: many engines behind one `generate` call, in Ray actors that are replaced when they die.

    with Pool.start(cluster, spec, weights, version=1) as pool:
        for result in pool.generate(requests): ...

The pool deals requests to actors and collects their answers; it draws nothing itself. Each actor has an engine
(`dist_lm/generation/engine.py`). Requests are read as engines can take them, so there may be any number. An answer is a
function of its request and the weights, so it does not matter which actor computes it, nor if one has to begin anew
(the last bits are those of any other actor only on the CPU in fp32).
"""

import logging
import math
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self, cast

import numpy as np
import torch

from dist_lm.cluster.allocation import Reserved, Site, cores_of, missing_places
from dist_lm.cluster.events import PoolFailure
from dist_lm.cluster.pool_actor import EngineSpec, Member, MemberLostError, Weights
from dist_lm.cluster.pool_ledger import Depth, Ledger, Result
from dist_lm.cluster.pool_weights import Stored, store
from dist_lm.cluster.ray_cluster import Node, RayCluster
from dist_lm.cluster.recruit import NoNodesError
from dist_lm.config.pool import AS_MANY
from dist_lm.generation.decoder import WeightStream, check_weights
from dist_lm.generation.request import Answer, Finished, Request, ignore_answer, in_order, reporting
from dist_lm.generation.shard import check_tp
from dist_lm.model.size import parameter_shapes

if TYPE_CHECKING:
    from dist_lm.cluster.pool_push import Held, Sender

log = logging.getLogger(__name__)

SLICE_S = 0.5  # between two calls of `keep_going`
LOOK_EVERY_S = 2.0  # between two queries of the living nodes
OTHERS_S = 5.0  # wait for the other actors at the start, once the first one is up
ENGINEFULS = 2  # work sent to an actor, in engine capacities: one in progress, one waiting

ANYWHERE = Site()


class ActorsLostError(NoNodesError):
    """No actor is left, and no place for another one became free in time."""


class Pool:
    """Generation actors behind one `generate` call. As a context manager it ends them at the end of the block."""

    member_class: ClassVar[type[Member]] = Member

    def __init__(
        self,
        cluster: RayCluster,
        spec: EngineSpec,
        weights: Weights,
        actors: int,
        keep_going: Callable[[], bool],
        warn: Callable[[str], None],
        site: Site,
        sender: "Sender | None",
    ) -> None:
        """See `start`."""
        self._cluster = cluster
        self._spec = spec
        self._weights = weights
        self._actors = actors
        self._keep_going = keep_going
        self._warn = warn
        self._site = site
        self._sender = sender

        self._name = f"pool-{secrets.token_hex(8)}"  # prefix of the names of its reservations
        self._members: dict[int, Member] = {}  # number, the ledger's lane -> actor
        self._next_member = 0
        self._looked_at = -math.inf
        self._failures = 0  # deaths of actors since the last answer
        self._without_since = time.monotonic()  # since when no actor is up
        self._ledger: Ledger | None = None

    @classmethod
    def start(
        cls,
        cluster: RayCluster,
        spec: EngineSpec,
        weights: Mapping[str, np.ndarray] | WeightStream,
        *,
        version: int = 0,
        actors: int = AS_MANY,
        keep_going: Callable[[], bool] = lambda: True,
        warn: Callable[[str], None] = log.warning,
        site: Site = ANYWHERE,
        sender: "Sender | None" = None,
    ) -> Self:
        """Starts actors and waits for the first one, and `OTHERS_S` for the others.

        Args:
            cluster: its cluster.nodes limits the number of nodes used.
            spec: specification of the engines.
            weights: float arrays by the names of the model's parameters, or a stream of parameters; sent in spec.dtype.
            version: version of `weights`.
            actors: how many; -1: one for each spec.tp GPUs of a node, or one per node without GPUs.
            keep_going: asked while waiting; if it returns False the wait ends without an error; the pool may have no
                actor yet.
            warn: receives a line for each lost actor or node.
            site: the part of the cluster that it may use.
            sender: sends later weights straight to actors; None: through Ray's object store.

        Raises:
            ActorsLostError: no free place within cluster.start_timeout_s.
            PoolFailure: actors die while they start.
            UserError: the weights do not fit the model, or no node has enough GPUs for an engine.
        """
        check_tp(spec.model, spec.tp, _most_gpus(cluster) if spec.gpus else None, "parallel.tp")
        pool = cls(cluster, spec, Weights(_stored(spec, weights), version), actors, keep_going, warn, site, sender)
        try:
            pool._await_start()
        except BaseException:
            pool.close()
            raise
        return pool

    @property
    def members(self) -> list[Member]:
        """The actors that are up."""
        return [member for member in self._members.values() if member.is_up]

    def load_weights(self, weights: "Mapping[str, np.ndarray] | WeightStream | Stored | Held", version: int) -> None:
        """Uses other weights from now on, in all present and future actors; a stream is read to its end. Waits until
        every actor that is up has the weights or has begun to load them: its next work uses them.

        If `keep_going` returns False it returns early, without an error; actors that have not begun do so later.

        Raises:
            RuntimeError: a `generate` call is under way.
            UserError: the weights do not fit the model. If an actor rejects them later, the next call raises it.
            ActorsLostError: no place for an actor within cluster.node_wait_s.
            PoolFailure: actors keep dying.
        """
        if self._ledger:
            raise RuntimeError("weights cannot change during `generate`: finish or close it first")
        self._weights = Weights(self._sent(weights, version), version)
        while self._keep_going():
            self._tend()
            if self.members and all(member.next_version == version for member in self.members):
                return
            self._wait()

    def swap_weights(self, stored: Stored, version: int) -> None:
        """Uses other weights soon, in the middle of answers too: an actor loads them between two slices of work, and
        its requests go on by them (`Engine.swap_weights`). From any thread, also during `generate`; does not wait.

        An actor that rejects them raises its error from `generate`.
        """
        self._weights = Weights(stored, version, under_way=True)

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Result]:
        """Yields all answers to every request, or one refusal; the results of a request come together, once complete,
        in the order of completion.

        None among the requests means that there is none now: the iterator is asked again.

        Nothing happens before the first result is asked for. If `keep_going` returns False, or the caller leaves early,
        the rest is cancelled.

        Raises:
            ActorsLostError: no actor is left, and no place for another one within cluster.node_wait_s.
            PoolFailure: (cluster.max_restarts + 1) deaths per actor without an answer in between.
            RuntimeError: another `generate` is under way.
            UserError: an actor rejected the weights. What `requests` raises passes.
        """
        if self._ledger:
            raise RuntimeError("one `generate` at a time: finish or close the other one first")
        options = self._spec.options
        depth = Depth(ENGINEFULS * options.max_sequences, ENGINEFULS * options.most_tokens(self._spec.model))
        ledger = self._ledger = Ledger(iter(requests), depth)

        try:
            while not ledger.is_over and self._keep_going():
                self._tend()
                self._hand_out(ledger)
                yield from ledger.release()
                if not ledger.is_over:
                    self._wait()
        finally:
            self._ledger = None
            # The caller has left early: engines must not go on with requests of nobody.
            if not ledger.is_over:
                for member in self._members.values():
                    member.drop_all()

    def _sent(
        self, weights: "Mapping[str, np.ndarray] | WeightStream | Stored | Held", version: int
    ) -> "Stored | Held":
        """Returns weights in a form that later actors can load: reads a stream to its end, and returns `Stored` ones as
        they are. Actors that the sender reaches have then begun to load the weights.

        With a sender it first waits until no actor loads an earlier version; only a pool with a sender takes `Held`.

        Raises:
            UserError: the weights do not fit the model.
            ActorsLostError, PoolFailure: see `_tend`.
        """
        if isinstance(weights, Stored):
            return weights
        if self._sender is None:
            return _stored(self._spec, weights)  # type: ignore[arg-type]

        # Actors that still load the version before cannot receive another one.
        self._tend()
        while self._keep_going() and any(member.next_version != member.version for member in self.members):
            self._wait()
            self._tend()
        idle = [member for member in self.members if member.is_ready]
        stream = _stream(self._spec, weights)  # type: ignore[arg-type]
        return self._sender.send(stream, version, idle, self._keep_going, self._warn)

    def hold(self, weights: WeightStream) -> "Stored | Held":
        """Returns weights for a later `load_weights`, read to the end; allowed during `generate`, from any thread.

        Raises:
            UserError: the weights do not fit the model.
        """
        return self._sender.hold(weights) if self._sender else _stored(self._spec, weights)

    def sleep(self) -> None:
        """Frees the caches of all actors until the next `generate`, and waits until they are free."""
        import ray

        if calls := [member.sleep() for member in self.members]:
            ray.wait(calls, num_returns=len(calls), timeout=self._cluster.config.hang_min_s)

    def close(self) -> None:
        """Ends all actors and frees their places."""
        for member in self._members.values():
            member.release()
        self._members.clear()
        if self._sender:
            self._sender.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _await_start(self) -> None:
        """Waits until an actor is up, and then up to `OTHERS_S` for the others; returns early if `keep_going` returns
        False.

        Raises:
            ActorsLostError: no place within cluster.start_timeout_s.
            PoolFailure: actors die while they start.
            UserError: an actor rejected the weights.
        """
        config = self._cluster.config
        first_up_at: float | None = None
        while self._keep_going():
            self._tend(config.start_timeout_s)
            # Work can begin on one actor, so the others are not waited for much longer.
            if n_up := len(self.members):
                first_up_at = first_up_at or time.monotonic()
                if n_up == len(self._members) or time.monotonic() - first_up_at > OTHERS_S:
                    return
            self._wait()

    def _tend(self, patience_s: float | None = None) -> None:
        """Collects reports, replaces lost actors, starts missing ones, and gives present weights to those that lack
        them. Does not wait.

        Args:
            patience_s: longest time without any actor; None: cluster.node_wait_s.

        Raises:
            ActorsLostError: no actor has been up for longer.
            PoolFailure: too many deaths without an answer in between.
            UserError: an actor rejected the weights.
        """
        config = self._cluster.config
        # A report that completes requests shows that actors can work: older deaths no longer count.
        for number, member in list(self._members.items()):
            try:
                has_answered = self._collect(number, member)
            except MemberLostError as lost:
                self._replace(number, str(lost))
                continue
            if has_answered:
                self._failures = 0
            self._renew(member)
        self._look_at_nodes()

        if patience_s is None:
            patience_s = config.node_wait_s
        if self.members:
            self._without_since = time.monotonic()
        elif time.monotonic() - self._without_since > patience_s:
            gpus = f" and {self._reserved_gpus} GPU of one node" if self._reserved_gpus else ""
            raise ActorsLostError(
                f"cluster: no place for a generation actor within {patience_s:g} s: the Ray cluster at "
                f"{self._cluster.address} has {len(self._cluster.nodes())} nodes; an actor takes one CPU"
                f"{gpus}; the same command continues once a place is free"
            )

    def _collect(self, number: int, member: Member) -> bool:
        """Takes the report of an actor, if there is one; returns whether it completes requests.

        Raises:
            MemberLostError, UserError: as `Member.take`.
        """
        report = member.take(self._cluster.config.hang_min_s)
        if report is None or self._ledger is None:
            return False
        return self._ledger.report(number, report.finished, report.tokens_in_flight) > 0

    def _renew(self, member: Member) -> None:
        """Begins to load the present weights on an actor that lacks them, once it is between two slices of work."""
        if member.is_ready and member.next_version != self._weights.version:
            member.load(self._weights)

    def _look_at_nodes(self) -> None:
        """Reserves places on new nodes and starts an actor on each, and drops those on nodes that are gone (a warning);
        at most once in `LOOK_EVERY_S`. It does not wait for the actors.
        """
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()

        nodes = self._cluster.nodes()
        node_of = {node.id: node for node in nodes}
        for number, member in list(self._members.items()):
            # A lost node says nothing against the requests that its actor worked on.
            if member.node.id not in node_of:
                self._warn(f"generation: node {member.node.address} is gone; continuing without it")
                self._leave(number, blamed=False)
                self._members.pop(number).release()

        actors_of = Counter(member.node.id for member in self._members.values())
        reserved = _reserved_by_others(self._name) if self._site.among_others else {}
        usable = self._site.nodes(nodes, reserved)
        most_nodes = self._cluster.config.nodes
        for node in missing_places(usable, actors_of, self._actors, most_nodes, self._reserved_gpus):
            member = self._member_on(node_of[node.id], actors_of[node.id])
            actors_of[node.id] += 1
            member.start(self._weights)
            self._members[self._next_member] = member
            self._next_member += 1

    @property
    def _reserved_gpus(self) -> int:
        """GPUs that Ray reserves for an actor."""
        return 0 if self._site.shares_gpus else self._spec.gpus

    def _member_on(self, node: Node, ordinal: int) -> Member:
        """Reserves a place on `node` for its `ordinal`-th actor of this pool, and returns the member; the actor
        does not start yet."""
        return self.member_class(
            self._spec,
            node,
            cores=self._site.cores(node, cores_of(node, self._actors, self._cluster.config.nodes, self._reserved_gpus)),
            gpus=self._reserved_gpus,
            devices=self._site.devices(node, self._spec.gpus, ordinal),
            name=f"{self._name}-{self._next_member}",
        )

    def _replace(self, number: int, reason: str) -> None:
        """Starts another actor in the place of a lost one, with a warning; its requests are dealt again.

        Raises:
            PoolFailure: too many deaths without an answer in between.
        """
        member = self._members[number]
        self._failures += 1
        # An actor that was still starting had no requests, so they cannot be the cause of its death.
        self._leave(number, blamed=member.is_up)
        most_failures = (self._cluster.config.max_restarts + 1) * max(1, len(self._members))
        if self._failures >= most_failures:
            raise PoolFailure(f"generation: {self._failures} actors died without an answer in between; last {reason}")
        self._warn(f"generation: {reason}; starting another one in its place")
        member.end()
        member.start(self._weights)

    def _leave(self, number: int, blamed: bool) -> None:
        if self._ledger and number in self._ledger.lanes:
            self._ledger.leave(number, blamed)

    def _hand_out(self, ledger: Ledger) -> None:
        """Deals requests to actors with the present weights, and begins a slice of work on each that has some. What the
        iterator of requests raises passes.
        """
        # Requests that begin now begin with the present weights, so an actor that lacks them gets no work.
        ready = {
            number: member
            for number, member in self._members.items()
            if member.is_ready and member.next_version == self._weights.version
        }
        for number in ready.keys() - ledger.lanes:
            ledger.join(number)
        ledger.deal()

        for number, member in ready.items():
            if ledger.has_work(number):
                member.work(ledger.send(number))

    def _wait(self) -> None:
        """Waits until a call ends, at most `SLICE_S`."""
        import ray

        calls = [call for member in self._members.values() if (call := member.open_call) is not None]
        if calls:
            ray.wait(calls, num_returns=1, timeout=SLICE_S)
        else:
            time.sleep(SLICE_S)


class PoolRollouts:
    """A `rlhf.rollouts.RolloutSource` over a pool that others close: `generate` returns what one engine would.

    One call at a time, `hold` and `swap_weights` excepted.
    """

    def __init__(self, pool: Pool, sleeps: bool = False) -> None:
        """`sleeps`: free the caches between two calls of `generate`."""
        self.pool, self._sleeps = pool, sleeps

    def load_weights(self, weights: "WeightStream | Stored | Held", version: int) -> None:
        """See `Pool.load_weights`."""
        self.pool.load_weights(weights, version)

    def hold(self, weights: WeightStream) -> "Stored | Held":
        """See `Pool.hold`."""
        return self.pool.hold(weights)

    def swap_weights(self, weights: "Stored | Held", version: int) -> None:
        """See `Pool.swap_weights`."""
        assert isinstance(weights, Stored), "a sender of weights straight to actors waits for idle ones"
        self.pool.swap_weights(weights, version)

    def generate(self, requests: Sequence[Request], finished: Finished = ignore_answer) -> list[Answer]:
        """Returns all answers, in the order of the requests, then of their index. `finished` gets each as soon as it is
        there.

        Raises:
            RequestError: a request was refused.
            ActorsLostError, PoolFailure: see `Pool.generate`.
        """
        return in_order(requests, reporting(requests, self.results(requests), finished))

    def results(self, requests: Iterable[Request | None]) -> Iterator[Result]:
        """See `Pool.generate`."""
        yield from self.pool.generate(requests)
        if self._sleeps:
            self.pool.sleep()


def _reserved_by_others(prefix: str) -> dict[str, Reserved]:
    """Returns the CPUs and GPUs held by granted placement groups whose names do not begin with `prefix`, by node id."""
    from ray.util import placement_group_table

    cpus: dict[str, float] = defaultdict(float)
    gpus: dict[str, float] = defaultdict(float)
    for group in placement_group_table().values():
        if group["state"] != "CREATED" or group["name"].startswith(prefix):
            continue
        for bundle, node in group["bundles_to_node_id"].items():
            cpus[node] += group["bundles"][bundle].get("CPU", 0)
            gpus[node] += group["bundles"][bundle].get("GPU", 0)
    return {node: Reserved(int(cpus[node]), int(gpus[node])) for node in cpus}


def _most_gpus(cluster: RayCluster) -> int | None:
    """Returns the most GPUs of a node; None if no node has any yet, as the pool then waits for one."""
    return max((node.gpus for node in cluster.nodes()), default=0) or None


def _stored(spec: EngineSpec, weights: Mapping[str, np.ndarray] | WeightStream) -> Stored:
    return store(_stream(spec, weights), spec.model, spec.dtype)


def _stream(spec: EngineSpec, weights: Mapping[str, np.ndarray] | WeightStream) -> WeightStream:
    if not isinstance(weights, Mapping):
        return weights
    arrays = cast("Mapping[str, np.ndarray]", weights)
    check_weights(spec.model, {name: array.shape for name, array in arrays.items()})
    return ((name, torch.from_numpy(arrays[name])) for name in parameter_shapes(spec.model))
