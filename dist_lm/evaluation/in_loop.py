"""Tasks during training: which are due at a step, their questions, and the metrics of the answers.

The questions, their order and the random numbers of their answers are those of stage `evaluate` with one greedy answer,
so both give the same figures for the same weights.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dist_lm.config.evaluation import CODE_TASKS
from dist_lm.config.root import Config
from dist_lm.errors import UserError
from dist_lm.evaluation.figures import recorded, refused, request_of, task_figures
from dist_lm.evaluation.tasks import Asking, Item, Record, asks_as_chat, items_of
from dist_lm.generation.request import Answer, Refusal, Request
from dist_lm.sandbox.pool import Sandboxes
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer

FIGURE = "pass@1"


@dataclass(frozen=True)
class LoopTasks:
    """The tasks of a training run."""

    every: Mapping[str, int]  # steps between two evaluations; 0: only after the last step
    items: Mapping[str, Sequence[Item]]
    steps: int  # of the run
    seed: int

    def due(self, step: int) -> tuple[str, ...]:
        """The tasks that are evaluated after `step` steps."""
        last = step == self.steps
        return tuple(task for task, every in self.every.items() if last or (every and step % every == 0))

    def of(self, tasks: Iterable[str]) -> "Round":
        """The questions of these tasks."""
        questions = [(task, item) for task in tasks for item in self.items[task]]
        return Round(questions, self.seed)


class Round:
    """One evaluation: its requests, and what becomes of the answers."""

    def __init__(self, questions: Sequence[tuple[str, Item]], seed: int) -> None:
        self._questions = questions
        self.requests: list[Request] = [
            request_of(number, task, item, seed) for number, (task, item) in enumerate(questions) if not item.error
        ]
        self.executes = any(task in CODE_TASKS for task, _ in questions)
        self._waiting: dict[int, Callable[[], Record]] = {
            number: _refusal(item, item.error) for number, (_, item) in enumerate(questions) if item.error
        }

    @property
    def size(self) -> int:
        """The number of its questions."""
        return len(self._questions)

    def take(self, result: Answer | Refusal, sandboxes: Sandboxes | None) -> None:
        """Begin to judge an answer; a second one to the same question is ignored."""
        number = int(result.request)
        if number in self._waiting:
            return
        item = self._questions[number][1]
        if isinstance(result, Refusal):
            self._waiting[number] = _refusal(item, result.error)
        else:
            self._waiting[number] = recorded(item, result, item.judge(result, sandboxes))

    def records(self, alive: Callable[[], None]) -> dict[str, list[Record]]:
        """The records of each task, in the order of its questions; waits for the judgements.

        Args:
            alive: called after each of them.
        """
        found: dict[str, list[Record]] = {}
        for number, (task, _) in enumerate(self._questions):
            found.setdefault(task, []).append(self._waiting[number]())
            alive()
        return found


def loop_tasks(config: Config, run: RunDirectory, tokenizer: Tokenizer) -> LoopTasks:
    """The tasks of `stage.eval_tasks`.

    Raises:
        UserError: a task cannot be asked; names it.
        ArtefactError: the file of a task has changed since the run began.
    """
    stage = config.stage
    chat = asks_as_chat(stage.name, tokenizer)
    asking = Asking.greedy(tokenizer, config.model.max_seq_len, chat, stage.eval_new_tokens)
    items = {}
    for task in stage.eval_tasks:
        try:
            items[task] = items_of(task, asking, config.eval.files, run.work.path / "corpora")
        except UserError as error:
            raise type(error)(f"stage.eval_tasks: {task}: {error}") from error
    run.require_files(config.noted_files)
    return LoopTasks(stage.eval_tasks, items, stage.steps, config.seed)


def figure_name(task: str) -> str:
    """The metric that every evaluation of a task has."""
    return f"eval/{task}/{FIGURE}"


def metrics_of(records: Mapping[str, list[Record]]) -> dict[str, float]:
    """`eval/TASK/pass@1` with the ends of its interval."""
    metrics = {}
    for task, own in records.items():
        figure = task_figures(own, [1])["figures"][FIGURE]
        metrics |= {figure_name(task): figure["value"]}
        metrics |= {f"eval/{task}/{end}": figure[end] for end in ("low", "high")}
    return metrics


def write_records(run: RunDirectory, step: int, records: Mapping[str, list[Record]]) -> None:
    """Write the answers of each task with their verdicts, an object a line."""
    for task, own in records.items():
        path = run.task_samples(task, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in own))


def _refusal(item: Item, error: str) -> Callable[[], Record]:
    return lambda: refused(item, error)
