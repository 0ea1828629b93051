"""The controller of RLHF in a process of its own, which the first rank starts (`rlhf.controller=process`).

    first rank    call (JSON), weights     ->   child    a `Controller`, with prompts, environments and engines
                  reply (JSON), rollouts   <-

Both ends talk over a socket pair. A message is one byte with two descriptors of shared memory: the message, as
`messages.encode` has it, and a large value: weights on the way there, rollouts on the way back. The first rank passes
the memory of the rollouts on to the others as it is. A byte without descriptors is a sign of life. No message is
unpickled.

If the child dies, the first rank starts another one from a `ControllerState` and the weights that draw the rollouts
still to come: those of the present version, and with `max_staleness` in lock-step as many older ones. That is all a
controller goes on from, so the rollouts are the same bit for bit. Asynchronous sampling goes on from its record.
"""

import json
import logging
import mmap
import os
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace

import torch

from dist_lm.generation.decoder import WeightStream
from dist_lm.parallel.node_memory import NodeMemory
from dist_lm.rlhf.controller import Controller, ControllerState, Records
from dist_lm.rlhf.rollouts import ScoredRollouts

log = logging.getLogger(__name__)

ALIVE, MESSAGE = b".", b"m"
SIGN_EVERY_S = 0.5  # between two signs of life
END_S = 20.0  # for the child to end its actors, before it is killed
MOST_DEATHS = 3  # in a row, without rollouts in between
ALIGNMENT = 64  # bytes; where each parameter begins
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


class ControllerLostError(RuntimeError):
    """The process of the controller has died repeatedly."""


class _LostError(Exception):
    """The process has died once."""


# --- messages ---


@dataclass(frozen=True)
class Parameter:
    """Where a parameter lies in the memory of all of them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte offset


@dataclass(frozen=True)
class Call:
    """A call of a controller's method; what a method does not read stays at its default."""

    method: str  # start, begin, push, take, ahead, answers, evaluate, records
    version: int = 0  # of the weights; of `take`: the iteration
    seed: int = 0
    state: ControllerState | None = None
    tasks: tuple[str, ...] = ()  # of `evaluate`
    parameters: tuple[Parameter, ...] = ()  # of the weights that come along


@dataclass(frozen=True)
class Done:
    """A method has returned; rollouts come along with the reply to `take` and to `answers`."""

    prompts: int = 0  # that an iteration has used
    times: Mapping[str, float] = field(default_factory=dict)  # metrics of `Controller.times`


@dataclass(frozen=True)
class Failed:
    """A method has raised."""

    classes: tuple[str, ...]  # of the error and its bases, the nearest first
    message: str
    traceback: str


def _send(connection: socket.socket, message: Call | Done | Failed, large: NodeMemory | None = None) -> None:
    memories = [NodeMemory.of(message), *([large] if large else [])]
    socket.send_fds(connection, [MESSAGE], [memory.fileno() for memory in memories])
    memories[0].close()


def _receive(connection: socket.socket) -> tuple[NodeMemory, NodeMemory | None] | None:
    """Returns a message and what came along; None for a sign of life.

    Raises:
        EOFError, OSError: the other end has closed.
    """
    content, descriptors, _, _ = socket.recv_fds(connection, 1, 2, socket.MSG_CMSG_CLOEXEC)
    if not content:
        raise EOFError
    if content == ALIVE:
        return None
    memories = [NodeMemory(descriptor) for descriptor in descriptors]
    return memories[0], memories[1] if len(memories) > 1 else None


# --- weights ---


