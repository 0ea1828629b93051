"""Stage `evaluate`: scores models on tasks with a pool of engines, and compares them.

    work/runs/evaluate/RUN_ID/
      samples/STAGE_RUN_STEP/own_python-000.jsonl ...   answers with their verdicts, a file for a block of questions
      samples/table.jsonl                               a line for a figure
      result.json

This module has the keys and the checks before anything starts.
`work.py` asks one model.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from dist_lm.config.model import ModelConfig
from dist_lm.config.pool import EngineConfig
from dist_lm.config.root import TRUST_ME, Config
from dist_lm.config.stage import SamplingConfig, StageGroup
from dist_lm.errors import ArtefactError, ConfigError, require
from dist_lm.evaluation.comparison import compared_tasks, comparison_text, figures_of, rows_of, shortened
from dist_lm.stages.continuing import EVALUATION_FREE_KEYS, EVALUATION_KEYS, differing_keys, refuse_other_settings
from dist_lm.stages.evaluate.inputs import (
    TESTS,
    begun_with,
    inputs_of,
    labels_of,
    refuse_other_inputs,
    table_of,
    version_of_tests,
)
from dist_lm.stages.generate.stage import newest_run
from dist_lm.stages.registry import load_config
from dist_lm.stages.stage import Action, Look, PoolStage, PoolWork, run_of
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.readable import counted
from dist_lm.training import checkpoint_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from dist_lm.generation.engine_options import EngineOptions
    from dist_lm.sandbox.pool import Sandboxes
    from dist_lm.tokenizer.tokenizer import Tokenizer
    from dist_lm.tracking.console import Console

AUTO = "auto"
FIGURE_WIDTH = 44  # columns of a figure's name, so that a table has at most 100
OWN_TASKS = ["own_python", "own_bash", "own_sql"]


@dataclass
class EvaluateConfig(SamplingConfig, EngineConfig, StageGroup):
    """Models, tasks, sampling parameters and size of the engines."""

    models: list[str] = field(
        default_factory=lambda: [AUTO]
    )  # runs or checkpoints; auto: the newest, as stage.generate
    tasks: list[str] = field(default_factory=lambda: list(OWN_TASKS))  # see dist_lm/evaluation/tasks.py
    chat: str = AUTO  # always | never | auto: questions are turns of a user if the model was trained on conversations
    n: int = 1  # answers to a question about code
    k: list[int] = field(default_factory=lambda: [1])  # pass@k, each at most n
    max_new_tokens: int = 512
    temperature: float = 0.0
    cpu_s: float = 3.0  # CPU time of a program with its tests
    documents: int = 200  # held-out documents of each corpus, for bits_per_byte; 0: all
    corpora: list[str] = field(default_factory=lambda: ["language", "code"])  # for bits_per_byte
    constrain_calls: bool = False  # tasks tools and bfcl: only calls that fit their tool's schema can be drawn
    questions_per_part: int = 25  # questions of a task in a file; after a kill an unfinished file is asked again

    def __post_init__(self) -> None:
        self.check_sampling("stage")
        self.check_actors("stage")
        for key in ("n", "cpu_s", "questions_per_part"):
            require(getattr(self, key) > 0, f"stage.{key}", getattr(self, key), "more than 0")
        require(self.documents >= 0, "stage.documents", self.documents, "0 (all) or a positive integer")
        require(self.chat in (AUTO, "always", "never"), "stage.chat", self.chat, "auto, always or never")
        require(bool(self.models) and all(self.models), "stage.models", self.models, "runs or checkpoints, or auto")
        require(bool(self.tasks), "stage.tasks", self.tasks, "at least one task")
        require(bool(self.corpora), "stage.corpora", self.corpora, "at least one corpus")
        require(
            bool(self.k) and all(0 < k <= self.n for k in self.k), "stage.k", self.k, f"numbers up to stage.n={self.n}"
        )
        require(
            self.n == 1 or self.temperature > 0, "stage.n", self.n, "1 with stage.temperature=0: all answers are equal"
        )


@dataclass
class EvaluateRunConfig(Config):
    """The whole configuration of stage `evaluate`."""

    stage: EvaluateConfig = MISSING


class Evaluate(PoolStage):
    name = "evaluate"
    result_kinds = {"models": list}  # noqa: RUF012
    schema = EvaluateRunConfig

    def check(self, config: Config) -> None:
        """Refuses unknown or repeated tasks, tasks without their file, and a reward model that gives no scores. It
        reads the files and prompts, and tries the sandbox.

        Raises:
            ConfigError: names the key.
            ArtefactError: the reward model's checkpoint is missing.
            UserError: what a task needs is not installed.
            OSError: a file cannot be read.
        """
        from dist_lm.evaluation.tasks import FILE_TASKS, REWARD, TASKS, check_tasks

        config = evaluate_config(config)
        unknown = [task for task in config.stage.tasks if task not in TASKS]
        require(not unknown, "stage.tasks", config.stage.tasks, f"some of {', '.join(TASKS)}")
        require(
            len({*config.stage.tasks}) == len(config.stage.tasks), "stage.tasks", config.stage.tasks, "different tasks"
        )
        for task in config.stage.tasks:
            if task in FILE_TASKS:
                path = getattr(config.eval, task)
                require(bool(path), f"eval.{task}", path, f"the file of the task {task}, in its published format")
        if REWARD in config.stage.tasks:
            from dist_lm.generation.load import model_config_of
            from dist_lm.stages.evaluate.reward import prompts_of

            prompts_of(config.eval.prompts)
            reward = config.eval.reward_model
            require(bool(reward), "eval.reward_model", "", "a run of stage=reward")
            head = model_config_of(checkpoint_files.find_checkpoint(Path(reward).expanduser())).head
            require(head == "scalar", "eval.reward_model", reward, f"a run of stage=reward; its model.head is {head}")
        check_tasks(config.stage.tasks, config.eval.files, config.sandbox == TRUST_ME)

    def look(self, config: Config, *, is_target: bool, rebuilt: Collection[str]) -> Look:
        """Returns what is there of the run and what is to do, with the paths of checkpoints in `stage.models`.

        An unfinished run keeps the checkpoints that it began with, even if there are newer ones.

        Raises:
            ConfigError: the run exists with other settings, or two models are the same.
            ArtefactError: a checkpoint is missing, or a file has changed since the run began.
            OSError: a file cannot be read.
        """
        config, run = evaluate_config(config), run_of(config)
        # Else it was refused before its first question.
        has_begun = run.inputs.exists() or run.result.exists()
        recorded = evaluate_config(load_config(run.config)) if has_begun else None
        unfinished = None if run.result.exists() else recorded

        # Newer checkpoints change no run: with `auto` a finished one has its own, and an unfinished one keeps them.
        if recorded and not unfinished and config.stage.models == [AUTO]:
            checkpoints = [Path(path) for path in recorded.stage.models]
        else:
            begun_with_of: dict[str, str] = {}
            if unfinished:
                begun_with_of = dict(zip(config.stage.models, unfinished.stage.models, strict=False))
            checkpoints = [checkpoint_of(path, config, begun_with_of.get(path)) for path in config.stage.models]
        require(len({*checkpoints}) == len(checkpoints), "stage.models", config.stage.models, "different models")
        labels = labels_of(checkpoints)
        config = replace(config, stage=replace(config.stage, models=[str(path) for path in checkpoints]))
        config = with_reward_checkpoint(config, unfinished.eval.reward_model if unfinished else None)

        if recorded:
            conflicts = [
                conflict
                for key in EVALUATION_KEYS
                for conflict in differing_keys(recorded, config, key, EVALUATION_FREE_KEYS)
            ]
            refuse_other_settings(run, config, conflicts)
            refuse_other_inputs(run, config)

        if run.result.exists():
            return Look(config, Action.READY, figures_of(self.read_result(run)))
        detail = f"{', '.join(labels)} on {', '.join(config.stage.tasks)}"
        n_files = len(list(run.samples.glob("*/*.jsonl")))
        if n_files:
            return Look(config, Action.RESUME, f"{detail}; {counted(n_files, 'file')} there")
        return Look(config, Action.BUILD, detail)

    def rounds(self, config: Config) -> Sequence[Config]:
        config = evaluate_config(config)
        return [of_model(config, Path(path)) for path in config.stage.models]

    def checkpoint(self, config: Config) -> Path:
        return Path(evaluate_config(config).stage.models[0])

    def tokenizer(self, config: Config) -> "Tokenizer":
        from dist_lm.generation.load import stage_tokenizer

        return stage_tokenizer(self.checkpoint(config), WorkDirectory(Path(config.work_dir)), config.model.vocab_size)

    def engine(self, config: Config) -> tuple["EngineOptions", int, int]:
        """Returns (size of an engine, GPUs per engine, number of engines; -1: as many as fit).

        The cache holds at least one whole context.

        Raises:
            ConfigError: the model cannot be split over parallel.tp devices, or a size is out of bounds.
        """
        from dist_lm.generation.engine_options import EngineOptions
        from dist_lm.generation.shard import check_tp

        config = evaluate_config(config)
        tp = 1 if config.parallel.tp == -1 else config.parallel.tp
        check_tp(config.model, tp, None, "parallel.tp")
        cache = max(config.stage.cache_tokens, config.model.max_seq_len)
        stage = config.stage
        options = EngineOptions(
            cache, page_tokens=stage.page_tokens, max_sequences=stage.max_sequences, step_tokens=stage.step_tokens
        )
        return options, tp, config.stage.actors

    def work(
        self, config: Config, run: RunDirectory, tokenizer: "Tokenizer", sandboxes: "Callable[[], Sandboxes]"
    ) -> PoolWork:
        """Opens the work of one model and records the hashes of its inputs in `prompts.json`, with the version of the
        tests of our own problems.

        Raises:
            ArtefactError: a file has changed since the run began, or it began with tests that this release has not.
            UserError: a task cannot be asked.
            OSError: a file cannot be read.
        """
        from dist_lm.stages.evaluate.work import Evaluation

        config = evaluate_config(config)
        # They may have changed while another model was asked.
        refuse_other_inputs(run, config)
        inputs = begun_with(run) | inputs_of(config) | {TESTS: str(version_of_tests(run))}
        work = Evaluation(config, run, tokenizer, sandboxes)
        durable.write_sealed(run.inputs, inputs)
        # They may have changed between hashing and reading.
        refuse_other_inputs(run, config)
        return work

    def joined(self, config: Config, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns all models with the comparison of each with the first one; writes `samples/table.jsonl`."""
        table = [row for result in results for row in rows_of(result)]
        durable.write_text(table_of(run_of(config)), "".join(json.dumps(row) + "\n" for row in table))
        first_model, *other_models = results
        comparisons = [comparison for model in other_models for comparison in compared_tasks(first_model, model)]
        return {"models": list(results), "comparisons": comparisons}

    def summarize(self, config: Config, console: "Console") -> None:
        """Prints a table of each model's figures with their intervals, within 100 columns, and the comparisons.

        Raises:
            ArtefactError: a file is damaged.
        """
        run = run_of(config)
        result = self.read_result(run)
        for model in result["models"]:
            rows = []
            for row in rows_of(model):
                interval = f"{row['low']:.3f} to {row['high']:.3f}" if row["low"] is not None else ""
                figure = shortened(row["figure"], FIGURE_WIDTH)
                rows.append((row["task"], figure, f"{row['value']:.3f}", interval, f"{row['items']:,}"))
            title = f"{model['model']}, with intervals of 95 %"
            console.table(title, ("task", "figure", "value", "interval", "items"), rows)
        for comparison in result["comparisons"]:
            console.line(comparison_text(comparison))
        console.line(f"answers: {run.samples}")

    def figures(self, result: Mapping[str, Any]) -> str:
        return figures_of(result) if result else ""


