"""The work of stage `evaluate` for one model: asks the questions of its tasks, judges and writes the answers.

The answers to a block of questions are a file, written when all are judged. The random numbers of an answer are keyed
by (seed, task, question, index). So after a kill the missing files are made again with the same content.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lm.config.evaluation import OWN_TASKS, OWN_TESTS
from dist_lm.errors import UserError
from dist_lm.evaluation.bits_per_byte import document_bits, documents_of, text_corpora
from dist_lm.evaluation.figures import bits_figures, recorded, refused, request_of, reward_figures, task_figures
from dist_lm.evaluation.tasks import (
    BITS,
    CODE_TASKS,
    REWARD,
    Asking,
    Item,
    Record,
    asks_as_chat,
    hidden_seed_of,
    items_of,
    limits_of,
)
from dist_lm.generation.request import Answer, AnswerSets, Refusal, Request, SamplingParams
from dist_lm.sandbox.pool import Sandboxes
from dist_lm.stages.evaluate.inputs import corpus_folder, labels_of, refuse_other_inputs, table_of, version_of_tests
from dist_lm.stages.evaluate.reward import prompts_of, reward_scores
from dist_lm.stages.registry import load_config
from dist_lm.stages.stage import PoolWork
from dist_lm.storage import durable
from dist_lm.storage.durable import json_lines
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dist_lm.stages.evaluate.stage import EvaluateRunConfig


@dataclass(frozen=True)
class _Part:
    """A block of questions of a task, and its file."""

    task: str
    first: int  # question
    items: tuple[Item, ...]
    path: Path


class Evaluation(PoolWork):
    """The questions to one model."""

    def __init__(
        self,
        config: "EvaluateRunConfig",
        run: RunDirectory,
        tokenizer: Tokenizer,
        open_sandboxes: Callable[[], Sandboxes],
    ) -> None:
        """Makes the questions, and finds the existing files.

        Raises:
            UserError: a task cannot be asked; names it.
            ArtefactError: the run began with tests of our own problems that this release has not.
        """
        stage, checkpoint = config.stage, Path(config.stage.models[0])
        self._config = config
        self._run = run
        self._tokenizer = tokenizer
        self._open_sandboxes = open_sandboxes
        self._work = WorkDirectory(Path(config.work_dir))

        # Labels tell the models of the whole run apart; `config` has only one of them.
        run_stage: Any = load_config(run.config).stage if run.config.exists() else stage
        model_paths = [Path(path) for path in run_stage.models]
        self._labels = dict(zip(run_stage.models, labels_of(model_paths), strict=True))
        self.label = self._labels[stage.models[0]]
        self._folder = run.samples / self.label.replace("/", "_")
        self._folder.mkdir(parents=True, exist_ok=True)

        self.chat = stage.chat == "always" or (stage.chat == "auto" and answers_requests(checkpoint, tokenizer))
        params = SamplingParams(
            max_new_tokens=stage.max_new_tokens,
            temperature=stage.temperature,
            top_k=stage.top_k,
            top_p=stage.top_p,
        )
        limits = limits_of(stage.cpu_s)
        self._hidden_seed = hidden_seed_of(version_of_tests(run), config.seed, run.path)
        asking = Asking(
            tokenizer,
            config.model.max_seq_len,
            self.chat,
            params,
            stage.n,
            limits,
            self._hidden_seed,
            stage.constrain_calls,
        )
        if BITS in self._unmeasured:
            has_default_corpora = stage.corpora == type(stage)().corpora
            corpora = [corpus_folder(config, name) for name in stage.corpora]
            self._corpora = text_corpora(corpora, may_lack=has_default_corpora)
        self._prompts_asked = prompts_of(config.eval.prompts) if REWARD in stage.tasks else []

        # Questions are numbered through all tasks; their numbers key the random numbers of answers.
        tools = corpus_folder(config, "tools")
        self._parts = list[_Part]()
        n_questions = 0
        for task in stage.tasks:
            if task != BITS:
                items = named(
                    task,
                    lambda task=task: items_of(task, asking, config.eval.files, tools, self._prompts_asked),
                )
                self._parts += _in_parts(task, n_questions, items, stage.questions_per_part, self._folder)
                n_questions += len(items)
        self._items = [(part, item) for part in self._parts for item in part.items]
        self._part_of = [number for number, part in enumerate(self._parts) for _ in part.items]
        self._missing = {number for number, part in enumerate(self._parts) if not part.path.exists()}

        self._answers = AnswerSets()
        self._judged: dict[int, list[Callable[[], Record]]] = {}  # question -> records of its answers
        self._sandboxes: Sandboxes | None = None
        self._closing = ExitStack()
        self._tokens = 0
        self._before = self._prompts_of_others()
        self._prompts = sum(len(part.items) for number, part in enumerate(self._parts) if number not in self._missing)
        self.count = self._before + len(self._items)

    @property
    def asks(self) -> bool:
        return bool(self._missing)

    @property
    def is_done(self) -> bool:
        return not self._missing and not self._unmeasured

    @property
    def done(self) -> tuple[int, int]:
        return self._before + self._prompts, self._tokens

    @property
    def table(self) -> Path:
        return table_of(self._run)

    def _measured(self, task: str) -> Path:
        """Returns the file of a task that is measured in this process."""
        return self._folder / f"{task}.jsonl"

    @property
    def _unmeasured(self) -> list[str]:
        """Tasks that are measured in this process and have no file yet."""
        measured_here = [task for task in (BITS, REWARD) if task in self._config.stage.tasks]
        return [task for task in measured_here if not self._measured(task).exists()]

    def metrics(self) -> dict[str, float]:
        return {"generate/prompts": self.done[0], "generate/tokens": self._tokens}

    def requests(self) -> Iterator[Request]:
        """Yields requests for the questions of missing files. Those that cannot be asked are recorded here."""
        for number, (part, item) in enumerate(self._items):
            if self._part_of[number] not in self._missing:
                continue
            if item.error:
                self._refuse(number, item.error)
                continue
            yield request_of(number, part.task, item, self._config.seed)

    def take(self, result: Answer | Refusal) -> None:
        """Starts to judge the answers to a question once all are there.

        Writes the files of other blocks whose questions are all answered; waits for their judgements. A refusal counts
        as all answers to its question. If any task of the stage has code, the sandboxes start at the first question,
        of any task, that has all answers.

        Raises:
            SandboxError: programs cannot be run.
        """
        number = int(result.request)
        item = self._items[number][1]
        answers = self._answers.add(result, item.n)
        if isinstance(answers, Refusal):
            self._refuse(number, answers.error)
        # Others of this question are still missing.
        if not isinstance(answers, list):
            return

        if self._sandboxes is None and any(task in CODE_TASKS for task in self._config.stage.tasks):
            self._sandboxes = self._closing.enter_context(self._open_sandboxes())
        self._tokens += sum(len(answer.tokens) for answer in answers)
        self._keep(number, [recorded(item, answer, item.judge(answer, self._sandboxes)) for answer in answers])

    def finish(self, keep_going: Callable[[], bool]) -> None:
        """Waits for the last judgements and ends the sandboxes, then measures bits per byte and scores of the reward
        model, and writes them. Once `keep_going` returns False it returns early, with the rest missing.

        Raises:
            ArtefactError: an input has changed since the run began, or a checkpoint, corpus or tokenizer is missing or
                damaged.
            ConfigError: there is no file of prompts for the task reward, or this node has no GPU for device=cuda.
            OSError: a file cannot be read.
        """
        for number in sorted(self._missing):
            if keep_going():
                self._write(number)
        self.close()
        if self._missing:
            return

        for task in self._unmeasured:
            refuse_other_inputs(self._run, self._config)
            if not keep_going():
                return
            records = self._bits(keep_going) if task == BITS else self._rewards(keep_going)
            if records is not None:
                durable.write_text(self._measured(task), "".join(json.dumps(record) + "\n" for record in records))

    def close(self) -> None:
        """Ends the sandboxes; programs that have not begun never do."""
        self._sandboxes = None
        self._closing.close()

    def result(self) -> dict[str, Any]:
        return {
            "model": self.label,
            "checkpoint": self._config.stage.models[0],
            "chat": self.chat,
            "tasks": {task: self._figures(task) for task in self._config.stage.tasks},
        }

    def _refuse(self, number: int, error: str) -> None:
        item = self._items[number][1]
        self._keep(number, [lambda: refused(item, error)])

    def _keep(self, number: int, records: list[Callable[[], Record]]) -> None:
        """Stores the records of a question, and writes other files that are complete, after waiting for their
        judgements; the newest one may still be judged.
        """
        self._judged[number] = records
        self._prompts += 1
        part = self._part_of[number]
        # The newest block may still be judged.
        for number_of_part in sorted(self._missing - {part}):
            self._write(number_of_part)

    def _write(self, number: int) -> None:
        """Writes the file of a part, one JSON record a line, once all of its questions are answered; does nothing
        before.

        It waits for the judgements of the answers, which are forgotten afterwards.

        Args:
            number: number of the part.

        Raises:
            OSError: the file cannot be written.
        """
        part = self._parts[number]
        numbers = range(part.first, part.first + len(part.items))
        if any(question not in self._judged for question in numbers):
            return
        records = [record() for question in numbers for record in self._judged.pop(question)]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        durable.write_text(part.path, lines)
        self._missing.remove(number)

    def _prompts_of_others(self) -> int:
        """Questions that other models of the run have answered."""
        folders = [self._run.samples / label.replace("/", "_") for label in self._labels.values()]
        files = [file for folder in folders if folder != self._folder for file in sorted(folder.glob("*-*.jsonl"))]
        return sum(record["index"] == 0 for file in files for record in json_lines(file))

    def _bits(self, keep_going: Callable[[], bool]) -> list[Record] | None:
        stage = self._config.stage
        documents = documents_of(self._corpora, self._work.tokenizer_model, stage.documents)
        return document_bits(Path(stage.models[0]), self._config, self._tokenizer, documents, keep_going)

    def _rewards(self, keep_going: Callable[[], bool]) -> list[Record] | None:
        texts = {str(prompt.id): prompt.text for prompt in self._prompts_asked}
        model = Path(self._config.eval.reward_model).expanduser()
        return reward_scores(model, self._config, self._records(REWARD), texts, keep_going)

    def _records(self, task: str) -> list[Record]:
        return [record for part in self._parts if part.task == task for record in json_lines(part.path)]

    def _figures(self, task: str) -> dict[str, Any]:
        """Returns the figures of a task, from the records that were written for it; those of our own tasks with version
        and seed of their drawn tests.

        Raises:
            OSError: a file of records cannot be read.
        """
        if task == BITS:
            return bits_figures(list(json_lines(self._measured(BITS))))
        if task == REWARD:
            return reward_figures(list(json_lines(self._measured(REWARD))))
        figures = task_figures(self._records(task), self._config.stage.k if task in CODE_TASKS else [1])
        # Results of the fixed tests alone have no note: releases before wrote none.
        if task in OWN_TASKS and self._hidden_seed is not None:
            figures["tests"] = {"version": OWN_TESTS, "seed": self._hidden_seed}
        return figures


def answers_requests(checkpoint: Path, tokenizer: Tokenizer) -> bool:
    """Returns whether a model was trained on conversations: in its stage, or before its import."""
    stage = checkpoint.parts[-4] if len(checkpoint.parts) > 3 else ""
    imported = checkpoint.parents[1] / "chat_template.jinja"
    return asks_as_chat(stage, tokenizer) or (stage == "import" and imported.is_file())


def named(task: str, make: Callable[[], list[Item]]) -> list[Item]:
    """Returns the questions of a task that `make` gives.

    Raises:
        UserError: its own class of error, with the name of the task in front.
    """
    try:
        return make()
    except UserError as error:
        raise type(error)(f"stage.tasks: {task}: {error}") from error


def _in_parts(task: str, first: int, items: list[Item], size: int, folder: Path) -> list[_Part]:
    return [
        _Part(task, first + begin, tuple(items[begin : begin + size]), folder / f"{task}-{begin // size:03d}.jsonl")
        for begin in range(0, len(items), size)
    ]
