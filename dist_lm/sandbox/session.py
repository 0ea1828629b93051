"""Runs code of a model turn after turn, in a sandbox that keeps files, and in Python all variables.

    with Sandbox() as sandbox:
        session = Session(sandbox, "python")
        session.run("x = 2")
        print(session.run("x + 2").output)  # 4

Equal code gives equal output, as far as it reads no clock, no address and no random device: the seed of `random`, the
hash seed, process numbers and time zone are fixed.
"""

import hashlib
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from signal import SIGKILL
from typing import Literal, Self

from dist_lm.errors import require
from dist_lm.sandbox.program import Limits
from dist_lm.sandbox.sandbox import Sandbox, SandboxError, fences
from dist_lm.sandbox.turns import FACTS
from dist_lm.sandbox.watched import DONE, OUTPUT, STARVED, TIMEOUT, TROUBLE

SessionLanguage = Literal["python", "bash"]
TURN_LIMITS = Limits(cpu_s=5.0, wall_s=20.0)
SESSION_CPU_S = 60.0
AGAIN_S = 60.0  # most seconds for code that is run once more
MOST_CODE = 64 << 10  # bytes of the code of a turn

TurnOutcome = Literal["ended", "timeout", "output", "lost"]
_OUTCOMES: dict[int, TurnOutcome] = {DONE: "ended", TIMEOUT: "timeout", OUTPUT: "output", STARVED: "timeout"}


class SessionFailedError(RuntimeError):
    """Raised if the machine has no core for a session, or its sandbox fails: this says nothing about the code."""


@dataclass(frozen=True)
class Turn:
    """The work of the code of a turn."""

    outcome: TurnOutcome  # ended; passed a limit of time or output; or lost: it ended the whole session, with its files
    exit_code: int  # 0: the code came to its end
    output: str  # all that it printed, errors included, in their order
    is_fresh: bool  # whether the next turn in Python begins without variables

    @property
    def is_right(self) -> bool:
        """Whether the code came to its end."""
        return self.outcome == "ended" and self.exit_code == 0

    @property
    def was_killed(self) -> bool:
        """Whether something, perhaps the code itself, has killed the program or the sandbox; limits excepted."""
        return self.outcome == "lost" or (self.outcome == "ended" and self.exit_code == -SIGKILL)


