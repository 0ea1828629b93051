"""Values between ranks: each is sent as JSON and arrays of numbers, and read as the type that the receiver expects.

torch's `broadcast_object_list`, `all_gather_object` and their like unpickle what arrives, so who can write into one
connection would run code in a rank. Here, bytes that are not a value of the expected type raise `MessageError`.
"""

import dataclasses
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist

from dist_lm.errors import ArtefactError

T = TypeVar("T")
MISFITS = (ValueError, TypeError, KeyError, IndexError, OverflowError)  # errors of reading another value
NUMBERS = "biuf"  # kinds of arrays: bool, integers, floating point
LENGTH_BYTES = 8  # size of the length of the JSON, little endian, before it
ALIGNMENT = 64  # bytes; JSON and arrays end at a multiple, so that a reader can use arrays where they lie


class MessageError(RuntimeError):
    """Another rank has sent a value that is not of the expected type."""


def broadcast(value: T, expected: Any, group: dist.ProcessGroup | None = None) -> T:
    """Returns the value of the group's first rank on all of its ranks (collective).

    Args:
        value: read on the first rank alone.
        expected: type of the value, see `decode`.

    Raises:
        MessageError: something else has arrived.
        TypeError: the value is of none of the types that `decode` reads.
    """
    is_first = dist.get_rank(group) == 0
    device = _device_of(group)
    content = encode(value) if is_first else b""
    size = torch.tensor([len(content)], dtype=torch.int64, device=device)
    dist.broadcast(size, group=group, group_src=0)

    message = torch.empty(int(size), dtype=torch.uint8, device=device)
    if is_first:
        message.copy_(_tensor_of(content))
    dist.broadcast(message, group=group, group_src=0)
    # The first rank keeps its own value, which is the same.
    return value if is_first else decode(message.cpu().numpy().tobytes(), expected)


def on_first_rank(look: Callable[[], T], expected: Any, group: dist.ProcessGroup | None = None) -> T:
    """Returns on every rank what `look` returns on the group's first (collective): one rank reads a file for all, and
    other ranks may see an older state of a network file system.

    Args:
        expected: type of what `look` returns, see `decode`.

    Raises:
        ArtefactError: on every rank, the error that `look` raised. Any other error leaves the other ranks waiting.
        MessageError: something else has arrived.
    """
    returned, failure = None, None
    if dist.get_rank(group) == 0:
        try:
            returned = look()
        except ArtefactError as error:
            failure = str(error)

    failure = broadcast(failure, str | None, group)
    if failure:
        raise ArtefactError(failure)
    return broadcast(cast(T, returned), expected, group)


