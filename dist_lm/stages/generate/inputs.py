"""The inputs of a run of stage `generate`, recorded in `prompts.json`: prompts and checkpoint must not change."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lm.data.prompts import count_prompts
from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.training import checkpoint_files

if TYPE_CHECKING:
    from dist_lm.stages.generate.stage import GenerateConfig


def check_inputs(files: list[Path], stage: "GenerateConfig", run: RunDirectory) -> dict[str, Any]:
    """Number and hashes of the prompts, a part of `prompts.json`.

    Raises:
        ConfigError: there are no prompts, or the files are invalid.
        ArtefactError: the run began with other prompts.
        OSError: a file cannot be read.
    """
    # Answers of one run to different prompts would look like answers to the same ones.
    inputs, recorded = count_prompts(files), begun_with(run)
    if recorded and {name: recorded.get(name) for name in inputs} != inputs:
        raise ArtefactError(f"stage.prompts={stage.prompts}: not what {run.path} began with: choose another run_id")
    return inputs


def check_checkpoint(checkpoint: Path, run: RunDirectory) -> dict[str, str]:
    """Returns the hash of a checkpoint's manifest, a part of `prompts.json`.

    Raises:
        ArtefactError: the run began with other weights at the same place.
    """
    sha256 = durable.sha256_of(checkpoint / checkpoint_files.MANIFEST)
    if begun_with(run).get("checkpoint_sha256", sha256) != sha256:
        raise ArtefactError(f"{checkpoint}: has changed since {run.path} began: choose another run_id")
    return {"checkpoint_sha256": sha256}


def begun_with(run: RunDirectory) -> dict[str, Any]:
    """Returns the content of `prompts.json`; nothing for a new run.

    Raises:
        ArtefactError: the file is no JSON.
    """
    return durable.read_json(run.inputs)


def label_of(checkpoint: Path) -> str:
    """Returns the name of a checkpoint in samples: STAGE/RUN_ID/STEP."""
    return "/".join(checkpoint.parts[-4:-2] + checkpoint.parts[-1:])
