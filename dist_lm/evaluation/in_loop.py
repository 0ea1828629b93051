"""Evaluates tasks during training: which are due at a step, their questions, and the metrics of the answers.

The questions, their order and the random numbers of their answers are those of stage `evaluate` with one greedy answer,
so both give the same figures for the same weights.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dist_lm.config.evaluation import CODE_TASKS, OWN_TESTS
from dist_lm.config.root import Config
from dist_lm.errors import UserError
from dist_lm.evaluation.figures import recorded, refused, request_of, task_figures
from dist_lm.evaluation.tasks import Asking, Item, Record, asks_as_chat, hidden_seed_of, items_of
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
    steps: int  # steps of the run
    seed: int

    def due(self, step: int) -> tuple[str, ...]:
        """Returns the tasks that are evaluated after `step` steps."""
        is_last = step == self.steps
        return tuple(task for task, every in self.every.items() if is_last or (every and step % every == 0))

    def of(self, tasks: Iterable[str]) -> "Round":
        """Returns an evaluation of these tasks."""
        questions = [(task, question) for task in tasks for question in self.items[task]]
        return Round(questions, self.seed)


class Round:
    """One evaluation: its requests, and the judgements of the answers."""

    def __init__(self, questions: Sequence[tuple[str, Item]], seed: int) -> None:
        self._questions = questions
        self.requests: list[Request] = [
            request_of(number, task, question, seed)
            for number, (task, question) in enumerate(questions)
            if not question.error
        ]
        self.executes = any(task in CODE_TASKS for task, _ in questions)
        # Functions that wait for a judgement and return its record, by the number of the question.
        self._records: dict[int, Callable[[], Record]] = {
            number: _refusal(question, question.error)
            for number, (_, question) in enumerate(questions)
            if question.error
        }

    @property
    def size(self) -> int:
        """Number of questions."""
        return len(self._questions)

    def take(self, result: Answer | Refusal, sandboxes: Sandboxes | None) -> None:
        """Begins to judge an answer, or notes a refusal, which counts as failed; a second one to the same question is
        ignored.

        Args:
            sandboxes: run the programs of tasks with code; None if the round has none.
        """
        number = int(result.request)
        if number in self._records:
            return

        _, question = self._questions[number]
        if isinstance(result, Refusal):
            self._records[number] = _refusal(question, result.error)
        else:
            self._records[number] = recorded(question, result, question.judge(result, sandboxes))

    def records(self, alive: Callable[[], None]) -> dict[str, list[Record]]:
        """Waits for the judgements and returns the records of each task, in the order of its questions.

        Every question must have been taken. An error of the sandboxes is raised here.

        Args:
            alive: called after each record.
        """
        records: dict[str, list[Record]] = {}
        for number, (task, _) in enumerate(self._questions):
            records.setdefault(task, []).append(self._records[number]())
            alive()
        return records


def loop_tasks(config: Config, run: RunDirectory, tokenizer: Tokenizer) -> LoopTasks:
    """Returns the tasks of `stage.eval_tasks` with all their questions, for one greedy answer each.

    Raises:
        UserError: a task cannot be asked; its class is that of the error, and the message names the task.
        ArtefactError: the file of a task has changed since the run began, or it began with tests of our own problems
            that this release has not.
        OSError: a file cannot be read.
    """
    stage = config.stage
    as_chat = asks_as_chat(stage.name, tokenizer)
    hidden_seed = hidden_seed_of(run.tests_version(OWN_TESTS), config.seed, run.path)
    asking = Asking.greedy(tokenizer, config.model.max_seq_len, as_chat, stage.eval_new_tokens, hidden_seed)

    questions = {}
    for task in stage.eval_tasks:
        try:
            questions[task] = items_of(task, asking, config.eval.files, config.corpus_in(run.work, "tools"))
        except UserError as error:
            raise type(error)(f"stage.eval_tasks: {task}: {error}") from error
    # Checked after the reading: a file that has changed gave other questions than those of the run.
    run.require_files(config.noted_files)
    return LoopTasks(stage.eval_tasks, questions, stage.steps, config.seed)


def figure_name(task: str) -> str:
    """Returns the name of the metric that every evaluation of a task has."""
    return f"eval/{task}/{FIGURE}"


def metrics_of(records: Mapping[str, list[Record]]) -> dict[str, float]:
    """Returns `eval/TASK/pass@1` with the ends of its interval, `eval/TASK/low` and `high`, for each task.

    Args:
        records: by task; at least one of each.
    """
    metrics = {}
    for task, task_records in records.items():
        figure = task_figures(task_records, [1])["figures"][FIGURE]
        metrics[figure_name(task)] = figure["value"]
        metrics[f"eval/{task}/low"] = figure["low"]
        metrics[f"eval/{task}/high"] = figure["high"]
    return metrics


def write_records(run: RunDirectory, step: int, records: Mapping[str, list[Record]]) -> None:
    """Writes the answers of each task with their verdicts, a JSON object in each line."""
    for task, task_records in records.items():
        path = run.task_samples(task, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in task_records]
        durable.write_text(path, "".join(lines))


def _refusal(question: Item, error: str) -> Callable[[], Record]:
    return lambda: refused(question, error)
