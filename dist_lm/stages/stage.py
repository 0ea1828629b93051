"""The interface of a stage: one object, from its inputs to its summary.

A stage runs in one of three places: in the launcher's own process (`ArtefactStage`), on ranks
(`dist_lm.stages.training.stage.TrainingStage`), or on a pool of generation engines (`PoolStage`). The launcher calls
the methods below and knows no stage by name.

The launcher imports the modules of all stages, so they import torch only inside the methods that need it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dist_lm.config.corpus import HF, STAGE_RUN
from dist_lm.config.root import Config
from dist_lm.storage import durable
from dist_lm.storage.durable import Kind
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.readable import three_decimals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dist_lm.generation.engine_options import EngineOptions
    from dist_lm.generation.request import Answer, Refusal, Request
    from dist_lm.sandbox.pool import Sandboxes
    from dist_lm.tokenizer.tokenizer import Tokenizer
    from dist_lm.tracking.console import Console


IMPORT = "import"  # the stage that imports a model of transformers


class Action(Enum):
    """The work that a command has to do for a stage."""

    READY = "there"
    BUILD = "build"
    RESUME = "continue"


class RunsIn(Enum):
    """The processes that a stage runs in."""

    LAUNCHER = "launcher"  # `build` in the launcher's process
    RANKS = "ranks"  # `run_rank` on ranks that torchrun starts
    POOL = "pool"  # requests to a pool of generation engines


PHASE_COLUMNS = ("phase", "corpus", "sequences", "tokens", "epochs", "epochs so far")


@dataclass(frozen=True)
class Look:
    """The state of a stage's output, and the action that the launcher must take."""

    config: Config  # with references resolved: `stage.init_from` is `none` or an absolute path
    action: Action
    detail: str  # one line for the plan
    phases: tuple[tuple[str, ...], ...] = ()  # rows of `PHASE_COLUMNS`, where the run has phases


@dataclass(frozen=True)
class KeyFigure:
    """A metric that the closing table shows for a stage."""

    metric: str
    form: Callable[[float], str]
    words: str


BITS_PER_BYTE = KeyFigure("val/bits_per_byte", three_decimals, "val bits/byte")
VAL_LOSS = KeyFigure("val/loss", three_decimals, "val loss")
TRAIN_LOSS = KeyFigure("train/loss", three_decimals, "loss")


class Stage(ABC):
    """One stage. `conf/stage/NAME.yaml` holds its defaults."""

    def __init_subclass__(cls) -> None:
        """A stage that starts from another one needs it."""
        super().__init_subclass__()
        # Its checkpoint is an output that the stage reads, like the others in `needs`.
        if cls.starts_from and cls.starts_from not in cls.needs:
            cls.needs = (*cls.needs, cls.starts_from)

    name: ClassVar[str]
    runs_in: ClassVar[RunsIn]
    schema: ClassVar[type[Config]] = Config  # the stage's own keys are fields of `schema`'s `stage` group
    needs: ClassVar[tuple[str, ...]] = ()  # stages whose output it reads; `starts_from` is added
    starts_from: ClassVar[str | None] = None  # stage whose checkpoint `stage.init_from=auto` names
    in_pipeline: ClassVar[bool] = False  # whether `stage=pipeline` runs it
    conf: ClassVar[Path | None] = None  # folder that holds stage/NAME.yaml, for stages outside this package
    # lines of key figures; the closing table shows the first line whose metrics the run has
    key_figures: ClassVar[tuple[tuple[KeyFigure, ...], ...]] = ()
    result_kinds: ClassVar[Mapping[str, Kind]] = {}  # values that every `result.json` has, with their types
    curve: ClassVar[str] = "train/loss"  # metric whose curve the closing table shows
    writes_text: ClassVar[bool] = False  # `dist-lm generate` can load its checkpoint
    answers_requests: ClassVar[bool] = False  # its model has learned turns: `dist-lm generate --chat`

    def needed(self, config: Config) -> tuple[str, ...]:
        """Returns the stages of `needs` whose output this configuration reads."""
        return self.needs

    def start_of(self, config: Config) -> str | None:
        """Returns the stage whose run gives the first weights: `starts_from` for `stage.init_from=auto`, NAME for
        `stage:NAME`; None for a path, `hf:SOURCE` or no start. The plan refuses names of no stage."""
        init_from = getattr(config.stage, "init_from", "")
        if init_from == "auto":
            return self.starts_from
        if init_from.startswith(STAGE_RUN):
            return init_from.removeprefix(STAGE_RUN)
        return None

    def reads(self, config: Config) -> tuple[str, ...]:
        """Returns `needed`; the stage of `stage.init_from=stage:NAME`, or stage `import` for `hf:...`, replaces
        `starts_from`."""
        needed = self.needed(config)
        init_from = getattr(config.stage, "init_from", "")
        start = None
        if init_from.startswith(HF):
            # The imported weights stand in for those of the stage before.
            start = IMPORT
        elif init_from.startswith(STAGE_RUN):
            start = self.start_of(config)
        if start is None:
            return needed
        return (start, *(stage for stage in needed if stage not in (self.starts_from, start)))

    def for_readers(self, config: Config, readers: Sequence[Config]) -> Config:
        """Returns `config` narrowed to what the later stages of a plan read."""
        return config

    def check(self, config: Config) -> None:  # noqa: B027  most stages have nothing to check
        """Refuses a configuration that cannot run.

        Raises:
            ConfigError: names the key (`dist_lm.errors.require` raises it); any other ValueError also refuses.
        """

    @abstractmethod
    def look(self, config: Config, *, is_target: bool, rebuilt: Collection[str]) -> Look:
        """Returns what the command has to do for this stage, by a look at the work directory; changes nothing.

        Args:
            is_target: whether the command asks for this stage, or builds it on the way.
            rebuilt: earlier stages that this command will build.

        Raises:
            ConfigError: a run exists with other settings, or a source or a key cannot be used.
            ArtefactError: something there belongs to something else, is damaged, or an earlier artefact does not fit.
            UserError: a package that the look needs is not installed, or a server of a source cannot be asked.
            OSError: a file cannot be read.
        """

    @abstractmethod
    def output(self, config: Config) -> Path:
        """Returns the output folder that messages name."""

    @abstractmethod
    def summarize(self, config: Config, console: "Console") -> None:
        """Prints the results: figures, samples, paths."""

    def print_samples(self, run: RunDirectory, console: "Console") -> None:  # noqa: B027  most stages write none
        """Prints samples of a finished run."""

    def progress(self, config: Config) -> str:
        """Returns words for the state that the next command continues from, for messages."""
        return "the files that are there"

    def read_result(self, run: RunDirectory) -> dict[str, Any]:
        """Returns `result.json`; empty for an unfinished run.

        Raises:
            ArtefactError: the file is damaged, or lacks a value of `result_kinds`.
        """
        return durable.read_json(run.result, self.result_kinds)

    def repetition(self, config: Config) -> str:
        """Returns a warning about corpora that the run reads many times; empty if there are none, or none is known."""
        return ""

    def figures(self, result: Mapping[str, Any]) -> str:
        """Returns the figures of `result.json` for the closing table, in addition to `key_figures`."""
        return ""

    def rejection(self, config: Config) -> str:
        """Returns why the finished stage counts as failed; empty if it succeeded."""
        return ""


