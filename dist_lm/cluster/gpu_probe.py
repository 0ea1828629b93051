"""Trial work of every GPU of a node before ranks start: matrix products with known results, and an all-reduce.

`python -m dist_lm.cluster.gpu_probe PARENT DEVICE` is the process of one GPU (LOCAL_RANK). It reads requests, one JSON
object a line, from standard input and writes one answer for each:

    {"do": "burn", "seconds": S}                                             -> {"fault": TEXT, empty if it is fine}
    {"do": "all_reduce", "rank": R, "world": W, "address": A, "port": P}     -> {"wrong": [rank, ...]}

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

SIZE = {"cuda": 4096, "cpu": 64}  # of the square matrices
SUMMED = {"cuda": 1 << 24, "cpu": 1 << 10}  # numbers of an all-reduce
AT_ONCE = 16  # products between two looks at the clock
LOOK_S = 0.2
START_S = 120.0  # of a process: imports, perhaps from a busy network file system, and a CUDA context


class Probes:
    """The processes of one node, one a GPU."""

    def __init__(self, device: str, count: int, address: str) -> None:
        """`address`: of this node, for the others."""
        self.count = count
        environment = rank_environment(
            os.environ,
            mark=f"probe-{secrets.token_hex(8)}",
            logs=Path(tempfile.gettempdir()),
            device=device,
            cores_per_rank=1,
            interface=interface_of(address),
            given={},
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
        """The answer of each process, or why it gave none.

        Args:
            requests: one a process.
            meanwhile: called a few times a second.
        """
        deadline = time.monotonic() + timeout_s
        answers: dict[int, dict[str, Any] | str] = {}
        text = [b""] * len(requests)
        with selectors.DefaultSelector() as waiting:
            for local, (process, request) in enumerate(zip(self._processes, requests, strict=True)):
                assert process.stdin is not None
                assert process.stdout is not None
                with suppress(BrokenPipeError):  # it has ended, which the read notices
                    process.stdin.write(json.dumps(request).encode() + b"\n")
                    process.stdin.flush()
                waiting.register(process.stdout.fileno(), selectors.EVENT_READ, local)
            while len(answers) < len(requests) and (left := deadline - time.monotonic()) > 0:
                for key, _ in waiting.select(min(left, LOOK_S)):
                    local, read = key.data, os.read(key.fd, 1 << 16)
                    text[local] += read
                    if not read or text[local].endswith(b"\n"):
                        waiting.unregister(key.fd)
                        answers[local] = json.loads(text[local]) if read else self._end_of(local)
                meanwhile()
        return [answers.get(local, f"no answer within {timeout_s:g} s") for local in range(len(requests))]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process, errors in zip(self._processes, self._errors, strict=True):
            process.wait()
            for pipe in (process.stdin, process.stdout, errors):
                with suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]

    def _end_of(self, local: int) -> str:
        code, errors = self._processes[local].wait(), self._errors[local]
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"its process ended with exit code {code}"


def burn(
    device: "torch.device", seconds: float, size: int, multiply: "Callable[[Any, Any], torch.Tensor] | None" = None
) -> str:
    """Multiply bf16 matrices of small whole numbers, whose products are exact; returns what is wrong, or nothing.

    A product C = A B is checked through C v = A (B v), with v of 1 and -1, computed once on the host: a single wrong
    entry changes it.
    """
    import torch

    random = torch.Generator().manual_seed(0)

    def numbers() -> torch.Tensor:  # mostly 0, else 1 or -1: sums stay below 256, and bf16 holds them exactly
        drawn = torch.randint(0, 8, (size, size), generator=random)
        return (drawn == 0).float() - (drawn == 1).float()

    a, b = numbers(), numbers()
    v = torch.randint(0, 2, (size,), generator=random).float() * 2 - 1
    expected = (a.double() @ (b.double() @ v.double())).float().to(device)
    a, b, v = a.to(device, torch.bfloat16), b.to(device, torch.bfloat16), v.to(device)
    wrong, count = torch.zeros((), dtype=torch.int64, device=device), 0
    deadline = time.monotonic() + seconds
    while True:
        for _ in range(AT_ONCE):
            wrong += ((multiply or torch.matmul)(a, b).float() @ v != expected).any()
        count += AT_ONCE
        found = int(wrong)  # waits for the device
        if found or time.monotonic() >= deadline:
            return f"{found} of {count} matrix products are wrong" if found else ""


def all_reduce(device: "torch.device", rank: int, world: int, total: int) -> list[int]:
    """Sum a tensor over the ranks, in which each has written its own part; returns the ranks whose part is wrong."""
    import torch
    import torch.distributed as dist

    size = max(1, total // world)
    parts = torch.zeros(world, size, device=device)
    expected = torch.arange(size, device=device) % 1021 + torch.arange(world, device=device)[:, None]
    parts[rank] = expected[rank].float()
    dist.all_reduce(parts)
    return (parts != expected).any(dim=1).nonzero().flatten().tolist()


def named_by(wrong: Mapping[int, Sequence[int]]) -> dict[int, str]:
    """Reasons by rank: whose part is wrong on most ranks, and who sees wrong parts that others see right.

    Args:
        wrong: answers of `all_reduce` by rank.
    """
    seen = {owner: [rank for rank, owners in wrong.items() if owner in owners] for owner in wrong}
    senders = {owner for owner, ranks in seen.items() if 2 * len(ranks) > len(wrong)}
    receivers = {rank for owner, ranks in seen.items() if owner not in senders for rank in ranks}
    return dict.fromkeys(senders, "sends wrong numbers in an all-reduce") | dict.fromkeys(
        receivers, "receives wrong numbers in an all-reduce"
    )


def main() -> None:
    """Answer requests until standard input ends."""
    die_with_parent(int(sys.argv[1]))
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # prints of libraries must not mix with answers
    import torch
    import torch.distributed as dist

    kind = sys.argv[2]
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        if request["do"] == "burn":
            answer = {"fault": burn(device, request["seconds"], SIZE[kind])}
        else:
            rank, world = request["rank"], request["world"]
            if dist.is_initialized():  # not before all ranks of that group have answered
                dist.destroy_process_group()
            dist.init_process_group(
                "nccl" if kind == "cuda" else "gloo",
                init_method=f"tcp://{request['address']}:{request['port']}",
                rank=rank,
                world_size=world,
            )
            answer = {"wrong": all_reduce(device, rank, world, SUMMED[kind])}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
