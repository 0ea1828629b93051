"""The key-value store of a run, in which ranks meet before they have a process group.

On one machine it is a file in a folder that only the user of the run can enter. torch's TCPStore listens on all
addresses and asks nobody for a token: another user of the machine could write its keys, and with them have a rank
connect to a socket of his. Ranks on several nodes have no file in common and use the TCPStore of torchrun; under the
launcher it listens on the address of the first node alone. Whoever reaches that address can write its keys.

Having met, ranks connect. Connections grow with the ranks. Each takes one of the files that a process may have open.
"""

import os
import resource
import socket
import stat
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lm.errors import ConfigError
from dist_lm.parallel.layout import Layout

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters

VARIABLE = "DIST_LM_STORE"  # environment variable of a rank: file of the store, in a folder of mode 0700
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun's own: FOLDER/attempt_N/LOCAL_RANK/error.json
BACKEND = "private"  # a name for `torchrun --rdzv-backend`, on one node
NODES_BACKEND = "address"  # the same, on several
OTHER_FILES = 512  # tars, logs and pipes of a process, with room to spare
STORES_OF_RANK = 4  # connections of a rank to the store: one until the run is prepared, one of its groups, and room


def store_of_ranks(timeout_s: float, environ: Mapping[str, str] = os.environ) -> "Store":
    """Returns the store of the ranks that torchrun, or a program of ours, has started with this one.

    Args:
        timeout_s: longest wait of a call for a key.

    Raises:
        ConfigError: other users can enter the folder of the store.
    """
    from torch.distributed import FileStore, rendezvous

    timeout = timedelta(seconds=timeout_s)
    file = store_file(environ)
    if file is None:
        store, _, _ = next(iter(rendezvous("env://", timeout=timeout)))
        return store

    # Without a number of workers the file outlives each object, as a rank opens several, one after the other.
    store = FileStore(str(file))
    store.set_timeout(timeout)
    return store


def store_file(environ: Mapping[str, str]) -> Path | None:
    """Returns the file in which the ranks of one machine meet; None if only a TCPStore can join the ranks: on several
    nodes, or if neither torchrun nor a program of ours has started them.

    Raises:
        ConfigError: other users can enter its folder.
    """
    if VARIABLE in environ:
        file = Path(environ[VARIABLE])
        private = file.parent
    elif environ.get(ERROR_FILE) and environ["LOCAL_WORLD_SIZE"] == environ["WORLD_SIZE"]:
        # torchrun makes a folder of its own for each start and each restart of the ranks of a node.
        attempt = Path(environ[ERROR_FILE]).parent.parent
        file, private = attempt / "store", attempt.parent
    else:
        return None

    status = private.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(
            f"{private}: mode {stat.S_IMODE(status.st_mode):04o}, user {status.st_uid}: expected a folder of this user "
            "with mode 0700, as who enters it can speak for a rank: give torchrun another --log-dir"
        )
    return file


@cache
def private_handler() -> "type[RendezvousHandler]":
    """Returns the handler of `torchrun --rdzv-backend private`, which opens no port: for one node alone.

    It is the entry point of the group `torchrun.handlers`, whose result torchrun calls with its parameters. That call
    raises ValueError for more than one node.
    """
    # Imported here because torchrun's own modules take a second, and ranks need none of them.
    from torch.distributed import HashStore
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

    class PrivateRendezvous(RendezvousHandler):
        """Gives the ranks of one node a file to meet in, and torchrun itself a store in its own memory."""

        def __init__(self, parameters: "RendezvousParameters") -> None:
            if parameters.max_nodes != 1:
                raise ValueError(f"--nnodes {parameters.max_nodes}: expected 1 with --rdzv-backend {BACKEND}")
            self._run_id = parameters.run_id
            self._folder = tempfile.TemporaryDirectory(prefix="dlm-store-")  # mode 0700
            self._n_starts = 0

        def get_backend(self) -> str:
            return BACKEND

        def get_run_id(self) -> str:
            return self._run_id

        def next_rendezvous(self) -> RendezvousInfo:
            # Ranks that are started again must not read what the ranks before them have written.
            os.environ[VARIABLE] = str(Path(self._folder.name) / f"store_{self._n_starts}")
            self._n_starts += 1
            # Port 0: whatever would meet through MASTER_ADDR and MASTER_PORT fails at once.
            return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

        def num_nodes_waiting(self) -> int:
            return 0

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            """Does nothing: no other node waits."""

        def shutdown(self) -> bool:
            self._folder.cleanup()
            return True

    return PrivateRendezvous


@cache
def address_handler() -> "Callable[[RendezvousParameters], RendezvousHandler]":
    """Returns the handler of `torchrun --rdzv-backend address --rdzv-endpoint IP:PORT --rdzv-conf rank=NODE`: torch's
    static rendezvous, but its store listens on that IP address of the first node and on no other.

    It is an entry point, too (`private_handler`).
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousInfo
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous, create_rdzv_handler

    class AddressRendezvous(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return NODES_BACKEND

        def next_rendezvous(self) -> RendezvousInfo:
            if self.rank == 0 and self._store is None:
                # The store closes the descriptor. It takes no address, so it gets a socket that has one.
                family = socket.AF_INET6 if ":" in self.master_addr else socket.AF_INET
                with socket.socket(family) as server:
                    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    server.bind((self.master_addr, self.master_port))
                    server.listen(socket.SOMAXCONN)

                    self._store = TCPStore(
                        self.master_addr,
                        self.master_port,
                        self.world_size,
                        is_master=True,
                        timeout=self.timeout,
                        multi_tenant=True,
                        master_listen_fd=server.detach(),
                    )
            return super().next_rendezvous()

    def create(parameters: "RendezvousParameters") -> AddressRendezvous:
        static = create_rdzv_handler(parameters)
        assert isinstance(static, StaticTCPRendezvous)
        timeout_s = int(static.timeout.total_seconds())
        place = (static.master_addr, static.master_port)
        # A text, as it comes from the command line.
        rank = int(static.rank)
        return AddressRendezvous(*place, rank, static.world_size, static.run_id, timeout_s)

    return create


# --- connections ---


def connections_of(layout: Layout) -> int:
    """Returns how many connections of gloo a rank has: gloo connects every two ranks of a group. On GPUs it has them
    beside those of NCCL."""
    n_ranks = layout.world_size
    sizes = [layout.dp, layout.dp_replicate, layout.shards, layout.tp]
    if layout.cp > 1:
        sizes += [layout.dp_shard, layout.cp]
    # An axis of all ranks uses the first group. Saving of checkpoints has a group of its own, in a thread.
    of_axes = sum(size - 1 for size in sizes if size < n_ranks)
    return 2 * (n_ranks - 1) + of_axes


def allow_connections(layout: Layout) -> None:
    """Raises the limit of open files of this rank if its connections need that.

    Raises:
        ConfigError: the limit may not be raised that far.
    """
    _allow(connections_of(layout) + OTHER_FILES, f"a rank of {layout.world_size:,}")


def allow_store(n_ranks: int) -> None:
    """Raises the limit of open files of this process, and of torchrun that it starts and that holds the store of
    `n_ranks` ranks, if that is needed.

    Raises:
        ConfigError: the limit may not be raised that far.
    """
    _allow(STORES_OF_RANK * n_ranks + OTHER_FILES, f"the store of {n_ranks:,} ranks")


def _allow(needed: int, whose: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"open files of {whose}: at most {hard:,} here, expected {needed:,} for its connections: raise the hard "
            "limit on all nodes (ulimit -Hn; LimitNOFILE= of slurmd)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
