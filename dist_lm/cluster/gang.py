"""The ranks of a run, started, watched and ended together: torchrun on every node of a Ray placement group.

Every node must see the run directory. Ranks are numbered by node: rank r runs on node r // ranks_per_node.
"""

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from dist_lm.cluster.agent import Assignment, NodeReport, RankExit
from dist_lm.cluster.failure import SILENT, Crowd, GangFailure, clear_failures, explain
from dist_lm.cluster.hang import Hang, Patience, find_hang
from dist_lm.cluster.heartbeat import Pulse
from dist_lm.cluster.node_usage import NodeUsage
from dist_lm.cluster.ray_errors import first_line
from dist_lm.cluster.recruit import Crew
from dist_lm.storage.run_directory import RunDirectory

log = logging.getLogger(__name__)

ANSWER_S = 1.0  # how long `poll` waits for agents; they answer in milliseconds
SETTLE_S = 3.0  # and once a rank has failed, before silence counts as the loss of a node
LOST_S = 30.0  # an agent that cannot be reached for so long is lost
STOP_GRACE_S = 5.0  # between SIGTERM and SIGKILL
START_S = 60.0  # for all agents to start torchrun
STACKS_S = 30.0  # for all ranks to write their stacks
PATIENCE = Patience(steps=20.0, least_s=120.0, otherwise_s=1800.0)


@dataclass(frozen=True)
class GangStatus:
    """How a gang stands.

    `finished` says only that every rank left with exit code 0: a run that is done also has its result, one
    that was interrupted has not. `stopped`: by a call of `stop` before it was over.
    """

    state: Literal["running", "finished", "failed", "stopped"]
    failure: GangFailure | None = None


class _Member:
    """One node of the gang, as the driver knows it."""

    def __init__(self, agent: Any, host: str) -> None:
        self.agent = agent
        self.host = host
        self.report = NodeReport(None)
        self.reported_at = time.monotonic()
        self.lost: str | None = None  # why, once it is
        self.silent_since: float | None = None  # monotonic seconds; None: it answered last time
        self._question: Any = None

    def ask(self) -> Any:
        """A Ray reference to the node's next report; the one before, if it is still open."""
        if self._question is None:
            self._question = self.agent.poll.remote()
        return self._question

    def take(self, answered: bool) -> None:
        """Take in what became of the question."""
        import ray
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

        reason = SILENT
        if answered:
            question, self._question = self._question, None
            try:
                self.report = cast(NodeReport, ray.get(question))
                self.reported_at, self.silent_since = time.monotonic(), None
                return
            except (ActorDiedError, RayTaskError) as error:
                self.lost = first_line(error)
                return
            except ActorUnavailableError as error:
                reason = first_line(error)
        self.silent_since = self.silent_since or time.monotonic()
        if time.monotonic() - self.silent_since > LOST_S:
            self.lost = f"not reached for {LOST_S:.0f} s: {reason}"

    def pulses(self) -> tuple[Pulse, ...]:
        """What its ranks were last heard doing, as old as that is now."""
        since = time.monotonic() - self.reported_at
        return tuple(replace(pulse, age_s=pulse.age_s + since) for pulse in self.report.pulses)