class Session:
    """One session in a sandbox that does nothing else meanwhile. Not for several threads at once.

    Args:
        limits: of each turn; sizes hold for all of them.
        cpu_s: CPU seconds of all turns in sum; then every turn is a `timeout`.
        trust_me: as in `Sandbox`.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        language: SessionLanguage,
        limits: Limits = TURN_LIMITS,
        cpu_s: float = SESSION_CPU_S,
        trust_me: bool = False,
    ) -> None:
        require(language in ("python", "bash"), "language", language, "python | bash")
        self._sandbox, self._language, self._limits = sandbox, language, limits
        self._remaining_cpu_s = cpu_s
        self._trust_me = trust_me
        self._is_open = False

    def run(self, code: str) -> Turn:
        """Runs the code of a turn, waits for it and returns what it did. The first turn begins the session.

        Code with a NUL, or of more than MOST_CODE bytes, is not run: its turn has `ended` with exit code 1, and the
        output gives the reason. If the code ends the sandbox, the turn is `lost`, and the next one begins a session.

        Raises:
            SessionFailedError: the machine has no core for it, or the sandbox failed, and a control program shows that
                the code is not the cause.
            SandboxError: no sandbox can be made here.
        """
        content = code.encode(errors="replace")
        if len(content) > MOST_CODE or b"\0" in content:
            return Turn("ended", 1, f"code with a NUL, or of more than {MOST_CODE:,} bytes, is refused\n", False)

        try:
            if not self._is_open:
                self._sandbox.begin_session(self._language, self._limits, self._remaining_cpu_s)
                self._is_open = True
            answer = self._sandbox.ask_turn(content, self._limits.wall_s)
            ended, exit_code, is_fresh, cpu_s, _ = FACTS.unpack_from(answer)
            if ended == TROUBLE:
                raise OSError(answer[FACTS.size :].decode(errors="replace"))
        except OSError as error:
            # The next turn begins another session. Only a machine in trouble excuses the code.
            self._sandbox.close()
            self._is_open = False
            self._refuse_trouble(f"{type(error).__name__}: {error}")
            return Turn("lost", 1, "", True)

        self._remaining_cpu_s -= cpu_s
        output = answer[FACTS.size :].decode(errors="replace")
        if ended == STARVED:
            self._refuse_trouble("no core for the code")
        return Turn(_OUTCOMES[ended], exit_code, output, is_fresh)

    def close(self) -> None:
        """Ends the session with its processes and files; the sandbox can run other programs then."""
        if self._is_open:
            self._sandbox.end_session()
            self._is_open = False

    def _refuse_trouble(self, reason: str) -> None:
        """Raises SessionFailedError if a program of known cost has no core on this machine either."""
        # In a sandbox of its own, since that of the session has failed, or still holds it.
        with Sandbox(self._trust_me) as control:
            if not control.control_passes(self._limits):
                raise SessionFailedError(reason)


class SessionPool:
    """Sessions side by side: each has a sandbox of its own, which is used again when the session has ended.

    A session whose program or sandbox is killed or fails runs all its code once more in another sandbox. If that gives
    the same turns and is not killed in turn, the session goes on there; else it goes on as it is. Code that kills its
    session each time therefore finds no difference, and no code can choose to have no turn.

    Args:
        workers: turns that run at once; others wait.
        trust_me: run code without isolation where the machine allows none.
    """

    def __init__(self, workers: int, trust_me: bool = False) -> None:
        self._workers, self._trust_me = workers, trust_me
        self._lock = threading.Lock()
        self._idle: list[Sandbox] = []
        self._all: list[Sandbox] = []
        self._threads: ThreadPoolExecutor | None = None
        self.num_run_again = 0  # sessions so far that have run their code once more

    def __enter__(self) -> Self:
        """Raises SandboxError if no sandbox can be made here."""
        fences(self._trust_me)
        # A sandbox ends with the thread that started it, so these threads start them.
        self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="session")
        return self

    def __exit__(self, *_exception: object) -> None:
        assert self._threads is not None
        self._threads.shutdown(cancel_futures=True)
        for sandbox in self._all:
            sandbox.close()
        self._all, self._idle, self._threads = [], [], None

    def begin(
        self,
        language: SessionLanguage,
        limits: Limits = TURN_LIMITS,
        cpu_s: float = SESSION_CPU_S,
        most_again_s: float = AGAIN_S,
    ) -> "PooledSession":
        """Returns a session. Nothing is started before its first turn.

        Args:
            language, limits, cpu_s: as in `Session`; code that is run once more has these CPU seconds again.
            most_again_s: most seconds for code that is run once more; a turn that begins in time may pass them.
        """
        return PooledSession(self, language, limits, cpu_s, most_again_s)

    def _take(self) -> Sandbox:
        with self._lock:
            if self._idle:
                return self._idle.pop()
            sandbox = Sandbox(self._trust_me)
            self._all.append(sandbox)
            return sandbox

    def _give_back(self, sandbox: Sandbox) -> None:
        with self._lock:
            self._idle.append(sandbox)


class PooledSession:
    """A session of a pool; its turns run in the order in which they are given, in threads of the pool."""

    def __init__(
        self, pool: SessionPool, language: SessionLanguage, limits: Limits, cpu_s: float, most_again_s: float
    ) -> None:
        self._language: SessionLanguage = language
        self._pool, self._limits, self._cpu_s, self._most_again_s = pool, limits, cpu_s, most_again_s
        self._turn = threading.Lock()  # held while a thread works on the session
        self._sandbox: Sandbox | None = None
        self._session: Session | None = None
        self._history: list[tuple[str, bytes]] = []  # code of the turns so far, with the hashes of what they did
        self._was_run_again = False
        self.seconds_again = 0.0  # time for code that was run once more
        self._is_closed = False

    def run(self, code: str) -> Future[Turn]:
        """Runs code as `Session.run`; the future raises what that raises. Give the next turn when this one is done."""
        assert self._pool._threads is not None, "a SessionPool is a context manager"
        return self._pool._threads.submit(self._run, code)

    def close(self) -> None:
        """Ends the session, behind a turn that runs; may be called twice. Does not wait."""
        if self._pool._threads is not None:
            self._pool._threads.submit(self._close)

    def _run(self, code: str) -> Turn:
        with self._turn:
            if self._is_closed:
                raise SessionFailedError("the session has been closed")
            if self._session is None:
                self._sandbox, self._session = self._begun()

            turn, failure = None, None
            try:
                turn = self._session.run(code)
            except SessionFailedError as error:
                failure = error
            if (turn is None or turn.was_killed) and not self._was_run_again:
                self._was_run_again = True
                turn = self._run_again(code) or turn

            if turn is None:
                assert failure is not None
                raise failure
            if not self._was_run_again:
                self._history.append((code, _hash_of(turn)))
            return turn

    def _run_again(self, code: str) -> Turn | None:
        """Runs all turns so far and this one in another sandbox, where the session then goes on; returns the turn.

        None: it was killed there as well, a turn did something else than before, or there was no time. The session then
        goes on where it was.
        """
        with self._pool._lock:
            self._pool.num_run_again += 1
        begin = time.monotonic()
        sandbox, session = self._begun()
        try:
            turn = self._repeated(session, code, begin + self._most_again_s)
        except (SessionFailedError, SandboxError):
            # The machine is in trouble. The first try has a turn, which no code may exchange for a failure.
            turn = None
        finally:
            self._history = []  # there is no third try
            self.seconds_again = time.monotonic() - begin

        if turn is None:
            session.close()
            self._pool._give_back(sandbox)
            return None
        assert self._session is not None
        assert self._sandbox is not None
        self._session.close()
        self._pool._give_back(self._sandbox)
        self._sandbox, self._session = sandbox, session
        return turn

    def _repeated(self, session: Session, code: str, deadline: float) -> Turn | None:
        """Runs the turns so far in a new session, then `code`; see `_run_again`."""
        for earlier_code, hash_before in self._history:
            if time.monotonic() > deadline or _hash_of(session.run(earlier_code)) != hash_before:
                return None
        if time.monotonic() > deadline:
            return None
        turn = session.run(code)
        return None if turn.was_killed else turn

    def _begun(self) -> tuple[Sandbox, Session]:
        sandbox = self._pool._take()
        return sandbox, Session(sandbox, self._language, self._limits, self._cpu_s, self._pool._trust_me)

    def _close(self) -> None:
        with self._turn:
            if self._session and self._sandbox and not self._is_closed:
                self._session.close()
                self._pool._give_back(self._sandbox)
            self._is_closed = True


def _hash_of(turn: Turn) -> bytes:
    """Returns a hash of all that a turn did; outputs themselves would fill the memory."""
    return hashlib.sha256(repr(astuple(turn)).encode()).digest()