@dataclass(frozen=True)
class SharedWeights:
    """Parameters one after the other in shared memory, in the order of their stream."""

    memory: NodeMemory
    parameters: tuple[Parameter, ...]

    @classmethod
    def of(cls, weights: WeightStream) -> "SharedWeights":
        """Copies a stream of weights to new shared memory and returns that. The stream is read to its end, and one
        parameter at a time is in the memory of this process.

        Raises:
            OSError: no memory is left.
        """
        parameters: list[Parameter] = []
        descriptor = os.memfd_create("dist_lm_weights")
        memory = NodeMemory(descriptor)
        begin = 0
        for name, tensor in weights:
            values = tensor.detach().cpu().contiguous()
            parameters.append(Parameter(name, str(values.dtype), tuple(values.shape), begin))
            content = values.reshape(-1).view(torch.uint8).numpy().data
            # A call writes 2 GiB at most.
            while content:
                written = os.pwrite(descriptor, content, begin)
                begin, content = begin + written, content[written:]
            begin += -begin % ALIGNMENT
        os.ftruncate(descriptor, max(1, begin))
        return cls(memory, tuple(parameters))

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields name and tensor of each parameter, in its own dtype and shape; the tensors lie in the memory.

        A change of one is not seen in other processes.
        """
        mapped = mmap.mmap(self.memory.fileno(), 0, access=mmap.ACCESS_COPY)
        for parameter in self.parameters:
            dtype, count = DTYPES[parameter.dtype], torch.Size(parameter.shape).numel()
            values = torch.frombuffer(mapped, dtype=dtype, count=count, offset=parameter.begin)
            yield parameter.name, values.view(parameter.shape)


# --- the first rank ---


@dataclass(frozen=True)
class Evaluation:
    """Tasks that the engines answer."""

    tasks: tuple[str, ...]
    weights: SharedWeights | None  # None: those that were pushed
    records: Records = field(default_factory=dict)  # filled once they are there


class ControllerProcess:
    """A `Controller` in a child process; a `RolloutController`. As a context manager it ends the child.

    Methods raise what the controller's raise, by the classes of `errors`; another error is a RuntimeError with the
    traceback of the child. They raise ControllerLostError if the child dies `MOST_DEATHS` times in a row.
    """

    def __init__(
        self,
        start: Callable[[], tuple["subprocess.Popen[bytes]", socket.socket]],
        weights: WeightStream,
        errors: tuple[type[Exception], ...],
        alive: Callable[[], None] = lambda: None,
        staleness: int = 0,
    ) -> None:
        """Starts the child and waits until it has its parts.

        Args:
            start: starts a process that calls `serve_controller`; see `json_process.start_json_process`. From the main
                thread: the child dies with the thread that has started it.
            weights: of any version of the policy; read to the end.
            alive: called regularly while this process waits for the child.
            staleness: versions between the weights that draw an iteration and the policy; 0 for a schedule that can go
                on from any weights.
        """
        self._start, self._alive, self._staleness = start, alive, staleness
        self._errors = {error.__name__: error for error in errors}
        # From these another child would begin: a state between `begin` and `end`, the weights of its version, and
        # those that were pushed later.
        self._state: ControllerState | None = None
        self._weights = {0: SharedWeights.of(weights)}
        self._evaluations: dict[int, Evaluation] = {}  # those without records, by version, ascending
        self._times: dict[str, float] = {}
        self._deaths = 0  # since the last rollouts
        self._restarts = 0
        self._process, self._connection = start()
        try:
            self._ask(Call("start"), self._weights[0])
        except BaseException:
            self._kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, state: ControllerState, weights: WeightStream) -> None:
        """Starts, or resumes, with the weights of the state's version, which are read to the end."""
        self._weights = {state.version: SharedWeights.of(weights)}
        self._state = state
        self._ask(Call("begin", state=state), self._weights[state.version])

    def push(self, version: int, weights: WeightStream) -> None:
        """Reads new weights to the end; they draw later rollouts."""
        assert self._state is not None
        self._weights[version] = SharedWeights.of(weights)
        self._drop_old_weights()
        self._ask(Call("push", version), self._weights[version])

    def take(self, iteration: int) -> NodeMemory:
        """Waits for the rollouts of an iteration, from 0; returns the memory of a `Drawn`, which the caller closes."""
        assert self._state is not None
        reply, drawn = self._ask(Call("take", iteration))
        assert drawn is not None
        state = self._state
        pending = {i: scored for i, scored in state.pending.items() if i > iteration}
        self._state = replace(
            state, position=state.position + reply.prompts, pending=pending, taken=iteration + 1 - state.version
        )
        # Evaluations that were queued before these rollouts are done, and their weights can go.
        for version in [version for version in self._evaluations if version < iteration - self._staleness]:
            self._collect(version)
        self._drop_old_weights()
        self._times = dict(reply.times)
        self._deaths = 0
        return drawn

    def ahead(self, version: int) -> dict[int, ScoredRollouts]:
        """Waits for the rollouts drawn ahead that a checkpoint at `version` keeps, see `Controller.ahead`."""
        if not self._staleness:
            return {}
        _, rollouts = self._ask(Call("ahead", version))
        assert rollouts is not None
        return rollouts.read(dict[int, ScoredRollouts])

    def end(self) -> None:
        """Ends the iterations; answers can still be drawn."""
        self._state = None

    def times(self) -> dict[str, float]:
        """Returns metrics of waiting times of the last rollouts, and how often the child was started again."""
        return self._times | {"perf/controller_restarts": float(self._restarts)}

    def answers(self, version: int, weights: WeightStream, seed: int) -> ScoredRollouts:
        """Returns an answer to each held-out prompt, see `Controller.answers`. Not between `begin` and `end`."""
        assert self._state is None
        self._weights = {version: SharedWeights.of(weights)}
        _, answers = self._ask(Call("answers", version, seed), self._weights[version])
        assert answers is not None
        return answers.read(ScoredRollouts)

    def evaluate(self, tasks: Sequence[str], version: int, weights: WeightStream | None) -> Callable[[], Records]:
        """Queues the questions of tasks, see `Controller.evaluate`.

        Args:
            version: version of the weights that answer.
            weights: the weights of that version, if they are not pushed; read to the end.

        Returns:
            A function that waits for the answers and returns their records; later calls return the same.
        """
        own_weights = SharedWeights.of(weights) if weights is not None else None
        evaluation = self._evaluations[version] = Evaluation(tuple(tasks), own_weights)
        self._ask(Call("evaluate", version, tasks=evaluation.tasks), own_weights)

        def wait_for_records() -> Records:
            if version in self._evaluations:
                self._collect(version)
            return evaluation.records

        return wait_for_records

    def close(self) -> None:
        """Ends the child, which ends its actors and environments."""
        self._connection.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._kill()

    def __enter__(self) -> "ControllerProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _collect(self, version: int) -> None:
        """Waits for the records of an evaluation."""
        _, records = self._ask(Call("records", version))
        assert records is not None
        self._evaluations.pop(version).records.update(json.loads(records.read(str)))

    def _drop_old_weights(self) -> None:
        """Moves the state to the oldest weights that draw rollouts still to be taken, or are evaluated, and drops older
        ones."""
        assert self._state is not None
        next_iteration = self._state.version + self._state.taken
        version = max(self._state.version, next_iteration - self._staleness)
        version = min(version, *self._weights.keys() & self._evaluations.keys(), max(self._weights))
        self._weights = {number: weights for number, weights in self._weights.items() if number >= version}
        # The position is that of the next iteration, whatever the version is.
        self._state = replace(self._state, version=version, taken=next_iteration - version)

    def _ask(self, call: Call, weights: SharedWeights | None = None) -> tuple[Done, NodeMemory | None]:
        """Returns the reply to a call with these weights, of another child if this one dies.

        Raises:
            ControllerLostError, RuntimeError, and those of `errors`: see the class.
        """
        try:
            return self._exchange(call, weights)
        except _LostError:
            pass
        while True:
            self._start_again()
            with suppress(_LostError):
                reply = self._bring_up()
                # A new child has been told what these tell.
                is_told = call.method in ("start", "begin", "push", "evaluate")
                return reply if is_told else self._exchange(call, weights)

    def _bring_up(self) -> tuple[Done, NodeMemory | None]:
        """Lets a new child begin where the last one was; returns its last reply.

        Raises:
            _LostError, RuntimeError, and those of `errors`: see `_exchange`.
        """
        first = min(self._weights)
        reply = self._exchange(Call("start"), self._weights[first])
        if self._state is None:
            return reply

        for version in sorted({*self._weights, *self._evaluations}):
            weights = self._weights.get(version)
            if version == first:
                reply = self._exchange(Call("begin", state=self._state), weights)
            elif weights:
                reply = self._exchange(Call("push", version), weights)
            # The engines may lack the weights, if all their rollouts were taken.
            if evaluation := self._evaluations.get(version):
                call = Call("evaluate", version, tasks=evaluation.tasks)
                reply = self._exchange(call, weights or evaluation.weights)
        return reply

    def _exchange(self, call: Call, weights: SharedWeights | None) -> tuple[Done, NodeMemory | None]:
        """Sends a call with the weights that it reads, and waits for the reply.

        Raises:
            _LostError: the child has died.
            RuntimeError, and those of `errors`: see the class.
        """
        if weights:
            call = replace(call, parameters=weights.parameters)
        try:
            _send(self._connection, call, weights.memory if weights else None)
            while (received := _receive(self._connection)) is None:
                self._alive()
        except (EOFError, ConnectionError) as error:
            raise _LostError from error

        message, large = received
        reply = message.read(Done | Failed)
        if isinstance(reply, Failed):
            raise self._error_of(reply)
        return reply, large

    def _error_of(self, failed: Failed) -> Exception:
        """Returns the error that the controller has raised, for the caller to raise.

        It is of the first of its classes that `errors` holds, with the same message, and its traceback is logged; any
        other error becomes a RuntimeError whose message has the traceback.
        """
        for name in failed.classes:
            if error_class := self._errors.get(name):
                log.info("the controller's process: %s", failed.traceback)
                # A class may build its message from other arguments, so its `__init__` is left out.
                error = error_class.__new__(error_class)
                error.args = (failed.message,)
                return error
        return RuntimeError(f"{failed.classes[0]}: {failed.message}\nin the controller's process: {failed.traceback}")

    def _start_again(self) -> None:
        """Starts another child.

        Raises:
            ControllerLostError: too many have died in a row.
        """
        self._kill()
        self._deaths += 1
        code = self._process.returncode
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        if self._deaths > MOST_DEATHS:
            raise ControllerLostError(
                f"rlhf.controller=process: the controller's process has ended {self._deaths} times in a row without "
                f"rollouts, the last time {how}; the log of rank 0 has what it printed"
            )
        log.warning(
            "rlhf.controller=process: the controller's process %d ended %s; it starts again", self._process.pid, how
        )
        self._restarts += 1
        self._process, self._connection = self._start()

    def _kill(self) -> None:
        """Kills the child, but not those it has started: they end with it, some after they have cleaned up."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


# --- the child ---


OpenController = Callable[[WeightStream, Callable[[], None]], AbstractContextManager[Controller]]
"""(weights, sign of life) -> opens the controller with its parts."""


def serve_controller(connection: socket.socket, open_controller: OpenController) -> None:
    """Answers the first rank's calls until it closes the socket, or one of them fails: the error is the last reply."""
    with connection:
        try:
            sign = _signs_of_life(connection)
            calls = _calls(connection)
            for call, large in calls:
                with open_controller(_weights_of(call, large), sign) as controller:
                    _send(connection, Done())
                    child = _Child(controller)
                    for call, large in calls:
                        reply, drawn = child.called(call, large)
                        _send(connection, reply, drawn)
        except Exception as error:
            classes = tuple(error_class.__name__ for error_class in type(error).__mro__)
            with suppress(ConnectionError):
                _send(connection, Failed(classes, str(error), traceback.format_exc()))


