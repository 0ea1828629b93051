"""The files that a rank writes, and a process that writes them beside training.

A thread of the rank would share Python's lock with the training thread. The process maps the memories that hold the
copies of shards, those of other ranks of the node too, so nothing but names and places is sent to it. It imports no
torch: it is there within half a second and needs about 45 MiB, and room for a part that several ranks hold.
"""

import json
import math
import mmap
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.errors import ArtefactError
from dist_lm.model.size import Shape
from dist_lm.storage import durable
from dist_lm.storage.json_process import JsonProcess, serve_requests
from dist_lm.storage.process import die_with_parent
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import PLACES, ComputedTensor, index_of, stored_tensors, write_tensors
from dist_lm.training.state import TrainState

# time limit of a message or an answer of a save, in seconds: a slow disk is no hang, and heartbeats tell of those
SAVE_S = 6 * 3600.0
FORMAT = {"DCP_VERSION": "1.0", "format": "pt"}  # metadata by which torch's own reader knows such files

# A node sends some of these to all its processes, so that ranks save a last time; the writer must live until then.
HELD_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True)
class Piece:
    """The shard of a rank, in the copy that this rank has made."""

    rank: int
    begin: int  # byte offset in the copy
    offsets: Shape  # indices of its first entry in the tensor
    shape: Shape


@dataclass(frozen=True)
class PlannedPart:
    """A box of a tensor that this rank writes, and the shards in it."""

    name: str
    dtype: str  # as safetensors names it, such as F32
    offsets: Shape  # indices of its first entry in the tensor
    shape: Shape
    bytes: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class PlannedFile:
    """A file that this rank writes, and the parts in it, in this order."""

    name: str
    parts: tuple[PlannedPart, ...]


Plan = tuple[PlannedFile, ...]


