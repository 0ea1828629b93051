"""The files of `stage.eval_tasks`: while a run goes on, each has the content that it had when the run began with it."""

import json

from dist_lm.config.root import Config
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory


def note_task_files(run: RunDirectory, config: Config) -> None:
    """Write the SHA-256 of each file into the run's directory."""
    if now := _hashes(config):
        durable.write_json(run.task_files, _noted(run) | now)


def require_task_files(run: RunDirectory, config: Config) -> None:
    """Refuse files that have changed: figures of one name would be of different questions.

    Raises:
        ArtefactError: names the key, the file and the way out.
    """
    noted = _noted(run)
    for name, sha256 in _hashes(config).items():
        if noted.get(name, sha256) != sha256:
            raise ArtefactError(
                f"{name}: has changed since {run.path} evaluated by it: restore it, or give the new one another name"
            )


def _hashes(config: Config) -> dict[str, str]:
    files = {task: path for task, path in config.eval.files.items() if task in config.stage.eval_tasks}
    return {f"eval.{task}={path}": durable.sha256_of(path) for task, path in files.items()}


def _noted(run: RunDirectory) -> dict[str, str]:
    return json.loads(run.task_files.read_text(encoding="utf-8")) if run.task_files.exists() else {}
