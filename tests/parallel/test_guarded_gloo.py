"""Another user of the machine cannot take the place of a rank while gloo connects, nor keep ranks from meeting."""

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from dist_lm.parallel import guarded_gloo
from dist_lm.parallel.guarded_gloo import StrangerError
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh, data_mesh
from tests.parallel.under_attack import GROUPS, RANKS
from tests.patience import patient

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"),
        reason="acts as another user of the machine",
    ),
]
STRANGER = """
import os, socket, sys, time
os.setuid(65534)
connection = socket.socket()
connection.connect(("127.0.0.1", int(sys.argv[1])))
print(flush=True)
time.sleep(600)
"""


@pytest.mark.heavy
def test_ranks_meet_while_another_user_connects_to_all_their_ports(tmp_path):
    """Without the guard, 8 of 20 ranks hung or read the stranger's bytes. It would find a connection that is read
    before its owner is known."""
    own_network = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    done = subprocess.run(
        [*own_network, sys.executable, "-m", "tests.parallel.under_attack", str(tmp_path), "1"],
        capture_output=True,
        text=True,
        timeout=patient(180),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [3.0] * RANKS * GROUPS, done.stderr[-3000:]


def ports_after_a_mesh(world: World) -> tuple[int, list[str]]:
    """Ports of this rank's groups, and what is not as it should be with them."""
    mesh = build_mesh(Layout(1, 2, 1), world.device)
    group = data_mesh(mesh).get_group()
    wrong = []
    addresses = list(guarded_gloo._GUARD.addresses.values())
    for address in addresses:
        with socket.socket() as late:
            late.settimeout(0.2)
            if late.connect_ex(address) == 0:
                wrong.append(f"{address} takes connections")
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    if float(total) != 2:
        wrong.append(f"the sum is {total}")
    return len(addresses), wrong


def test_nobody_connects_once_the_groups_are_there(ranks):
    """It would find a group that was made outside of the guard, or a port that stays open."""
    n_ports, wrong = ranks.run(2, ports_after_a_mesh)
    assert n_ports >= 2
    assert not wrong


def test_owners_of_connections_are_read_from_the_kernels_table():
    """It would find an address that is written in another order of bytes, and a socket of a process that has left."""
    for family, host in (socket.AF_INET, "127.0.0.2"), (socket.AF_INET6, "::1"):
        with socket.socket(family) as server:
            server.bind((host, 0))
            server.listen()
            with socket.create_connection(server.getsockname()[:2]) as client:
                connection, there = server.accept()
                with connection:
                    ends = (guarded_gloo._in_table(there), guarded_gloo._in_table(connection.getsockname()))
                    assert guarded_gloo._owners()[ends] == os.geteuid()
                    assert guarded_gloo._is_of_this_machine(there)
                    client.send(b"unread")
                    client.close()
                    assert ends not in guarded_gloo._owners()
    assert not guarded_gloo._is_of_this_machine(("192.0.2.1", 1))


def test_a_look_at_many_connections_reads_the_kernels_table_once(monkeypatch):
    """It would find a start that grows with the square of the ranks: the table has a line for each connection."""
    read_owners, n_reads = guarded_gloo._owners, 0

    def counted() -> dict:
        nonlocal n_reads
        n_reads += 1
        return read_owners()

    monkeypatch.setattr(guarded_gloo, "_owners", counted)
    with ExitStack() as sockets:
        server = sockets.enter_context(socket.create_server(("127.0.0.1", 0)))
        guard = guarded_gloo._Connections(addresses={os.fstat(server.fileno()).st_ino: server.getsockname()})
        guard._filter(guarded_gloo.DROP_DATA)
        for _ in range(20):
            sockets.enter_context(socket.create_connection(server.getsockname()))
            sockets.enter_context(server.accept()[0])
        guard._look()
    assert len(guard.judged) == 20
    assert n_reads == 1


def test_the_buffer_for_a_filter_holds_the_longest_one():
    """It would find a buffer that the kernel writes behind, into memory of others: it counts in instructions."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for program in (guarded_gloo.DROP_ALL, guarded_gloo.DROP_DATA):
            guarded_gloo._attach(server, program)
            size = guarded_gloo.FILTER_BYTES
            n_instructions = len(server.getsockopt(socket.SOL_SOCKET, guarded_gloo.GET_FILTER, size))
            assert n_instructions == len(program)
            assert n_instructions * guarded_gloo.ctypes.sizeof(guarded_gloo._Instruction) <= size


def test_blocks_of_two_threads_may_overlap():
    """It would find a block that is no longer guarded once another thread's has ended, and one that leaves its guard
    behind."""
    plain = distributed_c10d.ProcessGroupGloo
    first, second = guarded_gloo.guarded(), guarded_gloo.guarded()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert distributed_c10d.ProcessGroupGloo is guarded_gloo.GuardedGloo
    second.__exit__(None, None, None)
    assert distributed_c10d.ProcessGroupGloo is plain


def test_a_stranger_at_another_port_is_not_forgotten_with_a_port_that_is_left(monkeypatch, tmp_path):
    """It would find a rank that tries another port, and with it drops what is known of the ports of other groups."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    strangers = guarded_gloo._GUARD.strangers
    strangers["127.0.0.1", 1] = "user 65534 has connected"
    with pytest.raises(StrangerError, match="user 65534 has connected"):
        guarded_gloo.GuardedGloo(dist.FileStore(str(tmp_path / "store")), 0, 1, guarded_gloo.timedelta(seconds=5))
    assert not guarded_gloo._GUARD.strangers


def test_a_stranger_who_was_faster_than_the_guard_is_refused_and_the_port_left(monkeypatch, tmp_path):
    """It would find a port that stays in use although someone may speak for a rank there."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    strangers: list[subprocess.Popen] = []
    create = dist.ProcessGroupGloo.create_device
    monkeypatch.setattr(guarded_gloo, "N_PORTS", 3)

    def beaten(interface: str) -> dist.ProcessGroupGloo.Device:
        """A device to which user 65534 connects before the filter is there."""
        before = set(guarded_gloo._descriptors())
        device = create(interface=interface)
        [port] = {
            found.getsockname()[1]
            for _, found in guarded_gloo._tcp_sockets(before)
            if guarded_gloo._is_listening(found)
        }
        stranger = subprocess.Popen([sys.executable, "-S", "-c", STRANGER, str(port)], stdout=subprocess.PIPE)
        assert stranger.stdout
        stranger.stdout.readline()
        strangers.append(stranger)
        return device

    try:
        monkeypatch.setattr(guarded_gloo.dist.ProcessGroupGloo, "create_device", staticmethod(beaten))
        with pytest.raises(StrangerError, match="another user of this machine has connected to 3 ports"):
            guarded_gloo.GuardedGloo(dist.FileStore(str(tmp_path / "store")), 0, 1, guarded_gloo.timedelta(seconds=5))
        assert len(strangers) == 3
    finally:
        for stranger in strangers:
            stranger.kill()
            stranger.communicate()