def _calls(connection: socket.socket) -> Iterator[tuple[Call, NodeMemory | None]]:
    """Yields calls, each with the memory that comes along or None, until the other end closes its connection, which
    raises nothing.
    """
    while True:
        try:
            received = _receive(connection)
        except (EOFError, ConnectionError):
            return
        assert received is not None
        message, large = received
        yield message.read(Call), large


def _weights_of(call: Call, memory: NodeMemory | None) -> WeightStream:
    assert memory is not None
    return SharedWeights(memory, call.parameters).stream()


@dataclass(frozen=True)
class _Child:
    """The controller of the child, and the evaluations that nobody has asked for yet, by version."""

    controller: Controller
    evaluations: dict[int, Callable[[], Records]] = field(default_factory=dict)

    def called(self, call: Call, large: NodeMemory | None) -> tuple[Done, NodeMemory | None]:
        """Makes a call; returns the reply with what comes along.

        Raises:
            OSError: no memory is left.
        """
        controller = self.controller
        match call.method:
            case "begin":
                assert call.state is not None
                controller.begin(call.state, _weights_of(call, large))
            case "push":
                controller.push(call.version, _weights_of(call, large))
            case "take":
                drawn = controller.take(call.version)
                return Done(drawn.scored.prompts, controller.times()), NodeMemory.of(drawn)
            case "ahead":
                return Done(), NodeMemory.of(controller.ahead(call.version))
            case "answers":
                # Answers come before `begin`, or after the last iteration.
                controller.end()
                return Done(), NodeMemory.of(controller.answers(call.version, _weights_of(call, large), call.seed))
            case "evaluate":
                weights = _weights_of(call, large) if large else None
                self.evaluations[call.version] = controller.evaluate(call.tasks, call.version, weights)
            case "records":
                return Done(), NodeMemory.of(json.dumps(self.evaluations.pop(call.version)()))
            case method:
                raise AssertionError(method)
        return Done(), None


def _signs_of_life(connection: socket.socket) -> Callable[[], None]:
    """Returns a function that sends a sign of life, from any thread, but not often.

    Nobody may read the signs for a while, because the first rank trains beside the controller. Those that find no room
    are left out.
    """
    lock, sent_at = threading.Lock(), -SIGN_EVERY_S

    def sign() -> None:
        nonlocal sent_at
        with lock:
            if time.monotonic() - sent_at < SIGN_EVERY_S:
                return
            sent_at = time.monotonic()
        # The first rank may be gone, and this process with it soon.
        with suppress(OSError):
            connection.send(ALIVE, socket.MSG_DONTWAIT)

    return sign
