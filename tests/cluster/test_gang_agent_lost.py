"""An agent that Ray ended is a lost node, whatever Ray calls it; the launcher restarts after a lost node."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import exceptions

from dist_lm.cluster.agent import NodeReport
from dist_lm.cluster.events import NODE_LOST, Crowd
from dist_lm.cluster.gang import PATIENCE, Gang
from dist_lm.cluster.recruit import Crew
from dist_lm.storage.run_directory import RunDirectory

RAYS_TEXT = "Task was killed due to the node running low on memory. " + "Memory on the node was 0.98 of it. " * 40
ENDED = [
    exceptions.OutOfMemoryError(f"{RAYS_TEXT}\nTop 10 memory users:\nPID MEM(GB) COMMAND\n1 7.1 python"),
    exceptions.NodeDiedError("the node is dead"),
    exceptions.WorkerCrashedError(),
    exceptions.LocalRayletDiedError(),
    exceptions.RaySystemError("the raylet is gone"),
    exceptions.ActorDiedError(),
    exceptions.ActorPlacementGroupRemoved(),
    exceptions.OwnerDiedError("0" * 56, None, ""),
]


class Agent:
    """Answers a question with a report, or with an exception of Ray."""

    def __init__(self, report: Any) -> None:
        self.poll = SimpleNamespace(remote=lambda: report)
        nothing_left = report if isinstance(report, Exception) else []
        self.stop = SimpleNamespace(remote=lambda grace_s: Answer(nothing_left))


@dataclass(eq=False)
class Answer:
    value: Any


def get(question: Any) -> Any:
    value = question.value if isinstance(question, Answer) else question
    if isinstance(value, Exception):
        raise value
    return value


@pytest.fixture
def gang_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that makes a gang with an agent for each answer."""
    import ray

    monkeypatch.setattr(ray, "wait", lambda questions, **options: (list(questions), []))
    monkeypatch.setattr(ray, "get", get)

    def make(*answers: Any) -> Gang:
        hosts = tuple(f"host{node}" for node in range(len(answers)))
        placement: Any = SimpleNamespace(agents=[Agent(answer) for answer in answers], release=lambda: None)
        run = RunDirectory(tmp_path)
        return Gang(run, Crowd(hosts, 1), Crew(placement, hosts, ()), PATIENCE)

    return make


@pytest.mark.parametrize("error", ENDED, ids=lambda error: type(error).__name__)
def test_an_agent_that_ray_ended_is_a_lost_node(gang_of, error):
    status = gang_of(NodeReport(None), error).poll()
    assert status.state == "failed"
    assert status.failure is not None
    assert (status.failure.type, status.failure.node) == (NODE_LOST, 1)
    assert len(str(status.failure).splitlines()) == 1
    assert len(status.failure.message) <= 300


def test_an_error_of_an_agents_own_code_is_named(gang_of):
    said = 'ray::NodeAgent.poll() (pid=7, ip=10.0.0.2)\n  File "agent.py", line 1, in poll\nOSError: disk is gone'
    error = exceptions.RayTaskError("NodeAgent.poll", said, OSError("disk is gone"))
    failure = gang_of(NodeReport(None), error).poll().failure
    assert failure is not None
    assert failure.message.endswith("OSError: disk is gone")


def test_an_agent_out_of_reach_is_asked_again(gang_of):
    assert gang_of(NodeReport(None), exceptions.ActorUnavailableError("busy", None)).poll().state == "running"


@pytest.mark.parametrize("error", ENDED, ids=lambda error: type(error).__name__)
def test_a_gang_stops_although_an_agent_is_gone(gang_of, error):
    gang_of(NodeReport(None), error).stop()
