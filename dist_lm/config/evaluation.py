"""The conf group `eval`: files of published tasks, and the actors that answer tasks beside training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from dist_lm.config.pool import EngineConfig, RolloutPoolConfig

FILE_TASKS = ("humaneval", "mbpp", "multipl_e")
"""Tasks whose file the user has: `eval.TASK=PATH`."""
OWN_TASKS = ("own_python", "own_bash", "own_sql", "infill")
"""Tasks of our own problems."""
FIXED_TESTS, OWN_TESTS = 1, 2
"""Versions of the tests of our own problems: without hidden tests, and now. Raise it if the tests of a seed change."""
CODE_TASKS = (*OWN_TASKS[:3], *FILE_TASKS, "infill")
LOOP_TASKS = (*CODE_TASKS, "tools", "bfcl")
"""Tasks of stage evaluate that `stage.eval_tasks` takes."""


@dataclass
class EvalPoolConfig(EngineConfig):
    """Actors that answer the tasks of `stage.eval_tasks` while the ranks train. See `RolloutPoolConfig`."""

    actors: int = 0  # engines, with their own GPUs or cores; 0: the ranks answer, between two steps
    tp: int = 1  # GPUs that share the model of an engine
    cache_tokens: int = 0  # KV cache of an engine in tokens; 0: as many as fit into free memory


@dataclass
class EvalPool(RolloutPoolConfig):
    """These actors as a pool: their weights come from a file, and they work while the ranks train."""

    key: ClassVar[str] = "eval.pool"
    without: ClassVar[str] = "answers tasks on the ranks, between two steps"
    may_share: ClassVar[bool] = False


@dataclass
class EvalConfig:
    """Files of published tasks, what the task reward reads, and actors for tasks during training."""

    humaneval: str = ""  # HumanEval.jsonl.gz
    mbpp: str = ""  # mbpp.jsonl or sanitized-mbpp.json
    multipl_e: str = ""  # a file of MultiPL-E in Python or Bash
    prompts: str = ""  # file or glob, as stage.prompts of stage generate
    reward_model: str = ""  # run of stage reward that scores the answers to the prompts
    pool: EvalPoolConfig = field(default_factory=EvalPoolConfig)  # for stage.eval_tasks

    @property
    def files(self) -> dict[str, Path]:
        """The files of `FILE_TASKS` that the configuration names."""
        paths = {task: getattr(self, task) for task in FILE_TASKS}
        return {task: Path(path).expanduser() for task, path in paths.items() if path}