def evaluate_config(config: Config) -> EvaluateRunConfig:
    """Returns `config` with the type of this stage."""
    assert isinstance(config, EvaluateRunConfig)
    return config


def with_reward_checkpoint(config: EvaluateRunConfig, before: str | None) -> EvaluateRunConfig:
    """Returns the configuration with a checkpoint in `eval.reward_model`; unchanged without the task reward.

    This checkpoint scores all models of the run, even if the run of the reward model writes a newer one meanwhile.

    Args:
        before: see `checkpoint_in`.

    Raises:
        ArtefactError: there is none.
    """
    if "reward" not in config.stage.tasks:
        return config
    checkpoint = checkpoint_in(Path(config.eval.reward_model).expanduser().resolve(), before)
    return replace(config, eval=replace(config.eval, reward_model=str(checkpoint)))


def checkpoint_of(path: str, config: EvaluateRunConfig, before: str | None) -> Path:
    """Returns the absolute path of a model's checkpoint.

    Args:
        path: run, checkpoint, or auto: the newest of the code or language stage.
        before: see `checkpoint_in`.

    Raises:
        ArtefactError: there is none.
    """
    if path != AUTO:
        return checkpoint_in(Path(path).expanduser().resolve(), before)
    work = WorkDirectory(Path(config.work_dir).resolve())
    run = Path(before).parents[1] if before else newest_run(work, "stage.models", "[PATH]").path
    return checkpoint_in(run, before)


