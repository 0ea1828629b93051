"""Trial work of every GPU of a node before ranks start: matrix products with known results, and an all-reduce.

`python -m dist_lm.cluster.gpu_probe PARENT DEVICE` is the process of one GPU (LOCAL_RANK). It reads requests, one JSON
object a line, from standard input and writes one answer for each:

    {"do": "burn", "seconds": S}                                             -> {"fault": TEXT, empty if it is fine}
    {"do": "all_reduce", "rank": R, "world": W, "address": A, "port": P}     -> {"wrong": [rank, ...]}
    {"do": "all_reduce", "rank": R, "world": W, "store": FILE}               -> the same, inside one node

`Probes` is the side of the agent, which kills a process that does not answer. On a CPU the same functions run small.
"""

import json
import os
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lm.cluster.torchrun import interface_of, rank_environment
from dist_lm.storage.process import die_with_parent

if TYPE_CHECKING:
    import torch

SIZE = {"cuda": 4096, "cpu": 64}  # rows and columns of the matrices
SUMMED = {"cuda": 1 << 24, "cpu": 1 << 10}  # numbers of an all-reduce
AT_ONCE = 16  # products between two looks at the clock
LOOK_S = 0.2
START_S = 120.0  # for a process to import, perhaps from a busy network file system, and to make a CUDA context


class Probes:
    """The processes of one node, one a GPU."""

    def __init__(self, device: str, count: int, address: str) -> None:
        """Starts the processes, without waiting for them; `close` ends them.

        Args:
            device: cpu or cuda.
            count: number of processes, one for each GPU.
            address: this node's, by which the others reach it.
        """
        self.count = count
        self._stores = tempfile.TemporaryDirectory(prefix="dlm-store-")  # mode 0700
        self._n_stores = 0

        # The same environment as that of ranks, so that a trial shows what ranks will meet.
        environment = rank_environment(
            os.environ,
            mark=f"probe-{secrets.token_hex(8)}",
            logs=Path(tempfile.gettempdir()),
            device=device,
            cores_per_rank=1,
            interface=interface_of(address),
            overrides={},
        )

        self._errors = [tempfile.TemporaryFile() for _ in range(count)]  # noqa: SIM115  closed by `close`
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "dist_lm.cluster.gpu_probe", str(os.getpid()), device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment | {"LOCAL_RANK": str(local)},
                start_new_session=True,
            )
            for local, errors in enumerate(self._errors)
        ]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def ask(
        self, requests: Sequence[Mapping[str, Any]], timeout_s: float, meanwhile: Callable[[], None] = lambda: None
    ) -> list[dict[str, Any] | str]:
        """Returns the answer of each process, or a text that says why it gave none.

        Args:
            requests: one a process.
            timeout_s: for all processes together.
            meanwhile: called a few times a second.
        """
        deadline = time.monotonic() + timeout_s
        answers: dict[int, dict[str, Any] | str] = {}
        text = [b""] * len(requests)
        with selectors.DefaultSelector() as waiting:
            for local, (process, request) in enumerate(zip(self._processes, requests, strict=True)):
                assert process.stdin is not None
                assert process.stdout is not None
                # It has ended, which the read notices.
                with suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(request).encode() + b"\n")
                    process.stdin.flush()
                waiting.register(process.stdout.fileno(), selectors.EVENT_READ, local)

            while len(answers) < len(requests) and (seconds_left := deadline - time.monotonic()) > 0:
                for key, _ in waiting.select(min(seconds_left, LOOK_S)):
                    local, received = key.data, os.read(key.fd, 1 << 16)
                    text[local] += received
                    if not received or text[local].endswith(b"\n"):
                        waiting.unregister(key.fd)
                        answers[local] = json.loads(text[local]) if received else self._end_of(local)
                meanwhile()
        return [answers.get(local, f"no answer within {timeout_s:g} s") for local in range(len(requests))]

    def new_store(self) -> str:
        """Returns the path of a file that is not there yet, in which the processes meet and which only this user can
        reach."""
        self._n_stores += 1
        return str(Path(self._stores.name) / f"store_{self._n_stores}")

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
        for process, errors in zip(self._processes, self._errors, strict=True):
            process.wait()
            for pipe in (process.stdin, process.stdout, errors):
                with suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]
        self._stores.cleanup()

    def _end_of(self, local: int) -> str:
        """Returns why a process has ended: the last line of its standard error."""
        code, errors = self._processes[local].wait(), self._errors[local]
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"its process ended with exit code {code}"


