"""A gang: the ranks of a run, started, watched and ended together by torchrun on each node of a placement group.

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
from dist_lm.cluster.events import SILENT, Crowd, GangFailure, clear_failures, explain
from dist_lm.cluster.flight_recorder import waited_for
from dist_lm.cluster.heartbeat import Hang, Patience, Pulse, find_hang
from dist_lm.cluster.node_facts import NodeUsage
from dist_lm.cluster.ray_cluster import reason_of
from dist_lm.cluster.recruit import Crew
from dist_lm.storage.run_directory import RunDirectory

log = logging.getLogger(__name__)

ANSWER_S = 1.0  # wait of `poll` for the agents, which answer in milliseconds
SETTLE_S = 3.0  # the same after a failure, before a silent node counts as lost
LOST_S = 30.0  # an agent that is unreachable for this long is lost
STOP_GRACE_S = 5.0  # between SIGTERM and SIGKILL
STOP_S = 15.0  # beyond it, for the agents to say that nothing is left
START_S = 60.0  # for all agents to start torchrun
DUMP_S = 30.0  # for all ranks to write their stacks and collectives
PATIENCE = Patience(steps=20.0, least_s=120.0, otherwise_s=1800.0)


@dataclass(frozen=True)
class GangStatus:
    """State of a gang.

    `finished` means only that every rank left with exit code 0: a completed run has a result file, an interrupted one
    has none. `stopped`: `stop` was called before the end.
    """

    state: Literal["running", "finished", "failed", "stopped"]
    failure: GangFailure | None = None


class _Member:
    """The driver's view of one node of the gang."""

    def __init__(self, agent: Any, host: str) -> None:
        self.agent = agent
        self.host = host
        self.report = NodeReport(None)
        self.reported_at = time.monotonic()
        self.lost: str | None = None  # the reason, once the node is lost
        self.silent_since: float | None = None  # monotonic seconds; None: the last question was answered
        self._question: Any = None

    def ask(self) -> Any:
        """Returns a Ray reference to the node's next report, or to the one that is still open."""
        if self._question is None:
            self._question = self.agent.poll.remote()
        return self._question

    def take(self, answered: bool) -> None:
        """Records the answer to the question, or its absence. A node without an answer for `LOST_S` counts as lost, one
        whose agent has failed or is gone at once.
        """
        import ray
        from ray.exceptions import ActorUnavailableError, RayError

        reason = SILENT
        if answered:
            question, self._question = self._question, None
            try:
                self.report = cast(NodeReport, ray.get(question))
                self.reported_at, self.silent_since = time.monotonic(), None
                return
            except ActorUnavailableError as error:
                reason = reason_of(error)
            except RayError as error:  # the agent failed or is gone, as after OutOfMemoryError or NodeDiedError
                self.lost = reason_of(error)
                return
        self.silent_since = self.silent_since or time.monotonic()
        if time.monotonic() - self.silent_since > LOST_S:
            self.lost = f"not reached for {LOST_S:.0f} s: {reason}"

    def pulses(self) -> tuple[Pulse, ...]:
        """Returns the last heartbeats of its ranks, with their present age."""
        since = time.monotonic() - self.reported_at
        return tuple(replace(pulse, age_s=pulse.age_s + since) for pulse in self.report.pulses)


