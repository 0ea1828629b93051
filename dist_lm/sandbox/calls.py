"""Calls between a program and its judge over a socket: values travel, objects that are no values stay where they are.

A question is an operation with its operands; its answer is a value or an exception, and the new contents of every
container among the operands that the call changed. Whoever asked writes these into its own containers, in place. While
a side waits for its answer it answers questions itself, so functions given as arguments are called where they are.

A frame is a length (4 bytes), its kind (1 byte) and its content. This module runs inside the sandbox. Only the standard
library is imported, and little of it.
"""

from __future__ import annotations

import _thread
import os
import sys

from dist_lm.sandbox.values import (
    EXCEPTIONS,
    MAX_BYTES,
    Decoder,
    Encoder,
    MalformedError,
    NotCarriedError,
    Raised,
    Reference,
    exception_names,
    write_back,
)

TYPE_CHECKING = False  # `typing` itself would take a third of a cold start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

QUESTION, VALUE, RAISED, REFUSED, READY, END = b"qverh."  # kinds of frames
MAX_NESTED = 50  # calls that wait for each other
MAX_OBJECTS = 100_000  # most objects that one side keeps for the other
MAX_BLOCK = 1_000  # items of an iterator in one answer


class GoneError(Exception):
    """Raised where the other side has ended, or says what no peer says."""


class UncarriedError(Exception):
    """Raised where the other side could not carry a value."""


class ProgramError(Exception):
    """An exception of the other side that is none of Python's own."""


