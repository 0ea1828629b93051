"""Rules: the parts of a reward that need no model. A rule judges a batch of completions and may fail on some.

A reward that is a reward model alone (the default of `conf/stage/rlhf.yaml`) has no rule, and nothing here runs.

| kind of part | score | where it runs |
| --- | --- | --- |
| length | closeness to a number of tokens | here |
| parses | whether the text parses; it is not executed | here |
| function | a user's function of completion and row | in a process of its own (`reward_function.py`) |
| tests | share of the task's tests that the completion passes | in sandboxes, beside generation |
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, Protocol

from dist_lm.data import order
from dist_lm.environments.protocol import LARGEST_REWARD
from dist_lm.errors import UserError
from dist_lm.rlhf.config import RewardPartConfig
from dist_lm.sandbox.hidden import References, ReferenceSolutionError
from dist_lm.sandbox.pool import Sandboxes, SandboxPool
from dist_lm.sandbox.program import Limits, Verdict
from dist_lm.sandbox.sandbox import fences
from dist_lm.sandbox.syntax import parses, parses_continued, whole_lines
from dist_lm.sandbox.task import Task
from dist_lm.storage.json_process import JsonProcess

log = logging.getLogger(__name__)

Alive = Callable[[], None]
"""Called while a rule works, from any thread."""

LOADING_S = 300.0  # seconds within which a user's function and its imports must be loaded
LONGEST_REASON = 300  # characters of an unexpected answer in a message
ALL_TESTS = "all"
ALIVE_S = 1.0  # seconds between two signs of life while a program runs
BATCH = 64  # completions in a call of a function that takes many; more if one prompt has more


class RewardError(UserError):
    """The reward of an iteration cannot be computed."""


@dataclass(frozen=True)
class PromptRow:
    """What the data say about a prompt; JSON values."""

    messages: Sequence[Mapping[str, Any]] = ()  # its turns in OpenAI's format
    columns: Mapping[str, Any] = field(default_factory=dict)  # all columns of its row, as the file has them


@dataclass(frozen=True)
class RuleInput:
    """The text of a rollout and the facts that a rule may use; it has no score yet."""

    prompt: str  # as the model sees it, without the names of special tokens; the key of its tests
    completion: str
    new_tokens: int
    ended: bool  # it ended by a stop token and was not cut off
    position: int = 0  # position of its prompt in the order of prompts
    sample: int = 0  # number among the completions of its prompt
    request: str = ""  # text of the user's last turn in the prompt; not a `Request` of the engine
    tokens: Sequence[int] = field(default=(), compare=False)  # ids of the completion
    row: PromptRow = field(default=PromptRow(), compare=False)  # the prompt's


@dataclass(frozen=True)
class Failure:
    """A completion has no score."""

    reason: str


Score = float | Failure | None
"""A number, or why there is none. None: the rule does not apply to this completion, which is no failure."""


class Rule(Protocol):
    """One part of the reward. It may keep processes between calls, which `close` ends."""

    def __call__(self, judged: Sequence[RuleInput], alive: Alive) -> Iterator[Score]:
        """Yields a finite number, a failure or None for each completion, in order.

        Raises:
            UserError: the rule can judge nothing, whatever the completion.
        """
        ...

    def close(self) -> None:
        """Ends the rule's processes. A later call starts them again."""
        ...


# --- plain functions of the text ---


@dataclass(frozen=True)
class TextRule:
    """A `Rule` that is a plain function."""

    score: Callable[[RuleInput], Score]

    def __call__(self, judged: Sequence[RuleInput], alive: Alive) -> Iterator[Score]:
        for rollout in judged:
            alive()
            yield self.score(rollout)

    def close(self) -> None:
        """There is no process to end."""


def length_rule(target: int) -> TextRule:
    """Returns the rule that gives 1 at `target` tokens, falling linearly to 0 at no tokens and at twice as many."""
    return TextRule(lambda judged: max(0.0, 1 - abs(judged.new_tokens - target) / target))