class Gang:
    """Ranks that live and die together. As a context manager it stops them at the end of the block."""

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
        """Starts `ranks_per_node` times `python -m module` on every node of a crew, which now belongs to the gang.

        Records of earlier failures in the run directory are removed.

        Args:
            device: cpu or cuda; a CUDA rank gets a GPU of its own.
            patience: longest silence of the ranks.
            arguments: arguments of the module; None: the path of the run directory.
            env: environment variables of the ranks; override those of the nodes (without the nodes' secrets).
            core_users: processes that share the cores of a node, if there are others beside its ranks; 0: none.
            drives_actors: let rank 0 join Ray (`ray_cluster.RayAccess`).

        Raises:
            GangFailure: torchrun did not start on a node; the gang is stopped.
            RuntimeError: another exception stopped the gang, and processes remain even after SIGKILL. Otherwise that
                exception passes, such as KeyboardInterrupt, with the gang stopped.
        """
        import ray
        from ray.exceptions import RayError

        run = RunDirectory(run.path.resolve())
        if arguments is None:
            arguments = (str(run.path),)
        # Records of the attempt before would be taken for the cause of the next failure.
        clear_failures(run)
        agents = crew.placement.agents
        addresses = [node.address for node in crew.placement.nodes]
        gang = cls(run, Crowd(crew.hosts, ranks_per_node, device), crew, patience)
        try:
            # Ranks of one node need no port.
            port = 0
            if len(agents) > 1:
                # The first node keeps the port of the rendezvous free until its torchrun listens there.
                port = cast(int, ray.get(agents[0].reserve_port.remote(), timeout=START_S))
            mark = secrets.token_hex(8)
            launched = [
                agent.launch.remote(
                    Assignment(
                        node=node,
                        nodes=len(agents),
                        ranks_per_node=ranks_per_node,
                        module=module,
                        arguments=arguments,
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
            raise gang._end(gang._not_started(0, reason_of(error))) from error
        except BaseException:
            gang.stop()
            raise
        gang._await_start(launched)
        return gang

    def poll(self) -> GangStatus:
        """Returns the present state, within about a second; a failure is in the status and not raised. The first one
        stops the whole gang, which takes longer. After the end the same status is returned again.

        A hang counts as a failure once two polls in a row show it; then all ranks write their stacks.

        Raises:
            ArtefactError: in a hang, a file of collectives is damaged.
        """
        if self._status.state != "running":
            return self._status
        self._ask(self._running())

        if any(member.lost or member.report.exit_code for member in self._members):
            # Another node may be the cause: give it time to answer.
            self._ask(self._running(), SETTLE_S)
            self._status = GangStatus("failed", self._end(self._explain()))
        elif all(member.report.exit_code == 0 for member in self._members):
            self._status = GangStatus("finished")
        else:
            # two polls in a row, with answers of the agents in between: this process itself may have been suspended
            hang = find_hang(self.pulses(), self._patience)
            if hang and self._seemed_hung:
                self._status = GangStatus("failed", self._end_hang(hang))
            self._seemed_hung = hang is not None
        return self._status

    def pulses(self) -> tuple[Pulse, ...]:
        """Returns the last heartbeats of the running ranks."""
        return tuple(pulse for member in self._running() for pulse in member.pulses())

    def usages(self) -> dict[str, NodeUsage]:
        """Returns the usage of the nodes with running ranks, by host; nodes without a measurement are missing."""
        return {member.host: member.report.usage for member in self._running() if member.report.usage}

    def interrupt(self) -> None:
        """Asks every rank to write a checkpoint and leave; the caller polls until they have left."""
        self._call(lambda agent: agent.interrupt.remote(), timeout_s=5.0)

    def stop(self) -> None:
        """Ends everything that was started and frees the nodes; a second call does nothing. A gang that was running has
        the state `stopped` from now on.

        Raises:
            RuntimeError: processes remain on a node even after SIGKILL.
        """
        if self._stopped:
            return
        self._stopped = True
        if self._status.state == "running":
            self._status = GangStatus("stopped")
        # The nodes are freed even if an agent does not answer.
        try:
            pids_left = self._call(lambda agent: agent.stop.remote(STOP_GRACE_S), timeout_s=STOP_GRACE_S + STOP_S)
        finally:
            self._placement.release()
        stuck = {self._members[node].host: pids for node, pids in pids_left.items() if pids}
        if stuck:
            raise RuntimeError(f"processes that SIGKILL does not end, by node: {stuck}")

    def __enter__(self) -> "Gang":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.stop()
        except RuntimeError as stuck:  # the run's results are on disk all the same
            log.warning("%s", stuck)

    def _await_start(self, launched: Sequence[Any]) -> None:
        """Waits until torchrun runs on all nodes.

        Raises:
            GangFailure: it did not start on a node within `START_S`; the gang is stopped.
        """
        import ray
        from ray.exceptions import RayError

        try:
            answered, _ = ray.wait(list(launched), num_returns=len(launched), timeout=START_S)
        except BaseException:
            self.stop()
            raise
        for node, reference in enumerate(launched):
            if reference not in answered:
                raise self._end(self._not_started(node, f"torchrun did not start within {START_S:.0f} s"))
            try:
                ray.get(reference)
            except RayError as error:
                raise self._end(self._not_started(node, reason_of(error))) from error

    def _not_started(self, node: int, reason: str) -> GangFailure:
        return GangFailure(node, None, "start", reason, self._run.node_log(node), host=self._members[node].host)

    def _running(self) -> list[_Member]:
        return [member for member in self._members if member.lost is None and member.report.exit_code is None]

    def _ask(self, members: list[_Member], timeout_s: float = ANSWER_S) -> None:
        """Asks the agents for their reports and waits up to `timeout_s` seconds; each member records its answer
        or its silence."""
        import ray

        if not members:
            return
        questions = [member.ask() for member in members]
        answered, _ = ray.wait(questions, num_returns=len(questions), timeout=timeout_s)
        for member, question in zip(members, questions, strict=True):
            member.take(question in answered)

    def _call(self, ask: Callable[[Any], Any], timeout_s: float) -> dict[int, Any]:
        """Asks the agents of all nodes that are not lost; returns the answers within `timeout_s` seconds, by node.

        Nodes that give none are left out; errors of agents are logged.
        """
        import ray
        from ray.exceptions import RayActorError, RayError

        questions = {ask(member.agent): node for node, member in enumerate(self._members) if not member.lost}
        if not questions:
            return {}
        # One silent node must not keep the answers of the others.
        answered, _ = ray.wait(list(questions), num_returns=len(questions), timeout=timeout_s)
        answers = {}
        for question in answered:
            try:
                answers[questions[question]] = ray.get(question)
            except RayActorError:  # the agent is gone, and the kernel has ended its processes
                continue
            except RayError as error:
                log.warning("node %s: %s", self._members[questions[question]].host, reason_of(error))
        return answers

    def _end(self, failure: GangFailure) -> GangFailure:
        try:
            self.stop()
        except RuntimeError as stuck:
            failure.message = f"{failure.message}; {stuck}"
        return failure

    def _end_hang(self, hang: Hang) -> GangFailure:
        """Has all ranks write their stacks and last collectives, stops the gang, and returns the failure. Its message
        says which ranks the others wait for, if the files show it. Files of an earlier hang are removed.

        Raises:
            ArtefactError: a file of collectives is damaged.
        """
        files = {pulse.rank: self._run.collectives(pulse.rank) for pulse in self.pulses()}
        for file in files.values():
            # An earlier hang may have left it.
            file.unlink(missing_ok=True)
        self._call(lambda agent: agent.dump_hang.remote(), DUMP_S)
        reasons = [hang.message, waited_for(files), "logs/ holds the stacks and last collectives of all ranks"]
        message = "; ".join(filter(None, reasons))
        if hang.rank is None:
            return self._end(GangFailure(None, None, "hung", message, self._run.logs))
        return self._end(self._crowd.failure_of(hang.rank, "hung", message, self._run.rank_log(hang.rank)))

    def _explain(self) -> GangFailure:
        """Returns the failure of the gang. A node that has not answered even now counts as lost."""
        # All nodes had `SETTLE_S` to answer: the failure that the others follow from may be that of a silent one.
        exits: list[RankExit] = [rank for member in self._members for rank in member.report.exits]
        for member in self._members:
            if member.lost is None and member.silent_since is not None:
                member.lost = SILENT
        lost = {node: member.lost for node, member in enumerate(self._members) if member.lost}
        codes = [member.report.exit_code for member in self._members]
        return explain(self._run, self._crowd, exits, lost, codes)
