"""Files that a run reads at every start (`Config.noted_files`): each keeps the content that it had when the run began
with it."""

import hashlib
import json

from dist_lm.config.root import Config
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory


def note_files(run: RunDirectory, config: Config) -> None:
    """Write the SHA-256 of the files of each key into the run's directory."""
    if now := _hashes(config):
        durable.write_json(run.noted_files, _noted(run) | now)


def require_files(run: RunDirectory, config: Config) -> None:
    """Refuse files that have changed: figures of one name would be of different questions, or a run of other prompts.

    Raises:
        ArtefactError: names the key, the file and the way out.
    """
    noted = _noted(run)
    for name, sha256 in _hashes(config).items():
        if noted.get(name, sha256) != sha256:
            way_out = "give the new one another name" if name.startswith("eval.") else "choose another run_id"
            raise ArtefactError(f"{name}: has changed since {run.path} began with it: restore it, or {way_out}")


def _hashes(config: Config) -> dict[str, str]:
    """One hash a key; of several files that of their names and hashes."""
    found = {}
    for name, files in config.noted_files.items():
        hashes = [durable.sha256_of(file) for file in files]
        listed = json.dumps([[file.name, sha256] for file, sha256 in zip(files, hashes, strict=True)])
        found[name] = hashes[0] if len(hashes) == 1 else hashlib.sha256(listed.encode()).hexdigest()
    return found


def _noted(run: RunDirectory) -> dict[str, str]:
    return json.loads(run.noted_files.read_text(encoding="utf-8")) if run.noted_files.exists() else {}