def all_gather(value: T, expected: Any, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the values of all ranks of the group, in their order, on each of them (collective).

    Args:
        expected: type of each value, see `decode`.

    Raises:
        MessageError: something else has arrived.
        TypeError: the value is of none of the types that `decode` reads.
    """
    device = _device_of(group)
    content = encode(value)
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(content)], dtype=torch.int64, device=device), group=group)

    # A collective sends the same number of bytes from every rank, so shorter messages are padded.
    longest = int(sizes.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(content)].copy_(_tensor_of(content))
    gathered = torch.empty(len(sizes) * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(gathered, padded, group=group)

    rows = gathered.view(len(sizes), longest).cpu().numpy()
    return [decode(row[:size].tobytes(), expected) for row, size in zip(rows, sizes.tolist(), strict=True)]


def _device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Returns the CPU if the group can send from there, else the GPU of this rank."""
    return dist.distributed_c10d._get_object_coll_device(group)  # type: ignore[return-value]


def _tensor_of(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


# --- bytes and values ---


def encode(value: Any) -> bytes:
    """Returns the bytes of a value: the length of a JSON text, the text, and the numbers of its arrays one after the
    other.

    Raises:
        TypeError: the value is of none of the types that `decode` reads.
    """
    return b"".join(pieces_of(value))


def pieces_of(value: Any) -> list[bytes | memoryview]:
    """Returns the bytes of `encode` in pieces, with the arrays where they lie.

    Raises:
        TypeError: as `encode`.
    """
    numbers = _Numbers()
    text = json.dumps(_plain(value, numbers)).encode()
    # JSON may end with blanks.
    text = text.ljust(_aligned(LENGTH_BYTES + len(text)) - LENGTH_BYTES)
    return [len(text).to_bytes(LENGTH_BYTES, "little") + text, *numbers.pieces]


@dataclasses.dataclass
class _Numbers:
    """The content of arrays, one after the other."""

    pieces: list[bytes | memoryview] = dataclasses.field(default_factory=list)
    size: int = 0  # bytes

    def append(self, array: np.ndarray) -> int:
        """Adds the content of an array; returns its place in bytes."""
        offset, end = self.size, _aligned(self.size + array.nbytes)
        if array.nbytes:
            self.pieces.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self.pieces.append(bytes(end - offset - array.nbytes))
        self.size = end
        return offset


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def decode(content: bytes | memoryview, expected: Any) -> Any:
    """Returns the value that `encode` has written. Its arrays lie in `content` if that may be written to.

    Args:
        expected: `bool`, `int`, `float`, `str`, `bytes`, `Path`, an enumeration, `np.ndarray` of numbers, `None`, a
            `Literal`, a dataclass, or `list`, `Sequence`, `tuple`, `dict`, `Mapping` and unions of these.

    Raises:
        MessageError: the bytes are not such a value.
    """
    try:
        end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
        return _typed(json.loads(bytes(content[LENGTH_BYTES:end])), expected, content[end:])
    except (*MISFITS, RecursionError) as error:
        raise MessageError(f"a rank has sent what is no {expected}: {type(error).__name__}: {error}") from None


def _plain(value: Any, numbers: _Numbers) -> Any:
    """Returns a value as JSON has it. The content of an array is appended to `numbers`; its type, shape and place there
    stand for it.

    Raises:
        TypeError: as `encode`.
    """
    if isinstance(value, Enum):
        return _plain(value.value, numbers)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)

    if isinstance(value, bytes):
        return _plain(np.frombuffer(value, np.uint8), numbers)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in NUMBERS:
            raise TypeError(f"an array of {value.dtype}: expected numbers")
        return [value.dtype.str, list(value.shape), numbers.append(value)]

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # The name tells apart the members of a union.
        fields = {field.name: _plain(getattr(value, field.name), numbers) for field in dataclasses.fields(value)}
        return [type(value).__name__, fields]
    if isinstance(value, Mapping):
        # Keys may be numbers, which JSON would turn into texts.
        return [[_plain(key, numbers), _plain(entry, numbers)] for key, entry in value.items()]
    if isinstance(value, Sequence):
        return [_plain(entry, numbers) for entry in value]
    raise TypeError(f"a value of {type(value)}: expected a type that `decode` reads")


def _typed(plain: Any, expected: Any, numbers: bytes | memoryview) -> Any:
    """Returns the value of type `expected` that `_plain` has written.

    Raises:
        MISFITS: it is another value.
    """
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return _one_of(plain, arguments, numbers)
    if origin is Literal:
        return arguments[arguments.index(plain)]
    if expected is None or expected is type(None):
        return _instance(plain, type(None))
    if expected in (bool, int, str):
        return _instance(plain, expected)
    if expected is float:
        return plain if type(plain) is int else _instance(plain, float)
    if expected is np.ndarray:
        return _array(plain, numbers)
    if expected is bytes:
        return _array(plain, numbers).tobytes()
    if expected is Path:
        return Path(_instance(plain, str))
    if isinstance(expected, type) and issubclass(expected, Enum):
        return expected(plain)
    if dataclasses.is_dataclass(expected):
        return _dataclass(plain, expected, numbers)

    entries = _instance(plain, list)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return tuple(_typed(entry, kind, numbers) for entry, kind in zip(entries, arguments, strict=True))
    if origin is tuple:
        return tuple(_typed(entry, arguments[0], numbers) for entry in entries)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key_type, entry_type = arguments
        return {_typed(key, key_type, numbers): _typed(entry, entry_type, numbers) for key, entry in entries}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return [_typed(entry, arguments[0], numbers) for entry in entries]
    raise TypeError(f"{expected} is no type of a message")


def _instance(plain: Any, expected: type) -> Any:
    # Not `isinstance`: a bool is no number here.
    if type(plain) is not expected:
        raise TypeError(f"{str(plain)[:40]!r} is no {expected.__name__}")
    return plain


def _array(plain: Any, numbers: bytes | memoryview) -> np.ndarray:
    dtype, shape, offset = _instance(plain, list)
    kind = np.dtype(_instance(dtype, str))
    if kind.kind not in NUMBERS:
        raise TypeError(f"an array of {kind}: expected numbers")
    # numpy reads -1 as "all that is left".
    if min(_instance(size, int) for size in [offset, *_instance(shape, list)]) < 0:
        raise ValueError(f"an array of shape {shape} at {offset}")
    # The receiver may write to its array.
    array = np.frombuffer(numbers, kind, math.prod(shape), offset).reshape(shape)
    return array if array.flags.writeable else array.copy()


def _one_of(plain: Any, members: Sequence[Any], numbers: bytes | memoryview) -> Any:
    for member in members:
        try:
            return _typed(plain, member, numbers)
        except MISFITS:
            # Another member may fit.
            continue
    raise TypeError(f"{str(plain)[:40]!r} is none of {members}")


def _dataclass(plain: Any, expected: Any, numbers: bytes | memoryview) -> Any:
    name, fields = _instance(plain, list)
    hints = _hints(expected)
    names = {field.name for field in dataclasses.fields(expected)}
    if name != expected.__name__ or fields.keys() != names:
        raise TypeError(f"{name} with {sorted(fields)} is no {expected.__name__}")
    return expected(**{name: _typed(entry, hints[name], numbers) for name, entry in fields.items()})


@cache
def _hints(expected: type) -> dict[str, Any]:
    return get_type_hints(expected)