class Gang:
    """Ranks that live and die together. Use it as a context manager: leaving the block stops it."""

    def __init__(self, run: RunDirectory, crowd: Crowd, crew: Crew, patience: Patience) -> None:
        """See `start`."""
        self._run = run
        self._crowd = crowd
        self._placement = crew.placement
        self._members = [_Member(*member) for member in zip(crew.placement.agents, crew.hosts, strict=True)]
        self._patience = patience
        self._status = GangStatus("running")
        self._stopped = False
        self._seemed_hung = False

    @classmethod
    def start(
        cls,
        crew: Crew,
        run: RunDirectory,
        *,
        ranks_per_node: int,
        device: str = "cpu",
        patience: Patience = PATIENCE,
        module: str = "dist_lm.train",
        arguments: tuple[str, ...] | None = None,
        env: Mapping[str, str] | None = None,
        core_users: int = 0,
        drives_actors: bool = False,
    ) -> "Gang":
        """Start `ranks_per_node` times `python -m module` on every node of a crew, which is the gang's from here on.

        Args:
            device: cpu or cuda; a CUDA rank gets a GPU of its own.
            patience: how long the ranks may be silent.
            arguments: of the module; none: the path of the run directory.
            env: environment variables of the ranks, over those of the nodes (without the nodes' secrets).
            core_users: processes that share the cores of a node, where there are others beside its ranks.
            drives_actors: the first rank is told how to join Ray (`ray_access`).
        """
        import ray
        from ray.exceptions import RayError

        run = RunDirectory(run.path.resolve())
        clear_failures(run)
        agents, addresses = crew.placement.agents, [node.address for node in crew.placement.nodes]
        gang = cls(run, Crowd(crew.hosts, ranks_per_node, device), crew, patience)
        try:
            port = cast(int, ray.get(agents[0].free_port.remote(addresses[0]), timeout=START_S))
            mark = secrets.token_hex(8)
            launched = [
                agent.launch.remote(
                    Assignment(
                        node=node,
                        nodes=len(agents),
                        ranks_per_node=ranks_per_node,
                        module=module,
                        arguments=(str(run.path),) if arguments is None else arguments,
                        master_address=addresses[0],
                        master_port=port,
                        address=addresses[node],
                        device=device,
                        run=run,
                        mark=f"{mark}-{node}",
                        directory=Path.cwd(),
                        environment=dict(env or {}),
                        core_users=core_users,
                        drives_actors=tuple(addresses) if drives_actors else (),
                    )
                )
                for node, agent in enumerate(agents)
            ]
        except RayError as error:
            gang.stop()
            raise GangFailure(0, None, "start", first_line(error), run.node_log(0), host=crew.hosts[0]) from error
        except BaseException:
            gang.stop()
            raise
        gang._await_start(launched)
        return gang

    def poll(self) -> GangStatus:
        """How it stands now, within about a second. The first failure stops the whole gang."""
        if self._status.state != "running":
            return self._status
        self._ask(self._running())
        if any(member.lost or member.report.exit_code for member in self._members):
            self._ask(self._running(), SETTLE_S)  # is one of them the peer that the others miss?
            self._status = GangStatus("failed", self._end(self._explain()))
        elif all(member.report.exit_code == 0 for member in self._members):
            self._status = GangStatus("finished")
        else:
            # seen twice, with an answer of the agents between: this process itself may have stood still
            hang = find_hang(self.pulses(), self._patience)
            if hang and self._seemed_hung:
                self._status = GangStatus("failed", self._end_hang(hang))
            self._seemed_hung = hang is not None
        return self._status

    def pulses(self) -> tuple[Pulse, ...]:
        """What the ranks that run were last heard doing."""
        return tuple(pulse for member in self._running() for pulse in member.pulses())

    def usages(self) -> dict[str, NodeUsage]:
        """How busy the nodes are whose ranks run, by host; a node that has not said yet is not among them."""
        return {member.host: member.report.usage for member in self._running() if member.report.usage}

    def wait(self, on_poll: Callable[[], None] | None = None, interval_s: float = 0.2) -> GangStatus:
        """Poll until it is over.

        Args:
            on_poll: called after every poll while it runs.
        """
        while (status := self.poll()).state == "running":
            if on_poll:
                on_poll()
            time.sleep(interval_s)
        return status

    def interrupt(self) -> None:
        """Ask every rank to write a checkpoint and leave; go on polling to see it happen."""
        self._call(lambda agent: agent.interrupt.remote(), timeout_s=5.0)

    def stop(self) -> None:
        """End everything that was started, now; a second call does nothing.

        Raises:
            RuntimeError: processes are left on a node even after SIGKILL.
        """
        if self._stopped:
            return
        self._stopped = True
        if self._status.state == "running":
            self._status = GangStatus("stopped")
        try:
            left = self._call(lambda agent: agent.stop.remote(STOP_GRACE_S), timeout_s=STOP_GRACE_S + 15.0)
        finally:
            self._placement.release()
        stuck = {self._members[node].host: pids for node, pids in left.items() if pids}
        if stuck:
            raise RuntimeError(f"processes that SIGKILL does not end, by node: {stuck}")

    def __enter__(self) -> "Gang":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.stop()
        except RuntimeError as stuck:  # what came of the run is on disk, whatever the kernel still holds
            log.warning("%s", stuck)

    def _await_start(self, launched: Sequence[Any]) -> None:
        """Wait until every agent has started torchrun.

        Raises:
            GangFailure: one did not; the gang is stopped.
        """
        import ray
        from ray.exceptions import RayError

        try:
            answered, _ = ray.wait(list(launched), num_returns=len(launched), timeout=START_S)
        except BaseException:
            self.stop()
            raise
        failures = []
        for node, reference in enumerate(launched):
            if reference not in answered:
                failures.append((node, f"torchrun not started within {START_S:.0f} s"))
                continue
            try:
                ray.get(reference)
            except RayError as error:
                failures.append((node, first_line(error)))
        if failures:
            node, reason = failures[0]
            host, log_path = self._members[node].host, self._run.node_log(node)
            raise self._end(GangFailure(node, None, "start", reason, log_path, host=host))

    def _running(self) -> list[_Member]:
        return [member for member in self._members if member.lost is None and member.report.exit_code is None]

    def _ask(self, members: list[_Member], timeout_s: float = ANSWER_S) -> None:
        import ray

        if not members:
            return
        questions = [member.ask() for member in members]
        answered, _ = ray.wait(questions, num_returns=len(questions), timeout=timeout_s)
        for member, question in zip(members, questions, strict=True):
            member.take(question in answered)

    def _call(self, ask: Callable[[Any], Any], timeout_s: float) -> dict[int, Any]:
        """Ask all agents that are there; the answers of those that give one in time, by node."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        questions = {ask(member.agent): node for node, member in enumerate(self._members) if not member.lost}
        if not questions:
            return {}
        answered, _ = ray.wait(list(questions), num_returns=len(questions), timeout=timeout_s)
        answers = {}
        for question in answered:
            try:
                answers[questions[question]] = ray.get(question)
            except RayActorError:  # the agent is gone, and what it started with it: the kernel sees to that
                continue
            except RayTaskError as error:
                log.warning("node %s: %s", self._members[questions[question]].host, first_line(error))
        return answers

    def _end(self, failure: GangFailure) -> GangFailure:
        try:
            self.stop()
        except RuntimeError as stuck:
            failure.message = f"{failure.message}; {stuck}"
        return failure

    def _end_hang(self, hang: Hang) -> GangFailure:
        self._call(lambda agent: agent.dump_stacks.remote(), STACKS_S)
        message = f"{hang.message}; the logs of all ranks hold their stacks"
        rank = hang.rank
        if rank is None:
            return self._end(GangFailure(None, None, "hung", message, self._run.logs))
        return self._end(self._crowd.failure_of(rank, "hung", message, self._run.rank_log(rank)))

    def _explain(self) -> GangFailure:
        exits: list[RankExit] = [rank for member in self._members for rank in member.report.exits]
        for member in self._members:
            if member.lost is None and member.silent_since is not None:
                member.lost = SILENT
        lost = {node: member.lost for node, member in enumerate(self._members) if member.lost}
        codes = [member.report.exit_code for member in self._members]
        return explain(self._run, self._crowd, exits, lost, codes)
