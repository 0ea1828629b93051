"""Stage `export`: a run as a folder for transformers and vLLM, and on the hub if `stage.push` names a repository.

`files.py` is the program, which `dist-lm export` runs too.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from dist_lm.config.root import Config
from dist_lm.config.stage import StageGroup
from dist_lm.errors import ArtefactError, UserError, require
from dist_lm.stages.exporting.model_card import CARD, RECORD
from dist_lm.stages.stage import Action, Artefact, ArtefactStage, Look
from dist_lm.storage import durable
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.training import checkpoint_files

if TYPE_CHECKING:
    from dist_lm.tracking.console import Console

AUTO = "auto"
# Files that an export may have and the next one lacks. transformers takes model.safetensors before an index, and reads
# adapters wherever their configuration lies.
STALE = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "model-F16.gguf"),
    *(
        "model-F32.gguf",
        "model-Q8_0.gguf",
        "adapter_model.safetensors",
        "adapter_config.json",
        "config.json",
        "generation_config.json",
    ),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)


@dataclass
class ExportGroup(StageGroup):
    """The `stage` group of stage export."""

    run: str = "code"  # the stage whose run of this run_id is exported, and built if it is missing
    init_from: str = AUTO  # auto: the run of stage.run | another run, or a checkpoint
    folder: str = ""  # to write; empty: work_dir/exports/RUN_ID-STAGE
    dtype: str = "bf16"  # bf16 | fp32
    gguf: str = ""  # F16 | Q8_0 | F32: a file for llama.cpp as well; empty: none
    push: str = ""  # id of a repository on the hub that the folder is uploaded to; empty: none

    def __post_init__(self) -> None:
        require(self.dtype in ("bf16", "fp32"), "stage.dtype", self.dtype, "bf16 or fp32")
        require(self.gguf in ("", "F16", "Q8_0"), "stage.gguf", self.gguf, "F16 or Q8_0, or nothing")
        if self.push:
            check_repository("stage.push", self.push)


@dataclass
class ExportConfig(Config):
    """The configuration of stage export."""

    stage: ExportGroup = MISSING


class Export(ArtefactStage):
    name = "export"
    schema = ExportConfig
    needs = ("language", "code", "sft", "tools", "preference", "reward", "rlhf")

    def needed(self, config: Config) -> tuple[str, ...]:
        stage = group_of(config)
        return (stage.run,) if stage.init_from == AUTO else ()

    def check(self, config: Config) -> None:
        stage = group_of(config)
        accepted = f"a stage that trains: {', '.join(self.needs)}"
        require(stage.init_from != AUTO or stage.run not in ("", self.name), "stage.run", stage.run, accepted)

    def look(self, config: Config, *, is_target: bool, rebuilt: Collection[str]) -> Look:
        stage = group_of(config)
        # The checkpoint does not exist yet, so there is nothing to compare.
        if stage.init_from == AUTO and stage.run in rebuilt:
            return Look(config, Action.BUILD, f"{stage.run} to {folder_of(config)}, {stage.dtype}")
        return super().look(config, is_target=is_target, rebuilt=rebuilt)

    def inspect(self, config: Config) -> Artefact:
        """Compares the folder with the checkpoint: ready if it was written from this checkpoint in stage.dtype, is
        whole, has the GGUF file and was pushed, where these are asked for. Files are compared by their sizes.

        Raises:
            ArtefactError: the run has no checkpoint, or the record in the folder is damaged.
            OSError: a file cannot be read.
        """
        stage, folder = group_of(config), folder_of(config)
        checkpoint = checkpoint_files.find_checkpoint(_run(config))
        record = durable.read_json(folder / RECORD)
        expected = {
            "checkpoint": str(checkpoint),
            "manifest": durable.sha256_of(checkpoint / checkpoint_files.MANIFEST),
            "dtype": stage.dtype,
        }
        is_of_checkpoint = expected.items() <= record.items()

        # People edit the model card, so its size does not count.
        sizes: dict[str, int] = record.get("files", {})
        compared = [name for name in sizes if name != CARD or not (folder / CARD).exists()]
        is_whole = all((folder / name).is_file() and (folder / name).stat().st_size == sizes[name] for name in compared)
        has_gguf = not stage.gguf or f"model-{stage.gguf}.gguf" in sizes
        is_pushed = not stage.push or record.get("pushed", "") == stage.push

        detail = f"{checkpoint.name} to {folder}, {stage.dtype}"
        if stage.push:
            detail += f", pushed to {stage.push}"
        return Artefact(is_of_checkpoint and is_whole and has_gguf and is_pushed, detail)

    def build(self, config: Config, console: "Console") -> None:
        """Writes the folder, and uploads it if a repository is named.

        Raises:
            ConfigError, ArtefactError, UserError: see `exporting.files.export` and `push_folder`.
            OSError: a file cannot be read or written.
        """
        from dist_lm.stages.exporting.files import export  # imports torch

        stage, folder = group_of(config), folder_of(config)
        with console.waiting(f"writing {folder}"):
            export(_run(config), folder, stage.dtype, gguf=stage.gguf or None)
        if stage.push:
            with console.waiting(f"uploading to {stage.push}"):
                push_folder(folder, stage.push)

    def output(self, config: Config) -> Path:
        return folder_of(config)

    def summarize(self, config: Config, console: "Console") -> None:
        console.summary("stage=export is done", {"folder": str(folder_of(config))})


def group_of(config: Config) -> ExportGroup:
    """Returns the `stage` group with its type."""
    assert isinstance(config.stage, ExportGroup)
    return config.stage


def folder_of(config: Config) -> Path:
    """Returns the folder that the stage writes."""
    stage = group_of(config)
    if stage.folder:
        return Path(stage.folder).expanduser()
    return Path(config.work_dir) / "exports" / f"{config.run_id}-{stage.run}"


def check_repository(key: str, repository: str) -> None:
    """Raises ConfigError, which names `key`, for an id that the hub cannot have."""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", repository)
    require(bool(is_id), key, repository, "the id of a repository, such as my_name/my_model")


def push_folder(folder: Path, repository: str, api: Any = None) -> None:
    """Uploads an export to the Hugging Face hub. A repository that does not exist is made, for its owner alone.

    Files of an earlier export that this one lacks are removed there; files of others stay. The record in `folder` then
    names the repository.

    Args:
        api: `huggingface_hub.HfApi`, which takes the token of `hf auth login` or HF_TOKEN.

    Raises:
        ArtefactError: the hub refuses it.
        UserError: huggingface_hub is not installed.
        OSError: a file cannot be read.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    except ImportError as error:
        raise UserError("the hub needs huggingface_hub: pip install huggingface_hub") from error

    hub = api or HfApi()
    try:
        # A model that was public once cannot be taken back.
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            commit_message="Exported by dist_lm",
            ignore_patterns=[RECORD],  # has paths of this machine
            delete_patterns=[*STALE],  # unless the folder has them
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(
            f"{repository}: the hub did not take {folder} ({reason}): log in by `hf auth login`"
        ) from error
    durable.write_json(folder / RECORD, durable.read_json(folder / RECORD) | {"pushed": repository})


def _run(config: Config) -> Path:
    """Returns the run, or the checkpoint."""
    stage = group_of(config)
    if stage.init_from != AUTO:
        return Path(stage.init_from)
    return WorkDirectory(Path(config.work_dir).resolve()).run(stage.run, config.run_id).path


STAGE = Export()