def burn(
    device: "torch.device", seconds: float, size: int, multiply: "Callable[[Any, Any], torch.Tensor] | None" = None
) -> str:
    """Multiplies bf16 matrices of small whole numbers, whose products are exact; returns what is wrong, or an empty
    text.

    A product C = A B is checked through C v = A (B v), with v of 1 and -1, computed once on the host: a single wrong
    entry changes it.

    Args:
        seconds: at least one round of products runs, whatever this is.
        size: rows and columns of the matrices.
        multiply: the product to try; None: `torch.matmul`.
    """
    import torch

    random = torch.Generator().manual_seed(0)

    # Mostly 0, else 1 or -1: sums stay below 256, and bf16 holds them exactly.
    def numbers() -> torch.Tensor:
        uniform = torch.randint(0, 8, (size, size), generator=random)
        return (uniform == 0).float() - (uniform == 1).float()

    a, b = numbers(), numbers()
    v = torch.randint(0, 2, (size,), generator=random).float() * 2 - 1
    expected = (a.double() @ (b.double() @ v.double())).float().to(device)
    a, b, v = a.to(device, torch.bfloat16), b.to(device, torch.bfloat16), v.to(device)

    # Wrong products are counted on the device: a look at each of them would keep it waiting.
    n_products = 0
    n_wrong = torch.zeros((), dtype=torch.int64, device=device)
    deadline = time.monotonic() + seconds
    while True:
        for _ in range(AT_ONCE):
            n_wrong += ((multiply or torch.matmul)(a, b).float() @ v != expected).any()
        n_products += AT_ONCE
        wrong = int(n_wrong)  # waits for the device
        if wrong:
            return f"{wrong} of {n_products} matrix products are wrong"
        if time.monotonic() >= deadline:
            return ""


def all_reduce(device: "torch.device", rank: int, world: int, total: int) -> list[int]:
    """Sums a tensor over the ranks, in which each has written its own part; returns the ranks whose part is wrong here.

    It is collective over the default process group.

    Args:
        total: numbers in the tensor.
    """
    import torch
    import torch.distributed as dist

    # Every part has numbers of its own, so that a wrong sum tells whose part it is.
    size = max(1, total // world)
    parts = torch.zeros(world, size, device=device)
    expected = torch.arange(size, device=device) % 1021 + torch.arange(world, device=device)[:, None]
    parts[rank] = expected[rank].float()
    dist.all_reduce(parts)
    return (parts != expected).any(dim=1).nonzero().flatten().tolist()


def named_by(wrong: Mapping[int, Sequence[int]]) -> dict[int, str]:
    """Returns what is wrong with each rank to blame: its part is wrong on most ranks, or it sees parts wrong that
    others see right.

    Args:
        wrong: answers of `all_reduce` by rank.
    """
    # A part that most ranks see wrong was sent wrong; one that few see wrong was received wrong.
    witnesses_of = {owner: [rank for rank, owners in wrong.items() if owner in owners] for owner in wrong}
    senders = {owner for owner, witnesses in witnesses_of.items() if 2 * len(witnesses) > len(wrong)}
    receivers = {rank for owner, witnesses in witnesses_of.items() if owner not in senders for rank in witnesses}
    return dict.fromkeys(senders, "sends wrong numbers in an all-reduce") | dict.fromkeys(
        receivers, "receives wrong numbers in an all-reduce"
    )


def main() -> None:
    """Answers each request line of standard input by one line of JSON on the original standard output, until the input
    ends.

    Prints of libraries go to standard error. An exception ends the process, as the end of its parent does.

    Raises:
        OSError: the kernel refuses to end this process with its parent.
        StrangerError: another user has connected to a port of this rank.
    """
    die_with_parent(int(sys.argv[1]))

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Prints of libraries must not mix with answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    import torch
    import torch.distributed as dist

    from dist_lm.parallel.guarded_gloo import guarded

    kind = sys.argv[2]
    device, backend = torch.device(kind), "gloo"
    if kind == "cuda":
        device, backend = torch.device(kind, int(os.environ["LOCAL_RANK"])), "nccl"
        torch.cuda.set_device(device)

    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        if request["do"] == "burn":
            answer = {"fault": burn(device, request["seconds"], SIZE[kind])}
        else:
            rank, world = request["rank"], request["world"]
            # Not before all ranks of that group have answered.
            if dist.is_initialized():
                dist.destroy_process_group()
            if "store" in request:
                meeting: dict[str, Any] = {"store": dist.FileStore(request["store"])}
            else:
                meeting = {"init_method": f"tcp://{request['address']}:{request['port']}"}
            with guarded():
                dist.init_process_group(backend, rank=rank, world_size=world, **meeting)
            answer = {"wrong": all_reduce(device, rank, world, SUMMED[kind])}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