class ArtefactStage(Stage):
    """A stage that builds files in the launcher's process. All runs of a work directory share these files."""

    runs_in = RunsIn.LAUNCHER

    @abstractmethod
    def inspect(self, config: Config) -> "Artefact":
        """Returns the state of the output in the work directory; changes nothing.

        Raises:
            ArtefactError: the files were made with other settings.
        """

    @abstractmethod
    def build(self, config: Config, console: "Console") -> None:
        """Builds what is missing."""

    def look(self, config: Config, *, is_target: bool, rebuilt: Collection[str]) -> Look:
        artefact = self.inspect(config)
        return Look(config, Action.READY if artefact.ready else Action.BUILD, artefact.detail)

    def summarize(self, config: Config, console: "Console") -> None:
        console.line(f"{self.name} is there: {config.work_dir}")


@dataclass(frozen=True)
class Artefact:
    """The state of an artefact stage's output."""

    ready: bool
    detail: str  # one line for the plan


class PoolWork(ABC):
    """The work of one run of a pool stage: gives requests to engines and stores their answers."""

    count: int  # prompts of the run

    @property
    @abstractmethod
    def is_done(self) -> bool: ...

    @property
    def asks(self) -> bool:
        """Whether requests are left for engines."""
        return not self.is_done

    @property
    @abstractmethod
    def table(self) -> Path:
        """A file of JSON lines that wandb shows, once it exists."""

    @property
    @abstractmethod
    def done(self) -> tuple[int, int]:
        """(prompts answered or refused, tokens generated) so far."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Returns counts so far, under the names of the metrics file."""

    @abstractmethod
    def requests(self) -> "Iterator[Request]":
        """Yields the requests without an answer."""

    @abstractmethod
    def take(self, result: "Answer | Refusal") -> None:
        """Stores an answer or a refusal."""

    def finish(self, keep_going: "Callable[[], bool]") -> None:  # noqa: B027  most work ends with its last answer
        """Does the work that is left after the last answer, while `keep_going` returns True."""

    def close(self) -> None:  # noqa: B027  most work holds nothing
        """Ends what the work has started: after its last call, also after an error or a signal."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """Returns the fields of `result.json` for finished work."""


class PoolStage(Stage):
    """A stage whose requests a pool of generation engines answers."""

    runs_in = RunsIn.POOL

    def rounds(self, config: Config) -> Sequence[Config]:
        """Returns a configuration for each model of the run, in their order; `config.model` is the model."""
        return [config]

    def joined(self, config: Config, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns the fields of `result.json` of a run, from those of its rounds."""
        return results[0]

    @abstractmethod
    def tokenizer(self, config: Config) -> "Tokenizer":
        """Returns the tokenizer of the checkpoint."""

    @abstractmethod
    def checkpoint(self, config: Config) -> Path:
        """Returns the checkpoint that engines load."""

    @abstractmethod
    def engine(self, config: Config) -> tuple["EngineOptions", int, int]:
        """Returns (size of an engine, GPUs per engine, number of engines; -1: as many as fit)."""

    @abstractmethod
    def work(
        self, config: Config, run: RunDirectory, tokenizer: "Tokenizer", sandboxes: "Callable[[], Sandboxes]"
    ) -> PoolWork:
        """Returns the work of a run, opened; the caller closes it.

        Args:
            sandboxes: gives what runs programs of models, for a `with` block.

        Raises:
            ConfigError, ArtefactError: the prompts are missing, or not those that the run began with.
            UserError: a task cannot be asked, or the tokenizer lacks a mark.
        """

    def output(self, config: Config) -> Path:
        return run_of(config).path


def run_of(config: Config) -> RunDirectory:
    """Returns the run directory of a configuration."""
    return WorkDirectory(Path(config.work_dir)).run(config.stage.name, config.run_id)


def shown_path(path: Path, config: Config) -> str:
    """Returns a path for the plan: relative to the work directory if it is inside."""
    if path.is_relative_to(config.work_dir):
        path = path.relative_to(config.work_dir)
    return str(path)