def parses_rule(language: str, of: str) -> TextRule:
    """Returns the rule that gives 1 if the text parses, else 0, and a failure if the parser gives no verdict in time.

    The last line of a completion that was cut off does not count; with `document`, one that was cut off in its first
    line gets 0. No code is executed.

    Args:
        language: python | bash | sql.
        of: document (request and completion as one text) | completion.
    """

    def score(judged: RuleInput) -> Score:
        if of == "document":
            verdict = parses_continued(language, judged.request, judged.completion, judged.ended)
        else:
            verdict = parses(language, whole_lines(judged.completion, judged.ended))
        if verdict is None:
            return Failure(f"the parser of {language} gave no verdict in time")
        return float(verdict)

    return TextRule(score)


# --- a user's function, in its own process ---


class FunctionRule:
    """A `Rule` that calls a user's function in its own process.

    The process gets many completions at once, and answers one by one. A completion on which the function raises, hangs,
    ends its process or returns no finite number of fp32 is a `Failure`. After a hang or an exit the process is started
    again, for the completions that are left.

    A function that takes many completions (`reward_forms`) gets all those of several prompts in one call, `BATCH` or
    fewer. If the call fails, each of these prompts gets a call of its own, so a failure costs one prompt.
    """

    def __init__(self, path: str, key: str, timeout_s: float) -> None:
        """Starts the process.

        Args:
            path: 'package.module:name' of a function that has one of the forms in `reward_forms`.
            key: the config key, for messages.
            timeout_s: limit in seconds for each completion of a call.
        """
        self._path, self._key, self._timeout_s = path, key, timeout_s
        self._process: JsonProcess | None = None
        self._loaded: Mapping[str, Any] = {}  # the first message of the process
        self._start()

    def __call__(self, judged: Sequence[RuleInput], alive: Alive) -> Iterator[Score]:
        """Yields the scores.

        Raises:
            RewardError: the function cannot be imported in its process, or has none of the forms.
        """
        if judged and self._ready(alive) and self._loaded["batched"]:
            for batch in whole_prompts(judged, BATCH):
                yield from self._batch_scores(batch, alive)
            return

        n_scored = 0
        while n_scored < len(judged):
            # A failure may have ended the process, so each round asks for it anew.
            process = self._ready(alive)
            for score, _ in self._scores(process, judged[n_scored:], self._timeout_s, alive):
                n_scored += 1
                yield score

    def close(self) -> None:
        """Ends the process."""
        if self._process:
            self._process.end()
        self._process, self._loaded = None, {}

    @property
    def pid(self) -> int | None:
        """Id of the process; None: the next call starts one."""
        return self._process.pid if self._process else None

    def _start(self) -> JsonProcess:
        # The process finds the function where this one does.
        path = os.pathsep.join(folder for folder in sys.path if folder)
        environment = dict(os.environ) | {"PYTHONPATH": path}
        self._process = JsonProcess("dist_lm.rlhf.reward_function", self._path, environment=environment)
        return self._process

    def _ready(self, alive: Alive) -> JsonProcess:
        """Returns the process once it has imported the function; starts one if there is none.

        Raises:
            RewardError: the import fails, ends the process or takes longer than LOADING_S seconds; the process is
                ended.
        """
        process = self._process or self._start()
        if self._loaded:
            return process

        try:
            self._loaded = process.receive(LOADING_S, _calling(alive))
            reason = self._loaded.get("refused")
        except TimeoutError:
            reason = f"importing it takes longer than {LOADING_S:.0f} s"
        except (EOFError, OSError, ValueError):
            reason = f"importing it ended the process (exit code {process.code()})"
        if reason:
            self.close()
            raise RewardError(f"{self._key}={self._path}: {reason}")
        return process

    def _batch_scores(self, batch: Sequence[RuleInput], alive: Alive) -> list[Score]:
        """Returns the scores of the completions of several prompts, of one call or of one for each prompt.

        Raises:
            RewardError: as `__call__`.
        """
        limit_s = self._timeout_s * len(batch)
        scored = list(self._scores(self._ready(alive), batch, limit_s, alive))
        failed = next((score.reason for score, of_call in scored if of_call and isinstance(score, Failure)), "")
        prompts = whole_prompts(batch, 1)
        if not failed:
            return [score for score, _ in scored]
        if len(prompts) == 1:
            return [Failure(failed)] * len(batch)

        log.info(
            "%s=%s: a call with %d completions failed (%s); each of its %d prompts gets a call",
            *(self._key, self._path, len(batch), failed, len(prompts)),
        )
        return [score for prompt in prompts for score in self._batch_scores(prompt, alive)]

    def _scores(
        self, process: JsonProcess, judged: Sequence[RuleInput], limit_s: float, alive: Alive
    ) -> Iterator[tuple[Score, bool]]:
        """Yields the scores up to the first completion that costs the process, which is a `Failure`; then the process
        is ended. With each it yields whether a failure is that of the call, not of the completion alone.

        The process is ended, too, if the caller stops early.

        Args:
            limit_s: seconds until the first answer, and between two answers.
        """
        answered = 0
        try:
            process.send(_request(judged, self._loaded["rows"]), limit_s)
            while answered < len(judged):
                answer = process.receive(limit_s, _calling(alive))
                answered += 1
                yield _score_of_answer(answer), bool(answer.get("call"))
            return
        except TimeoutError as error:
            reason = str(error)
        except (EOFError, OSError, ValueError):
            reason = f"ended its process (exit code {process.code()})"
        finally:
            # End the process: nobody needs the scores that it still computes.
            if answered < len(judged):
                self.close()

        yield Failure(reason), True