def write_files(directory: Path, plan: Plan, bytes_of: Callable[[PlannedPart], np.ndarray]) -> dict[str, str]:
    """Writes the files of a plan into `directory`, which is made if it is missing, and makes them durable.

    Args:
        bytes_of: returns the bytes of a part in row-major order: (bytes,) uint8.

    Returns:
        SHA-256 by file name.

    Raises:
        OSError: a file exists or cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    digests = {}
    for file in plan:
        tensors = {
            part.name: ComputedTensor(part.dtype, part.shape, part.bytes, partial(bytes_of, part))
            for part in file.parts
        }
        offsets_of_parts = {part.name: {"saved_offsets": part.offsets} for part in file.parts}
        write_tensors(directory / file.name, tensors, {**FORMAT, PLACES: json.dumps(offsets_of_parts)})
        digests[file.name] = durable.sha256_of(directory / file.name)
    return digests


def mapped(memory: int) -> np.ndarray:
    """Maps the memory of a file descriptor: (bytes,) uint8, read-only."""
    return np.frombuffer(mmap.mmap(memory, os.fstat(memory).st_size, prot=mmap.PROT_READ), dtype=np.uint8)


def put_together(part: PlannedPart, copies: Mapping[int, np.ndarray]) -> np.ndarray:
    """Returns the bytes of a part in row-major order: (bytes,) uint8.

    Args:
        copies: of the shards of each rank in the part, by rank: (bytes,) uint8.
    """
    item_bytes = part.bytes // math.prod(part.shape)

    def bytes_of(piece: Piece) -> np.ndarray:
        return copies[piece.rank][piece.begin : piece.begin + math.prod(piece.shape) * item_bytes]

    if len(part.pieces) == 1:
        return bytes_of(part.pieces[0])

    # numpy has no bfloat16, so entries are integers of the right size.
    entries = np.empty(part.shape, np.dtype(f"u{item_bytes}"))
    for piece in part.pieces:
        box = tuple(
            slice(start - first, start - first + size)
            for start, first, size in zip(piece.offsets, part.offsets, piece.shape, strict=True)
        )
        entries[box] = bytes_of(piece).view(entries.dtype).reshape(piece.shape)
    return entries.reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Publication:
    """The content and the paths with which the first rank completes a checkpoint from the files of all ranks."""

    temporary: Path  # the folder with the files
    target: Path  # its name from then on
    digests: dict[str, str]  # SHA-256 by name of the files that are there
    state: TrainState
    model: dict[str, Any]  # configuration of the model
    adapters: dict[str, Any] | None  # settings and base of the adapters, if the checkpoint holds adapters alone

    def to_json(self) -> dict[str, Any]:
        """Returns the values that `from_json` reads."""
        return {**asdict(self), "temporary": str(self.temporary), "target": str(self.target)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Publication":
        """Inverts `to_json`, after JSON."""
        paths = {name: Path(values[name]) for name in ("temporary", "target")}
        return cls(**{**values, **paths, "state": TrainState.from_json(values["state"])})


def publish(checkpoint: Publication) -> None:
    """Adds index, state and manifest to the files, renames their folder to the target, which it replaces, and points
    LATEST at it.

    Raises:
        OSError: a file or the folder cannot be written.
        ArtefactError: the shards of the ranks do not make up all tensors.
    """
    temporary, target, digests = checkpoint.temporary, checkpoint.target, checkpoint.digests

    # A rank that continues reads one index instead of the header of every file. This refuses missing parts, too. Files
    # are opened by the names that ranks sent: a network file system may list a folder as it was before they wrote.
    shards = [name for name in digests if not name.startswith(f"{files.STAGE}/")]
    index = index_of(stored_tensors(temporary, names=shards))
    durable.write_text(temporary / files.INDEX, json.dumps(index, separators=(",", ":")))
    files.write_state(temporary, checkpoint.state, checkpoint.model, checkpoint.adapters)
    added = {name: durable.sha256_of(temporary / name) for name in (files.INDEX, files.STATE)}
    files.write_manifest(temporary, {**digests, **added})

    # A damaged checkpoint of this step was skipped when the run continued, and the step is saved again.
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    durable.fsync(target.parent)
    files.write_pointer(target.parent, files.LATEST, target)


class WriterProcess:
    """The rank's side of the process that writes its files: `write` and `publish` in that process.

    The process ends with this one, however this one ends. An error leaves it running unless it says otherwise.
    """

    def __init__(self, plan: Plan, memories: Mapping[int, int]) -> None:
        """Starts the process; it is not waited for. Call it in the main thread: the process ends with the thread.

        Args:
            memories: file descriptors of the memories that hold copies of shards, by rank.
        """
        # Signals that are blocked here are blocked there from the first instruction on.
        blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
        try:
            arguments = (str(os.getpid()), json.dumps(list(memories.items())))
            descriptors = tuple(memories.values())
            self._process = JsonProcess("dist_lm.training.checkpoint_writer", *arguments, pass_fds=descriptors)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
        self.has_ended = False
        self._plan: Plan | None = plan  # until it is sent

    @property
    def pid(self) -> int:
        """Returns the id of the process."""
        return self._process.pid

    def write(self, directory: Path) -> dict[str, str]:
        """Does `write_files` in the process, with what the memories hold now.

        Raises:
            OSError: a file cannot be written, or the process has ended.
        """
        if self._plan is not None:
            self._ask({"plan": [asdict(file) for file in self._plan]})
            self._plan = None
        return self._ask({"write": str(directory)})

    def publish(self, checkpoint: Publication) -> None:
        """Does `publish` in the process.

        Raises:
            OSError: as `publish`, or the process has ended.
            ArtefactError: as `publish`.
        """
        self._ask({"publish": checkpoint.to_json()})

    def _ask(self, request: Mapping[str, Any]) -> Any:
        """Sends a request, waits for the answer, SAVE_S at most, and returns it.

        Raises:
            OSError: the process could not write, has ended, or has not answered in time; in the last two cases it is
                ended.
            ArtefactError: the process refuses the request.
        """
        try:
            self._process.send(request, SAVE_S)
            answer = self._process.receive(SAVE_S)
        except (EOFError, OSError) as error:
            code = self._process.code()
            self.end()
            reason = str(error) if code is None else f"exit code {code}"
            raise OSError(f"the process that writes it, {self.pid}, has ended: {reason}") from error

        if "refused" in answer:
            raise ArtefactError(answer["refused"])
        if "failed" in answer:
            raise OSError(answer["failed"])
        return answer["done"]

    def end(self) -> None:
        """Kills the process, unless it has ended."""
        if not self.has_ended:
            self.has_ended = True
            self._process.end()


def main() -> None:
    """Writes what the rank asks for, until the rank ends.

    Raises:
        OSError: the kernel refuses to end this process with its parent.
    """
    parent, memories = sys.argv[2:]
    # Children of the rank may hold its end of the socket open, so its end alone would not tell.
    die_with_parent(int(parent))
    copies = {rank: mapped(memory) for rank, memory in json.loads(memories)}

    plan: Plan = ()
    with serve_requests() as (requests, send):
        while True:
            request = requests.get()
            try:
                if "plan" in request:
                    plan, digests = plan_from_json(request["plan"]), None
                elif "write" in request:
                    digests = write_files(Path(request["write"]), plan, partial(put_together, copies=copies))
                else:
                    publish(Publication.from_json(request["publish"]))
                    digests = None
                send({"done": digests})
            except ArtefactError as error:
                send({"refused": str(error)})
            except OSError as error:
                send({"failed": str(error)})


def plan_from_json(content: Sequence[Mapping[str, Any]]) -> Plan:
    """Inverts `dataclasses.asdict` of the files of a plan, after JSON."""
    return tuple(PlannedFile(file["name"], tuple(_part_from_json(part) for part in file["parts"])) for file in content)


def _part_from_json(content: Mapping[str, Any]) -> PlannedPart:
    """Inverts `dataclasses.asdict` of a part, after JSON."""
    pieces = tuple(
        Piece(piece["rank"], piece["begin"], tuple(piece["offsets"]), tuple(piece["shape"]))
        for piece in content["pieces"]
    )
    box = {"offsets": tuple(content["offsets"]), "shape": tuple(content["shape"])}
    return PlannedPart(**{**content, **box, "pieces": pieces})


if __name__ == "__main__":
    main()