class Peer:
    """One end of the socket.

    Args:
        channel: descriptor of the socket.
        operations: what the other side may ask for: name -> function of the operands.
    """

    def __init__(self, channel: int, operations: dict[str, Callable[..., Any]]) -> None:
        self.channel = channel
        self.operations = operations
        self.last_error: BaseException | None = None  # the last that an answer told of
        self._objects: list[Any] = []  # objects that the other side refers to
        self._number_of: dict[int, int] = {}  # id -> number in `_objects`
        self._remote: dict[int, Any] = {}  # number on the other side -> what stands for it here
        self._numbers_there: dict[int, int] = {}  # id of what stands here -> number on the other side
        self._classes: dict[tuple[str, ...], type] = {}  # names -> exception class made here
        self._nested = 0
        self._lock = _thread.RLock()  # threads ask one after the other; while one waits, it answers itself

    # --- asking ---

    def ask(self, operation: str, *operands: Any) -> Any:
        """Returns the answer to a question, after writing changed contents into the containers among the operands.

        Raises:
            NotCarriedError: an operand cannot travel.
            UncarriedError: the answer could not.
            GoneError: the other side has ended, or its answer is malformed.
            Exception: whatever the other side raised.
        """
        encoder = Encoder(self._refer)
        encoder.put((operation, *operands))
        with self._lock:
            self._write(QUESTION, encoder.finished())
            self._nested += 1
            try:
                kind, content = self._read()
                # The other side may call a function among the operands before it answers.
                while kind == QUESTION:
                    self._answer(content)
                    kind, content = self._read()
            finally:
                self._nested -= 1
        return self._understood(kind, content, encoder.shared)

    def _understood(self, kind: int, content: bytes, shared: list[Any]) -> Any:
        """Returns the value of an answer, and writes changed contents into the containers `shared`, in place.

        Raises:
            UncarriedError: the other side could not carry its answer.
            GoneError: the answer is malformed.
            Exception: the answer is an exception, which is raised.
        """
        if kind == REFUSED:
            raise UncarriedError(content[:500].decode(errors="replace"))
        if kind not in (VALUE, RAISED):
            raise GoneError("an answer of an unknown kind")
        try:
            decoder = Decoder(content, self._resolve, shared)
            value = decoder.take()
            changes = []
            for _ in range(decoder.take_count()):
                index = decoder.take_count()
                if index >= len(shared):
                    raise MalformedError("contents of no operand")
                changes.append((shared[index], decoder.take()))
            decoder.end()

            # Written only once the whole answer is well formed: a malformed one changes nothing.
            for container, contents in changes:
                write_back(container, contents)
        except MalformedError as error:
            raise GoneError(f"a malformed answer: {error}") from None

        if kind == VALUE:
            return value
        if not isinstance(value, BaseException):
            raise GoneError("an exception that is none")
        raise value

    def wait_for_names(self) -> dict[str, Any]:
        """Waits until the other side serves, and returns the objects that it tells of.

        Raises:
            GoneError: it ended before, or says what no peer says.
        """
        kind, content = self._read()
        if kind != READY:
            raise GoneError("a first frame of an unknown kind")
        try:
            decoder = Decoder(content, self._resolve)
            names = dict(decoder.take())
            decoder.end()
        except (MalformedError, TypeError, ValueError) as error:
            raise GoneError(f"a malformed first frame: {error}") from None
        return names

    # --- answering ---

    def serve(self, names: dict[str, Any]) -> bool:
        """Answers questions of the other side until it ends; blocks meanwhile.

        Exceptions of an operation, and results that cannot travel, are sent to the other side as answers.

        Args:
            names: name -> object; sent first, because the other side will ask for some of these objects.

        Returns:
            True if the other side called `end` (all is well); False if the socket closed or another frame came.

        Raises:
            GoneError: the other side ended while `names` or an answer was sent.
            NotCarriedError: an object in `names` cannot travel.
        """
        encoder = Encoder(self._refer)
        encoder.put(tuple(names.items()))
        self._write(READY, encoder.finished())
        while True:
            try:
                kind, content = self._read()
            except GoneError:
                return False
            if kind != QUESTION:
                return kind == END
            self._answer(content)

    def _answer(self, content: bytes) -> None:
        """Executes a question and writes its answer: a value or an exception, and the containers that it changed.

        A malformed question, or a value that cannot travel, is answered by REFUSED. A process that the operation forked
        ends here.

        Raises:
            GoneError: the other side has ended.
        """
        try:
            decoder = Decoder(content, self._resolve)
            operation, *operands = decoder.take()
            decoder.end()
        except (MalformedError, TypeError, ValueError) as error:
            self._write(REFUSED, f"a malformed question: {error}".encode())
            return

        process = os.getpid()
        # Contents are compared as bytes, because `==` would call methods of the program.
        before = [self._contents(container, decoder.shared) for container in decoder.shared]
        kind, value = VALUE, None
        try:
            if self._nested > MAX_NESTED:
                raise RecursionError(f"more than {MAX_NESTED} calls wait for each other")
            value = self.operations[operation](*operands)
        except BaseException as error:
            if not isinstance(error, Exception) and os.getpid() != process:
                raise  # a process that the program forked ends in its own way
            kind, value = RAISED, error
            if operation != "name":  # a missing name is no news
                self.last_error = error
        if os.getpid() != process:
            os._exit(0)

        try:
            encoder = Encoder(self._refer, decoder.shared)
            encoder.put(value)
            after = [self._contents(container, decoder.shared) for container in decoder.shared]
            changed = [index for index, contents in enumerate(after) if contents != before[index]]
            encoder.put_count(len(changed))
            for index in changed:
                encoder.put_count(index)
                encoder.put_contents(decoder.shared[index])
            answer = encoder.finished()
        except NotCarriedError as error:
            kind, answer = REFUSED, str(error).encode(errors="replace")
        self._write(kind, answer)

    def _contents(self, container: Any, shared: list[Any]) -> bytes:
        """Returns the contents of a container as bytes, to compare them."""
        encoder = Encoder(self._refer, shared)
        encoder.put_contents(container)
        return bytes(encoder.data)

    def end(self) -> None:
        """Tells the other side that all is well."""
        self._write(END, b"")

    # --- references ---

    def kind_of(self, value: Any) -> str:
        """Returns the kind of a reference to an object of this side.

        Raises:
            NotCarriedError: objects of this type do not travel.
        """
        kind = type(value)
        if isinstance(value, type):
            return "x" if issubclass(value, BaseException) else "f"
        if kind is type(sys):
            return "m"
        if kind.__module__ in ("builtins", "itertools"):
            if hasattr(kind, "__await__"):
                return "w"
            if hasattr(kind, "__next__"):
                return "i"
        return "f" if callable(value) else "o"

    def _refer(self, value: Any) -> Reference:
        """Returns the reference of an object: the other side's own, or one of this side, which is kept from then on.

        Raises:
            NotCarriedError: its type does not travel, or there are too many objects.
        """
        number_there = self._numbers_there.get(id(value))
        if number_there is not None:
            return Reference(number_there, False)

        kind = self.kind_of(value)
        number = self._number_of.get(id(value))
        if number is None:
            if len(self._objects) >= MAX_OBJECTS:
                raise NotCarriedError(f"more than {MAX_OBJECTS} objects")
            # The list keeps the object alive, so that no other one gets its id.
            number = self._number_of[id(value)] = len(self._objects)
            self._objects.append(value)
        names = [type(value).__name__]
        if kind == "x":
            names = exception_names(value)
        elif kind == "m":
            names = [value.__name__]
        return Reference(number, True, kind, names)

    def _resolve(self, reference: Reference | Raised) -> Any:
        """Returns what a reference or an exception of the other side stands for.

        Raises:
            MalformedError: there is no such object, too many, or one of a kind that does not travel in this direction.
        """
        if isinstance(reference, Raised):
            return self.exception_of(reference)
        number = reference.number
        if not reference.is_own:
            if number >= len(self._objects):
                raise MalformedError("a reference to no object")
            return self._objects[number]
        if number not in self._remote:
            if len(self._remote) >= MAX_OBJECTS:
                raise MalformedError(f"more than {MAX_OBJECTS} objects")
            stand_in = self._remote[number] = self.stand_in(reference)
            self._numbers_there[id(stand_in)] = number
        return self._remote[number]

    def stand_in(self, reference: Reference) -> Any:
        """Returns what stands here for an object of the other side: a function that asks, or an iterator.

        Raises:
            MalformedError: objects of this kind do not travel in this direction.
        """
        if reference.kind == "i":
            return self.iterated(reference.number)
        if reference.kind != "f":
            raise MalformedError(f"a reference to {reference.names[0]}")

        def call(*arguments: Any, **named: Any) -> Any:
            return self.ask("call", call, (*arguments, *named.values()), tuple(named))

        return call

    def iterated(self, number: int) -> Iterator[Any]:
        """Yields the items of an iterator of the other side. It asks for one, then for twice as many each time, up to
        MAX_BLOCK: the other side computes them ahead. Raises what `ask` raises."""
        size = 1
        while True:
            is_last, *items = self.ask("next", self._remote[number], size)
            yield from items
            if is_last:
                return
            size = min(2 * size, MAX_BLOCK)

    # --- exceptions ---

    def exception_of(self, raised: Raised) -> BaseException:
        """Returns an exception of the same class, if that is one of Python's own, else of a new class with its name."""
        kind = self.exception_class(raised.names)
        error = None
        if raised.arguments is not None:
            error = _made(kind, raised.arguments)
        # The constructor of a class may take other arguments than its `args` hold.
        error = error or _made(kind, (raised.text,))
        return error or ProgramError(f"{raised.names[0]}: {raised.text}")

    def exception_class(self, names: tuple[str, ...]) -> type:
        """Returns the exception class of this side that stands for one with these names, its own first."""
        if names[0] in EXCEPTIONS:
            return EXCEPTIONS[names[0]]
        if names[0] == "SystemExit":
            return SystemExit
        if names not in self._classes:
            base = next((EXCEPTIONS[name] for name in names if name in EXCEPTIONS), Exception)
            # `type` takes no name with a NUL.
            self._classes[names] = type(names[0].replace("\0", ""), (ProgramError if base is Exception else base,), {})
        return self._classes[names]

    # --- frames ---

    def _read(self) -> tuple[int, bytes]:
        """Returns kind and content of the next frame; waits for it.

        Raises:
            GoneError: the other side has ended, or a frame is empty or too long.
        """
        length = int.from_bytes(self._exactly(4), "big")
        if not 1 <= length <= MAX_BYTES + 1:
            raise GoneError(f"a frame of {length} bytes")
        frame = self._exactly(length)
        return frame[0], frame[1:]

    def _exactly(self, length: int) -> bytes:
        """Returns the next `length` bytes; waits for them.

        Raises:
            GoneError: the other side has ended.
        """
        data = b""
        while len(data) < length:
            try:
                piece = os.read(self.channel, length - len(data))
            except OSError:
                piece = b""
            if not piece:
                raise GoneError("the program ended")
            # Most frames come in one piece, which need not be copied.
            data = data + piece if data else piece
        return data

    def _write(self, kind: int, content: bytes) -> None:
        frame = memoryview((len(content) + 1).to_bytes(4, "big") + bytes((kind,)) + content)
        while frame:
            try:
                frame = frame[os.write(self.channel, frame) :]
            except OSError:
                raise GoneError("the program ended") from None