def whole_prompts(judged: Sequence[RuleInput], most: int) -> list[list[RuleInput]]:
    """Returns the completions in batches of at most `most`, in their order. The completions of a prompt, which follow
    one another, stay together, in a larger batch if need be: functions may compare them."""
    batches: list[list[RuleInput]] = []
    for _, group in groupby(judged, key=lambda rollout: rollout.position):
        rollouts = list(group)
        if not batches or len(batches[-1]) + len(rollouts) > most:
            batches.append([])
        batches[-1] += rollouts
    return batches


def _request(judged: Sequence[RuleInput], with_rows: bool) -> dict[str, Any]:
    """Returns the message that `reward_function.judged_of` reads; a row that several completions share is sent once."""
    rows: list[tuple[Any, Any]] = []
    number_of: dict[int, int] = {}  # id of a row -> its number in the message
    listed = []
    for rollout in judged:
        number = number_of.setdefault(id(rollout.row), len(number_of))
        if with_rows and number == len(rows):
            rows.append((list(rollout.row.messages), dict(rollout.row.columns)))
        listed.append((number, rollout.request, rollout.completion, list(rollout.tokens) if with_rows else []))
    return {"judged": listed, "rows": rows}


def _calling(alive: Alive) -> Callable[[], bool]:
    """Returns the `interrupted` of `JsonProcess.receive`: it calls `alive` and never interrupts."""

    def interrupted() -> bool:
        alive()
        return False

    return interrupted


def _score_of_answer(answer: dict[str, Any]) -> Score:
    if answer.get("none"):
        return None
    value = answer.get("value")
    if isinstance(value, float):
        if abs(value) <= LARGEST_REWARD:
            return value
        return Failure(f"returned {value:g}; expected a number within the range of fp32")
    return Failure(str(answer.get("failure", f"answered {answer!s:.{LONGEST_REASON}}")))


# --- tests, in the sandbox ---