def checkpoint_in(named: Path, before: str | None) -> Path:
    """Returns the newest checkpoint of what is named, or the one that an unfinished run began with.

    Args:
        before: the checkpoint of the run, which it keeps while it exists, even if there are newer ones.

    Raises:
        ArtefactError: there is none.
    """
    if before and Path(before).is_relative_to(named) and Path(before).is_dir():
        return Path(before)
    return checkpoint_files.find_checkpoint(named)


def of_model(config: EvaluateRunConfig, checkpoint: Path) -> EvaluateRunConfig:
    """Returns the configuration of one model: `model` is that of its checkpoint, whatever the command says.

    Raises:
        ArtefactError: the checkpoint holds no model that writes text.
    """
    saved = dict(checkpoint_files.read_state(checkpoint)[1])
    try:
        model = ModelConfig(**saved)
    except (TypeError, ConfigError) as error:
        raise ArtefactError(f"checkpoint {checkpoint}: does not describe a model ({error})") from error
    if model.head != "tokens":
        raise ArtefactError(f"stage.models={checkpoint}: its model computes scores and not text")
    tokenizer = replace(config.tokenizer, vocab_size=model.vocab_size)
    stage = replace(config.stage, models=[str(checkpoint)])
    return replace(config, model=model, tokenizer=tokenizer, stage=stage)


STAGE = Evaluate()