def _made(kind: type, arguments: Sequence[Any]) -> BaseException | None:
    """Returns an exception of this class; None if its constructor takes other arguments."""
    try:
        error = kind(*arguments)
    except Exception:
        return None
    return error if issubclass(type(error), BaseException) else None


# --- what a program answers ---


def program_operations(names: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Returns the operations on the objects of a program, by the name in a question: calls, attributes, items,
    iteration, length, texts, `with` and `await`. They raise what the object raises.

    Args:
        names: the program's global names; a question for one that is missing raises NameError.
    """

    def call(function: Callable[..., Any], operands: tuple, named: tuple[str, ...]) -> Any:
        split = len(operands) - len(named)
        return function(*operands[:split], **dict(zip(named, operands[split:], strict=True)))

    def name(text: str) -> Any:
        if text not in names:
            raise NameError(f"name {text!r} is not defined")
        return names[text]

    def take_items(iterator: Iterator[Any], count: int) -> list[Any]:
        items: list[Any] = [False]
        while len(items) <= count:
            try:
                items.append(next(iterator))
            except StopIteration:
                items[0] = True
                break
        return items

    def wait_for(awaitable: Any) -> Any:
        import asyncio

        async def wait() -> Any:
            return await awaitable

        return asyncio.run(wait())

    return {
        "name": name,
        "call": call,
        "next": take_items,
        "await": wait_for,
        "getattr": getattr,
        "setattr": setattr,
        "delattr": delattr,
        "getitem": lambda value, key: value[key],
        "setitem": lambda value, key, item: value.__setitem__(key, item),
        "delitem": lambda value, key: value.__delitem__(key),
        "iter": iter,
        "next one": next,
        "len": len,
        "str": str,
        "repr": repr,
        "dir": dir,
        "enter": lambda value: type(value).__enter__(value),
        "exit": lambda value, error: type(value).__exit__(value, error and type(error), error, None),
    }
