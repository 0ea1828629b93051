"""One actor of a pool: `PoolActor` runs an engine in slices of work, `Member` drives it from the pool's process. How
answers are drawn is the engine's (`dist_lm/generation/engine.py`).

`PoolActor` is a plain class that `Member` makes a Ray actor. One call brings new requests and returns finished answers,
so a message carries many tokens. The actor opens no port and dies with its node's Ray.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import psutil
import torch

from dist_lm.cluster.node_facts import VISIBLE
from dist_lm.cluster.pool_weights import Place, Stored, gpu_of, read
from dist_lm.cluster.ray_cluster import Node, bundle_of, first_line, last_line
from dist_lm.config.model import ModelConfig
from dist_lm.errors import UserError
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.grammar import Grammars
from dist_lm.generation.request import Answer, Refusal, Request, RequestError
from dist_lm.parallel.mesh import lacks_bf16
from dist_lm.storage.process import die_with_parent
from dist_lm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dist_lm.cluster.pool_push import Held
    from dist_lm.cluster.push_link import Offer, Receiver

log = logging.getLogger(__name__)

LEAST_S, MOST_S = 0.2, 0.5  # a slice ends after LEAST_S if an answer has finished, else after MOST_S


@dataclass(frozen=True)
class EngineSpec:
    """The engine that every actor of a pool builds."""

    model: ModelConfig
    options: EngineOptions
    eot_id: int
    vocabulary: tuple[bytes, ...] | None = None  # bytes of every token; without it answers have no text
    dtype: torch.dtype = torch.float32
    device: str = "cpu"  # cpu | cuda
    tp: int = 1  # devices that share the model
    tokenizer_file: bytes | None = None  # its content; without it requests with a constraint are refused

    @property
    def gpus(self) -> int:
        """GPUs of an actor; 0: it computes on the CPU."""
        return self.tp if self.device == "cuda" else 0


@dataclass(frozen=True)
class WorkReport:
    """Result of a slice of work."""

    finished: list[Answer | Refusal]
    tokens_in_flight: int


@dataclass(frozen=True)
class Loaded:
    """An actor that has complete weights."""

    pid: int
    gpu: str  # UUID of its first GPU; empty: none


class PoolActor:
    """One engine."""

    def __init__(self, spec: EngineSpec, threads: int, devices: tuple[int, ...] = ()) -> None:
        """The engine is built by `load`.

        Args:
            threads: number of torch's threads, unless the node's environment sets OMP_NUM_THREADS.
            devices: GPUs to use, as indices into those that the node shows; empty: those that Ray assigned.

        Raises:
            UserError: the node shows fewer GPUs than `devices` names.
        """
        die_with_parent()
        # CUDA reads the variable at its first use.
        if devices:
            os.environ[VISIBLE] = shown_devices(os.environ, devices)

        # The environment at the start of the process counts: later Ray sets the variable to 1.
        omp_threads = psutil.Process().environ().get("OMP_NUM_THREADS", "")
        if omp_threads.isdigit() and int(omp_threads):
            threads = int(omp_threads)
        # Divided among the processes that share the model.
        self._threads = max(1, threads // spec.tp)
        torch.set_num_threads(self._threads)
        self._spec = spec
        self._engine: Engine | None = None
        self._receiver: Receiver | None = None
        self._accepted: set[str] = set()  # ids of requests under way

    def load(self, chunks: Sequence[Any], version: int, under_way: bool = False) -> Loaded:
        """Uses the weights of `pool_weights.Stored` from now on, and returns process and GPU; the first call builds the
        engine.

        A GPU without bf16 computes in fp32 (a warning).

        Args:
            chunks: Ray references, fetched one at a time.
            under_way: whether requests may be under way, which go on by these weights.

        Raises:
            UserError: the weights do not fit the model, or the node has too few devices.
            RankLostError: with tp > 1, another process of the engine has ended.
        """
        spec = self._spec
        weights = read(chunks, spec.dtype)
        if self._engine and under_way:
            self._engine.swap_weights(weights, version)
        elif self._engine:
            self._engine.load_weights(weights, version)
        if self._engine:
            return self._loaded()

        # The dtype was planned without a look at this card.
        dtype = spec.dtype
        if spec.device == "cuda" and lacks_bf16(torch.device("cuda", 0)) and dtype != torch.float32:
            log.warning("%s has no bf16 instructions: its engine computes in fp32", torch.cuda.get_device_name(0))
            dtype = torch.float32
        self._engine = Engine(
            spec.model,
            weights,
            eot_id=spec.eot_id,
            vocabulary=spec.vocabulary,
            options=spec.options,
            version=version,
            dtype=dtype,
            device=torch.device(spec.device),
            tp=spec.tp,
            grammars=_grammars(spec),
        )
        return self._loaded()

    def receive(self, offer: "Offer", version: int, address: str) -> Loaded | str:
        """Uses the weights that the pool's process sends from now on; joins the group of the offer if it has not.

        Args:
            address: this node's.

        Returns:
            What it has loaded, or a reason if the weights did not arrive completely; the engine then has none until the
                next `load`.

        Raises:
            UserError: the weights do not fit the model.
            LinkError: other members of the group do not come or go on in time.
            RuntimeError: a member of the group is lost.
        """
        from dist_lm.cluster.push_link import FAILURES, Receiver, unpacked

        spec, engine = self._spec, self._engine
        assert engine
        try:
            if self._receiver is None or self._receiver.offer.group != offer.group:
                self._leave()
                device = torch.device("cuda", 0) if spec.gpus else torch.device("cpu")
                self._receiver = Receiver(offer, device, address)
            buckets = self._receiver.buckets(spec.model, spec.dtype)
            engine.load_weights(unpacked(buckets, spec.model, spec.dtype), version)
            # Says that the last bucket is taken.
            for _ in buckets:
                raise AssertionError("more weights than parameters")
        except FAILURES as error:
            self._leave()
            return f"{type(error).__name__}: {first_line(error)}"
        return self._loaded()

    def _leave(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver:
            receiver.close()

    def _loaded(self) -> Loaded:
        return Loaded(os.getpid(), gpu_of(torch.device(self._spec.device)))

    def work(self, requests: Sequence[Request]) -> WorkReport:
        """Accepts requests and works for one slice of 0.2 to 0.5 s; returns the results that have finished.

        A request that the engine rejects is returned as a refusal.

        Raises:
            ConfigError: with cache_tokens=0, free memory does not hold one context.
            RankLostError: with tp > 1, another process of the engine has ended.
        """
        engine = self._engine
        assert engine
        finished: list[Answer | Refusal] = []
        for request in requests:
            try:
                engine.submit(request)
                self._accepted.add(request.id)
            except RequestError as error:
                finished.append(Refusal(request.id, error.reason))

        # A slice ends soon after the first answer, so that the pool can send more work in time.
        started = time.monotonic()
        while engine.busy:
            finished += engine.step()
            if time.monotonic() - started > (LEAST_S if finished else MOST_S):
                break
        if not engine.busy:
            self._accepted.clear()
        return WorkReport(finished, engine.tokens_in_flight)

    def sleep(self) -> None:
        """Frees the memory of the cache until the next `work`, if no request is under way."""
        if self._engine and not self._engine.busy:
            self._engine.sleep()
            if self._spec.gpus:
                # Hands the memory back to the card.
                torch.cuda.empty_cache()

    def drop_all(self) -> None:
        """Cancels every request."""
        assert self._engine
        for request in self._accepted:
            self._engine.cancel(request)
        self._engine.run()
        self._accepted.clear()


def shown_devices(environ: Mapping[str, str], devices: Sequence[int]) -> str:
    """Returns the value of `CUDA_VISIBLE_DEVICES` that leaves some of the devices that `environ` shows, given by index.

    Raises:
        UserError: `environ` shows fewer.
    """
    if VISIBLE not in environ:
        return ",".join(map(str, devices))
    visible = [entry.strip() for entry in environ[VISIBLE].split(",") if entry.strip()]
    if max(devices) >= len(visible):
        raise UserError(
            f"{VISIBLE}={environ[VISIBLE]}: shows {len(visible)} GPUs, and a rollout actor needs the one at index "
            f"{max(devices)}; start the node's Ray with as many GPUs as the variable shows"
        )
    return ",".join(visible[device] for device in devices)


class MemberLostError(Exception):
    """An actor has died or does not answer; the message says which and why."""


@dataclass(frozen=True)
class Weights:
    """Complete weights of a version."""

    stored: "Stored | Held"
    version: int
    under_way: bool = False  # whether requests under way go on by them


class Member:
    """An actor on its reserved place. Ray starts the actor as soon as the place is free."""

    actor_class: ClassVar[type[PoolActor]] = PoolActor
    actor_options: ClassVar[Mapping[str, Any]] = {}  # further options of Ray

    def __init__(
        self, spec: EngineSpec, node: Node, *, cores: int, gpus: int, devices: tuple[int, ...], name: str
    ) -> None:
        """Reserves a place on `node`; its bundle takes one CPU, as that of an agent does.

        Args:
            cores: number of cores that the actor computes with.
            gpus: number of GPUs that Ray assigns.
            devices: GPUs of the node to use instead, without a reservation.
            name: name of the reservation.
        """
        from ray.util import placement_group

        self.node = node
        self.pid = 0  # process of the actor; 0 until it is known
        self.place: Place | None = None  # location of its weights; None until it is known
        self.version: int | None = None  # version of its weights; None until they are loaded
        self.left = False  # True if its last `receive` call failed, so that it lacks these weights
        self._spec = spec
        self._cores = cores
        self._gpus = gpus
        self._devices = devices
        # The place outlives its actor, so that another one can start there.
        self._group = placement_group(
            [bundle_of(gpus)],
            strategy="SPREAD",
            name=name,
            bundle_label_selector=[{"ray.io/node-id": node.id}],
        )
        self._actor: Any = None
        self._loading: tuple[Any, int, float] | None = None  # the open `load` or `receive` call, its version and start
        self._working: tuple[Any, float] | None = None  # the open `work` call, and its start

    @property
    def is_ready(self) -> bool:
        """Whether it accepts work. Newer weights may still be loading: calls run in order."""
        return self.is_up and self._working is None

    @property
    def next_version(self) -> int | None:
        """Version of the weights at the next `work` call."""
        return self._loading[1] if self._loading else self.version

    @property
    def is_up(self) -> bool:
        """Whether it has weights, old or new."""
        return self.version is not None

    @property
    def open_call(self) -> Any:
        """The Ray reference of the call that ends next; None without one."""
        call = self._loading or self._working
        return call and call[0]

    def start(self, weights: Weights) -> None:
        """Starts an actor, for the first time or in place of a dead one, and begins to load `weights`; does not
        wait."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        remote = ray.remote(num_cpus=1, num_gpus=self._gpus, max_restarts=0, max_task_retries=0, **self.actor_options)(
            self.actor_class
        )
        strategy = PlacementGroupSchedulingStrategy(placement_group=self._group, placement_group_bundle_index=0)
        self._actor = remote.options(scheduling_strategy=strategy).remote(self._spec, self._cores, self._devices)
        # Calls of a dead actor get no answer.
        self.version = self._working = None
        self.load(weights)

    def load(self, weights: Weights) -> None:
        """Begins to load other weights."""
        assert self._working is None
        call = self._actor.load.remote(weights.stored.chunks, weights.version, weights.under_way)
        self._loading = (call, weights.version, time.monotonic())

    def receive(self, offer: "Offer", version: int) -> None:
        """Begins to receive other weights from this process."""
        assert self.is_ready
        self.left = False
        self._loading = (self._actor.receive.remote(offer, version, self.node.address), version, time.monotonic())

    def why_not(self) -> str | None:
        """Returns why a `receive` call has ended without complete weights; None if it has not.

        Raises:
            UserError: the actor rejected the weights.
        """
        assert self._loading
        try:
            outcome = self._result(self._loading[0])
        except MemberLostError as lost:
            return str(lost)
        return outcome if isinstance(outcome, str) else None

    def forget_push(self) -> None:
        """Ignores the result of a `receive` call."""
        self._loading = None

    def work(self, requests: list[Request]) -> None:
        """Begins a slice of work with new requests."""
        assert self.is_ready
        self._working = (self._actor.work.remote(requests), time.monotonic())

    def take(self, patience_s: float) -> WorkReport | None:
        """Collects finished calls: a report if a slice of work has ended, else None. Does not wait.

        Weights that did not arrive completely are only logged, and `left` is set.

        Args:
            patience_s: longest time for a slice of work, and for new weights of an actor that is up.

        Raises:
            MemberLostError: the actor is gone, or has not answered for longer.
            UserError: the actor rejected the weights.
        """
        if self._loading:
            call, version, began = self._loading
            loaded: Loaded | str | None = self._result(call)
            if loaded is None:
                if self.is_up and self._working is None and time.monotonic() - began > patience_s:
                    raise MemberLostError(f"{self}: has not taken new weights for {patience_s:.0f} s")
                return None
            self._loading = None
            if isinstance(loaded, str):
                self.left = True
                log.warning("%s: weights %d did not arrive completely: %s", self, version, loaded)
            else:
                self._has_loaded(loaded, version)
            if self._working:  # it begins now
                self._working = (self._working[0], time.monotonic())

        if not self._working:
            return None
        report: WorkReport | None = self._result(self._working[0])
        if report is not None:
            self._working = None
        elif time.monotonic() - self._working[1] > patience_s:
            raise MemberLostError(f"{self}: no answer for {patience_s:.0f} s")
        return report

    def _has_loaded(self, loaded: Loaded, version: int) -> None:
        self.pid, self.place, self.version = loaded.pid, Place(self.node.id, loaded.gpu), version

    def sleep(self) -> Any:
        """Begins to free the memory of the cache. Returns the Ray reference of the call."""
        return self._actor.sleep.remote()

    def drop_all(self) -> None:
        """Cancels all requests, and ignores the report of the open call."""
        self._working = None
        if self.is_up:
            self._actor.drop_all.remote()

    def end(self) -> None:
        """Ends the actor and keeps its place."""
        import ray
        from ray.exceptions import RayError

        self.version = self._loading = self._working = None
        try:
            ray.kill(self._actor)
        except RayError:  # it is already dead
            return

    def release(self) -> None:
        """Ends the actor and frees its place."""
        from ray.util import remove_placement_group

        if self._actor is not None:
            self.end()
        remove_placement_group(self._group)

    def __str__(self) -> str:
        return f"actor {self.pid or '(starting)'} on {self.node.address}"

    def _result(self, call: Any) -> Any:
        """Returns the result of a call; None while it runs.

        Raises:
            MemberLostError: the actor or its node died, or its code failed.
            UserError: its code raised this error.
        """
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
        except RayError as error:  # it died, or the node that held the weights did
            raise MemberLostError(f"{self}: {first_line(error)}") from error


def _grammars(spec: EngineSpec) -> Grammars | None:
    """Returns what follows constraints; None without a tokenizer."""
    content = spec.tokenizer_file
    if content is None:
        return None
    return Grammars(lambda: Tokenizer(content, "the tokenizer of the model"))
