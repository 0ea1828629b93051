"""The environment of the ranks."""

import socket
from pathlib import Path

from dist_lm.cluster.torchrun import CPU_ALLOCATOR, complete_environment, interface_towards, rank_environment
from dist_lm.storage import process


def environment_of(environ: dict[str, str], **given: str) -> dict[str, str]:
    return rank_environment(
        environ, mark="m", logs=Path("logs"), device="cpu", cores_per_rank=2, interface="lo", overrides=given
    )


def test_what_a_user_has_set_for_threads_and_messages_stands():
    ours = environment_of({})
    assert ours["GOMP_SPINCOUNT"] == "30000"
    assert ours["GLOO_SOCKET_IFNAME"] == "lo"
    theirs = environment_of({"GOMP_SPINCOUNT": "7", "GLOO_SOCKET_IFNAME": "eth3"})
    assert (theirs["GOMP_SPINCOUNT"], theirs["GLOO_SOCKET_IFNAME"]) == ("7", "eth3")


def test_the_number_of_threads_is_ours_and_a_run_has_the_last_word():
    assert environment_of({"OMP_NUM_THREADS": "1"})["OMP_NUM_THREADS"] == "2"  # Ray's, for the agent
    assert environment_of({}, OMP_NUM_THREADS="5")["OMP_NUM_THREADS"] == "5"


def test_secrets_stay_behind():
    assert "WANDB_API_KEY" not in environment_of({"WANDB_API_KEY": "k" * 40})


TORCHRUN = {"LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "7"}


def test_a_rank_without_an_agent_gets_the_environment_that_an_agent_gives(monkeypatch):
    monkeypatch.setattr(process, "cores", lambda: 8)
    completed = complete_environment(TORCHRUN | {"LOCAL_WORLD_SIZE": "2"})
    assert completed is not None
    assert completed["OMP_NUM_THREADS"] == "4"  # the sums of matrix products depend on it
    assert completed["GLOO_SOCKET_IFNAME"] == "lo"
    launched = environment_of({})
    assert {name: completed[name] for name in CPU_ALLOCATOR} == {name: launched[name] for name in CPU_ALLOCATOR}
    assert complete_environment(completed) is None


def test_a_rank_without_an_agent_still_knows_the_secrets_that_a_configuration_must_not_hold():
    completed = complete_environment(TORCHRUN | {"WANDB_API_KEY": "k" * 40})
    assert completed is not None
    assert completed["WANDB_API_KEY"] == "k" * 40


def test_the_interface_is_the_one_that_reaches_the_first_node():
    assert interface_towards("127.0.0.1") == interface_towards("localhost") == "lo"
    # a name that leads to this machine's loopback leads elsewhere on other nodes
    assert interface_towards(socket.gethostname()) != "lo"
    assert interface_towards("no.such.host.invalid") is None
