"""The process that reads content from outside: `python -m dist_lm.sandbox.limited_program SOCKET`.

`dist_lm.sandbox.limited` starts it and asks. A message is a list of values: a frame of JSON, and one more for each
value that is bytes. A request is [MODULE:NAME, CPU seconds, arguments ...], an answer [kind, ends, values ...]: kind is
`result`, the class of a UserError, or `failed`; `ends` says that the process ends after it.

Only the standard library is imported before a request names a module.
"""

import importlib
import importlib.util
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dist_lm.errors import UserError
from dist_lm.sandbox import confine

MEMORY_BYTES = 1 << 30  # address space of the process, with its libraries
FRESH_BYTES = 256 << 20  # a process that a call has grown by more is replaced: memory stays in pieces
ANSWER_BYTES = 256 << 20  # size of an answer; more would move the memory into the process that asks
LENGTH_BYTES = 4
LIBRARIES = ("numpy", "sentencepiece", "tokenizers", "jinja2", "gguf", "jsonschema", "llguidance")


def main() -> None:
    """Confines this process, answers [] and then requests, until the parent closes the socket.

    A call that exceeds its CPU seconds, in which imports do not count, ends it by SIGPROF.

    Raises:
        OSError: the kernel refuses a limit, or the parent has gone.
    """
    with socket.socket(fileno=int(sys.argv[1])) as connection, connection.makefile("rb") as requests:
        connection.set_inheritable(False)
        status, nowhere = os.open("/proc/self/status", os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
        confine_process(MEMORY_BYTES, _readable_trees())
        connection.sendall(frames_of([]))
        os.dup2(nowhere, 2)  # warnings of libraries have no reader

        def read(length: int) -> bytes:
            data = requests.read(length)
            if len(data) < length:
                raise EOFError
            return data

        memory_before = 0  # measured behind the first imports
        while True:
            try:
                name, cpu_s, *arguments = values_of(read)
            except EOFError:
                return
            try:
                function = _function(name)
            except ImportError as error:
                connection.sendall(frames_of(["UserError", False, f"{name} cannot be imported here: {error}"]))
                continue
            memory_before = memory_before or most_memory(status)

            # The kernel ends the process then, whatever it does: a parser cannot be interrupted.
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            kind, values = _called(function, arguments)
            ends = most_memory(status) > memory_before + FRESH_BYTES
            answer = _answer(kind, ends, values)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.sendall(answer)
            if ends:
                return


def frames_of(values: Sequence[Any]) -> bytes:
    """Returns a message. Values are JSON or bytes; a text may hold lone surrogates.

    Raises:
        TypeError, ValueError: JSON cannot express a value.
    """
    byte_indices = [number for number, value in enumerate(values) if isinstance(value, bytes)]
    json_values = [None if isinstance(value, bytes) else value for value in values]
    text = json.dumps([json_values, byte_indices], separators=(",", ":"))
    frames = [text.encode(), *(values[number] for number in byte_indices)]
    return b"".join(part for frame in frames for part in (len(frame).to_bytes(LENGTH_BYTES, "big"), frame))


def values_of(read: Callable[[int], bytes], most_bytes: int = 1 << 32) -> list[Any]:
    """Returns the values of the next message: values of JSON, and bytes where the sender had bytes.

    Args:
        read: returns that many of the next bytes; what it raises passes.
        most_bytes: of a frame.

    Raises:
        ValueError, TypeError: it is no message.
        ValueError: a frame is too large.
    """

    def frame() -> bytes:
        length = int.from_bytes(read(LENGTH_BYTES), "big")
        if length > most_bytes:
            raise ValueError(f"a frame of {length} bytes")
        return read(length)

    values, byte_indices = json.loads(frame())
    return [frame() if number in byte_indices else value for number, value in enumerate(values)]


def confine_process(memory_bytes: int, readable_trees: Iterable[str], file_bytes: int = 0) -> None:
    """Limits this process and those below it for good, as far as the kernel can: memory, size of files, no
    capabilities, only files of the system to read (Landlock), and a filter of system calls, without sockets.

    Args:
        memory_bytes: address space of each process.
        readable_trees: folders beside those of the system and of the interpreter.
        file_bytes: largest file that it may write, as one in memory.

    Raises:
        OSError: the kernel refuses.
    """
    confine.limit({resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: file_bytes})
    if sys.platform != "linux":
        return
    # Landlock and seccomp need it.
    confine.gain_no_capabilities()
    confine.drop_capabilities()
    if version := confine.landlock_version():
        trees = ("/usr", "/bin", "/lib", "/lib64", "/etc", sys.base_prefix, *readable_trees)
        confine.FileRules(version, [tree for tree in trees if os.path.exists(tree)]).restrict()
    if confine.has_seccomp() and (call_filter := confine.system_call_filter(os.uname().machine)):
        confine.filter_system_calls(call_filter)


def _readable_trees() -> set[str]:
    """Returns the folders of this package and of the libraries that requests use."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    trees = {sys.prefix, package}
    # Packages may be installed elsewhere, such as in the folder of a user.
    for library in LIBRARIES:
        spec = importlib.util.find_spec(library)
        if spec and spec.origin:
            trees.add(os.path.dirname(os.path.dirname(os.path.realpath(spec.origin))))
    return trees


def _function(name: str) -> Callable[..., Any]:
    """Imports and returns the function MODULE:NAME."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _called(function: Callable[..., Any], arguments: list[Any]) -> tuple[str, Sequence[Any]]:
    """Calls a function and returns the kind and the values of the answer."""
    try:
        result = function(*arguments)
    except UserError as error:
        return type(error).__name__, [str(error)]
    except MemoryError:
        return "failed", [f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"]
    except BaseException as error:
        # Whatever the content makes a parser do must become an answer; some libraries raise classes of their own.
        return "failed", [f"{type(error).__name__}: {str(error)[:200]}"]
    return "result", result if isinstance(result, tuple) else (result,)


def _answer(kind: str, ends: bool, values: Sequence[Any]) -> bytes:
    """Returns the message of an answer; instead of one that is too large, or that JSON cannot express, a failure."""
    try:
        answer = frames_of([kind, ends, *values])
    except (TypeError, ValueError, RecursionError, MemoryError) as error:
        return frames_of(["failed", True, f"its content is no JSON: {type(error).__name__}"])
    if len(answer) > ANSWER_BYTES:
        return frames_of(["failed", True, f"it has more than {ANSWER_BYTES >> 20} MiB"])
    return answer


def most_memory(status: int) -> int:
    """Returns the largest resident memory of this process so far, in bytes.

    Args:
        status: descriptor of /proc/self/status. `getrusage` starts from the process that started this one.
    """
    _, _, rest = os.pread(status, 8_192, 0).partition(b"VmHWM:")
    return int(rest.split(maxsplit=1)[0]) << 10


if __name__ == "__main__":
    main()