class TestsRule:
    """A `Rule` that runs the answer to a task with the task's tests, in the sandbox.

    Programs run while the engines draw other completions; with a pool of actors they run on the cores of all nodes. A
    program starts as soon as its completion is there (`begin`), and its verdict is read when the iteration's rollouts
    are judged. A program that fails, hangs or takes
    too much has a score; an error of the sandbox gives none, so that completion leaves the iteration.

    Hidden tests of a task depend on (seed, position of the prompt, its text): all completions of a prompt have the
    same ones, and the next time that it is drawn they are others.
    """

    __test__ = False  # pytest would take the class for tests

    def __init__(
        self,
        key: str,
        part: RewardPartConfig,
        tasks: Mapping[str, Task],
        trust_me: bool,
        sandboxes: Callable[[int, bool], Sandboxes] = SandboxPool,
        seed: int = 0,
    ) -> None:
        """
        Args:
            key: the config key, for messages.
            tasks: by the text of the prompt.
            trust_me: run programs without isolation where this machine has none.
            sandboxes: opens the sandboxes from (programs at a time on a node, trust_me); called at the first program.
            seed: of the run.

        Raises:
            SandboxError: this machine has no sandbox.
        """
        self._key, self._tasks, self._seed = key, tasks, seed
        self._references = References()
        self._needs_all = part.score == ALL_TESTS
        self._limits = Limits(cpu_s=part.cpu_s, wall_s=part.wall_s)
        self._open_sandboxes = partial(sandboxes, part.workers, trust_me)
        self._sandboxes: Sandboxes | None = None
        self._running: dict[RuleInput, Future[Verdict]] = {}
        log.info("%s: %s", key, fences(trust_me).describe())

    def begin(self, judged: RuleInput) -> None:
        """Starts the program of a completion that will be judged later; the first call opens the sandboxes.

        Raises:
            RewardError: the prompt has no tests.
            SandboxError: this machine has no sandbox.
        """
        self._running[judged] = self._submit(judged)

    def __call__(self, judged: Sequence[RuleInput], alive: Alive) -> Iterator[Score]:
        """Yields the share of tests passed, or 1 only if all are.

        Raises:
            RewardError: a prompt has no tests, or its own solution fails on inputs that were drawn.
        """
        verdicts = [self._running.pop(rollout, None) or self._submit(rollout) for rollout in judged]
        for rollout, verdict in zip(judged, verdicts, strict=True):
            try:
                yield self._score(_waited(verdict, alive))
            except ReferenceSolutionError as error:
                raise RewardError(f"{self._key}: `hidden` of the prompt {rollout.prompt!r:.200}: {error}") from error

    def close(self) -> None:
        """Ends the sandboxes."""
        self._running.clear()
        sandboxes, self._sandboxes = self._sandboxes, None
        if sandboxes is not None:
            sandboxes.__exit__()

    def _submit(self, judged: RuleInput) -> Future[Verdict]:
        task = self._tasks.get(judged.prompt)
        if task is None:
            raise RewardError(f"{self._key}: no tests for the prompt {judged.prompt!r:.200}")
        if self._sandboxes is None:
            self._sandboxes = self._open_sandboxes().__enter__()

        program = task.program(judged.completion)
        if task.hidden is None:
            return self._sandboxes.submit(program, self._limits)
        key = order.key(order.Shuffle.HIDDEN_TESTS, self._seed, judged.position, order.text_word(judged.prompt))
        return self._references.submit(program, task.hidden, key, self._sandboxes, self._limits)

    def _score(self, verdict: Verdict) -> Score:
        if not verdict.judged:
            return Failure(f"the sandbox failed: {verdict.output}")
        share = verdict.passed / verdict.total
        return float(share == 1) if self._needs_all else share


def _waited(verdict: Future[Verdict], alive: Alive) -> Verdict:
    """Waits for a verdict without a limit and returns it; calls `alive` each second. An error of the program's future
    is raised."""
    while True:
        alive()
        try:
            return verdict.result(ALIVE_S)
        except NotYetError:
            # The verdict itself may have ended with this error.
            if verdict.done():
                return verdict.result()
