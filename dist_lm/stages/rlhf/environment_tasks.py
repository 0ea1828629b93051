"""The tasks of the environment of stage `rlhf`: rows of files. No torch: the launcher reads them too."""

import hashlib
import re
from collections.abc import Iterator

from dist_lm.chat.messages import ChatError
from dist_lm.data.prompt_rows import find_rows, read_rows
from dist_lm.environments.protocol import Task
from dist_lm.errors import ArtefactError, require
from dist_lm.stages.rlhf.config import RlhfRunGroup
from dist_lm.stages.rlhf.prompts import HELD_OUT_FROM, HELD_OUT_OF, PROMPTS_FROM


def check_environment(settings: RlhfRunGroup) -> None:
    """Refuses an environment that is not there and files without tasks, before the run starts; returns nothing.

    Raises:
        ConfigError: there is no such environment or file, or the file does not have the class.
        ArtefactError: a row is no task, or there are none.
        OSError: a file cannot be read.
    """
    # Imported here, because runs without an environment need no host.
    from dist_lm.environments.host import Host

    Host(settings.environment, settings.environment_limits.limits)
    _ = settings.environment_files  # raises, if there is no such file
    if path := settings.environment_file:
        # The file is not executed here. A class whose name occurs nowhere in it can only come from a star import.
        class_name = settings.environment.rpartition(":")[2]
        names = rf"\b{re.escape(class_name)}\b|import\s+\*"
        content = path.read_text(encoding="utf-8", errors="replace")
        has_name = bool(class_name) and re.search(names, content) is not None
        require(has_name, "rlhf.environment", settings.environment, "FILE:CLASS; the file has no such class")
    read_tasks(settings)


def read_tasks(settings: RlhfRunGroup) -> tuple[list[Task], list[Task]]:
    """Returns (tasks, held-out tasks) of rlhf.prompts_from and rlhf.held_out_from, in the order of their rows; without
    the latter, a hash holds out one task in `HELD_OUT_OF`, which is then not among the tasks. Of the held-out ones, the
    first `held_out_prompts` are returned, perhaps none.

    Raises:
        ConfigError: there is no such file.
        ArtefactError: a row is broken, or no task is left.
        OSError: a file cannot be read.
    """
    tasks = [*_tasks_of(settings.prompts_from, PROMPTS_FROM)]
    if settings.held_out_from:
        held_out = [*_tasks_of(settings.held_out_from, HELD_OUT_FROM)]
    else:
        held_out = [task for task in tasks if _is_held_out(task)]
        tasks = [task for task in tasks if not _is_held_out(task)]
    if not tasks:
        raise ArtefactError(
            f"{PROMPTS_FROM}={settings.prompts_from}: no tasks, beside {len(held_out)} held-out ones (one in "
            f"{HELD_OUT_OF}, by a hash): add tasks, or name a file of held-out ones by {HELD_OUT_FROM}"
        )
    return tasks, held_out[: settings.held_out_prompts]


def _tasks_of(pattern: str, key: str) -> Iterator[Task]:
    # Rows of the two files have equal numbers; neither an environment nor a reader of the log may confuse them.
    mark = "held_out " if key == HELD_OUT_FROM else ""
    for number, row in enumerate(read_rows(find_rows(pattern, key))):
        if row.error:
            raise ArtefactError(f"{key}: {row.place}: {row.error}")
        try:
            yield Task.of(f"{mark}{number}", row.columns)
        except ChatError as error:
            raise ArtefactError(f"{key}: {row.place}: {error}") from error


def _is_held_out(task: Task) -> bool:
    """Decides by a hash of the data without the row's number, so that a task stays on its side when the file grows."""
    return hashlib.sha256(task.text.encode()).digest()[0] % HELD_OUT_OF == 0
