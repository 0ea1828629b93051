"""Sandboxes on all nodes of a Ray cluster: programs run beside generation, whichever node has cores for them.

    with ClusterSandboxes(cluster, workers=0) as sandboxes:
        verdict = sandboxes.submit(program).result()

This process's node runs programs in threads of its own, every other node in an actor. A program goes to the node that
is least busy. A node that is lost, or has no sandbox, is left out, and its programs run elsewhere: a verdict does not
depend on the node.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Self

from dist_lm.cluster.ray_cluster import RayCluster, reason_of
from dist_lm.sandbox.pool import SandboxPool
from dist_lm.sandbox.program import Limits, Program, Verdict
from dist_lm.sandbox.sandbox import fences
from dist_lm.storage.process import die_with_parent

log = logging.getLogger(__name__)

AHEAD = 2  # programs sent to a node for each of its workers: one runs, one waits there
CLOSE_S = 10.0  # actors close their sandboxes; then they are killed
MOST_AT_ONCE = 1000  # calls of an actor; above what any node has of cores


class SandboxActor:
    """The sandboxes of a node."""

    def __init__(self, workers: int, trust_me: bool) -> None:
        """Starts the workers of a `SandboxPool`.

        Raises:
            SandboxError: this node has no sandbox, and without `trust_me` nothing runs outside one.
        """
        die_with_parent()
        self._pool = SandboxPool(workers, trust_me).__enter__()
        self._fences = fences(trust_me).describe()

    def begin(self) -> tuple[int, str]:
        """(programs at once, what keeps a program in)."""
        return self._pool.workers, self._fences

    def run(self, program: Program, limits: Limits) -> Verdict:
        """Runs a program; several calls run side by side."""
        return self._pool.submit(program, limits).result()

    def close(self) -> None:
        """Ends the sandboxes once their programs have ended; a killed actor would leave their memory groups."""
        self._pool.__exit__()


@dataclass(frozen=True)
class Work:
    """A program, and the promise of its verdict."""

    program: Program
    limits: Limits
    verdict: Future[Verdict] = field(default_factory=Future)


@dataclass
class SandboxNode:
    """A node with sandboxes."""

    name: str
    run: Callable[[Program, Limits], Future[Verdict]]
    workers: int = 0  # 0: it has not begun
    running: int = 0  # programs sent to it

    @property
    def has_room(self) -> bool:
        return self.running < AHEAD * self.workers

    @property
    def busy(self) -> float:
        """Programs for each worker."""
        return self.running / self.workers

    def begin(self, work: Work) -> Future[Verdict]:
        """Begins to run a program; an error of the call itself counts as an error of the node, in the future."""
        try:
            return self.run(work.program, work.limits)
        except Exception as error:
            failed: Future[Verdict] = Future()
            failed.set_exception(error)
            return failed


Event = Callable[[], None]


class ClusterSandboxes:
    """A `Sandboxes`. One thread hands programs out, so that none of its state needs a lock."""

    def __init__(self, cluster: RayCluster, workers: int = 0, trust_me: bool = False) -> None:
        """
        Args:
            cluster: connected until the end of the block.
            workers: programs at once on each node; 0: one for each of its cores.
            trust_me: run programs without isolation where a node allows none.
        """
        self._cluster = cluster
        self._workers = workers
        self._trust_me = trust_me
        self._local_pool = SandboxPool(workers, trust_me)
        self._nodes: list[SandboxNode] = []
        self._actors: list[tuple[SandboxNode, Any]] = []
        self._waiting: deque[Work] = deque()
        self._running: list[Work] = []
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._hand_out, name="sandboxes", daemon=True)

    def __enter__(self) -> Self:
        """Raises: SandboxError: no sandbox on this node."""
        # This node is the first one, by which `_ended` knows it.
        local_pool = self._local_pool.__enter__()
        self._nodes.append(SandboxNode("this node", local_pool.submit, local_pool.workers))
        self._start_actors()
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Whoever waits for the verdict of a program that has not ended gets a CancelledError."""
        # None ends the thread; from then on this one alone changes the state.
        self._events.put(None)
        self._thread.join()
        # Submitted, or ended, meanwhile.
        while not self._events.empty():
            if event := self._events.get():
                event()
        for work in (*self._waiting, *self._running):
            if _begins(work):
                work.verdict.set_exception(CancelledError("the sandboxes were closed"))
        self._close_actors()
        self._local_pool.__exit__()

    def _close_actors(self) -> None:
        """Closes the sandboxes of the actors, waiting up to `CLOSE_S`, and kills the actors."""
        if not self._actors:
            return
        import ray

        # Only actors that have begun have sandboxes to close.
        active = [actor for node, actor in self._actors if node in self._nodes and node.workers]
        if active:
            ray.wait([actor.close.remote() for actor in active], num_returns=len(active), timeout=CLOSE_S)
        for _, actor in self._actors:
            ray.kill(actor)

    def submit(self, program: Program, limits: Limits | None = None) -> Future[Verdict]:
        """Runs a program as soon as a node has room."""
        assert self._thread.is_alive(), "ClusterSandboxes is a context manager"
        work = Work(program, limits or Limits())
        self._events.put(partial(self._waiting.append, work))
        return work.verdict

    def _start_actors(self) -> None:
        """Starts an actor on every other node, of one CPU as generation actors are; Ray starts each once that
        is free."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        this_node_id = ray.get_runtime_context().get_node_id()
        remote = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(SandboxActor)
        for ray_node in self._cluster.nodes():
            if ray_node.id == this_node_id:
                continue
            strategy = NodeAffinitySchedulingStrategy(ray_node.id, soft=False)
            options = remote.options(scheduling_strategy=strategy, max_concurrency=MOST_AT_ONCE)
            actor = options.remote(self._workers, self._trust_me)
            node = SandboxNode(f"node {ray_node.address}", partial(_verdict_of, actor))
            self._actors.append((node, actor))
            self._nodes.append(node)
            start: Future[tuple[int, str]] = actor.begin.remote().future()
            start.add_done_callback(partial(self._put, self._started, node))

    def _put(self, then: Callable[..., None], *values: Any) -> None:
        """Wakes the thread that hands out; called from threads of Ray and of sandboxes, which must not wait."""
        self._events.put(partial(then, *values))

    def _hand_out(self) -> None:
        """Runs events one after the other until None comes, and gives programs to the least busy nodes after each."""
        while (event := self._events.get()) is not None:
            event()
            while self._waiting and (free := [node for node in self._nodes if node.has_room]):
                node = min(free, key=lambda node: node.busy)
                work = self._waiting.popleft()
                if not _begins(work):
                    continue
                self._running.append(work)
                node.running += 1
                node.begin(work).add_done_callback(partial(self._put, self._ended, node, work))

    def _started(self, node: SandboxNode, start: Future[tuple[int, str]]) -> None:
        if error := start.exception():
            self._leave(node, error)
            return
        node.workers, fences_text = start.result()
        log.info("%s runs %d programs at once; %s", node.name, node.workers, fences_text)

    def _ended(self, node: SandboxNode, work: Work, verdict: Future[Verdict]) -> None:
        """Passes on the verdict of a program. After an error of another node, that node is left out and the program
        runs again; an error of this node goes to the caller.
        """
        node.running -= 1
        self._running.remove(work)
        error = verdict.exception()
        if error is None:
            work.verdict.set_result(verdict.result())
        elif node is self._nodes[0]:  # no sandbox here any more: nobody else would do better
            work.verdict.set_exception(error)
        else:
            self._leave(node, error)
            # To the front, since it has waited before.
            self._waiting.appendleft(work)

    def _leave(self, node: SandboxNode, error: BaseException) -> None:
        if node in self._nodes:
            self._nodes.remove(node)
            log.warning("%s runs no programs of models any more: %s", node.name, reason_of(error))


def _begins(work: Work) -> bool:
    """Returns whether a program runs, now or again; False if its caller has cancelled it."""
    return work.verdict.running() or work.verdict.set_running_or_notify_cancel()


def _verdict_of(actor: Any, program: Program, limits: Limits) -> Future[Verdict]:
    return actor.run.remote(program, limits).future()


def sandboxes_of(cluster: RayCluster | None, workers: int, trust_me: bool) -> "SandboxPool | ClusterSandboxes":
    """Sandboxes on every node of a cluster; in this process alone where there is no other node."""
    if cluster is None or len(cluster.nodes()) < 2:
        return SandboxPool(workers, trust_me)
    return ClusterSandboxes(cluster, workers, trust_me)
