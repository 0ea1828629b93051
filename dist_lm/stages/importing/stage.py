"""Stage `import`: a model of transformers as the run work/runs/import/NAME, for `stage.init_from=hf:SOURCE`.

A stage that starts from `hf:SOURCE` needs it. `snapshot.py` is the program, which `dist-lm import` runs too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

from dist_lm.config.corpus import HF
from dist_lm.config.model import ModelConfig
from dist_lm.config.root import Config, read_groups
from dist_lm.config.stage import StageGroup
from dist_lm.errors import ArtefactError, ConfigError, require, shown_value
from dist_lm.interop.adapter_folder import holds_adapters
from dist_lm.interop.snapshot import change_of, folder_of, model_in, name_of, named_base, named_model
from dist_lm.stages.stage import IMPORT, Artefact, ArtefactStage
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.tracking.readable import readable_count

if TYPE_CHECKING:
    from dist_lm.tracking.console import Console


@dataclass
class ImportGroup(StageGroup):
    """The `stage` group of stage import."""

    init_from: str = ""  # hf:FOLDER or hf:ID of a model of transformers


@dataclass
class ImportConfig(Config):
    """The configuration of stage import."""

    stage: ImportGroup = MISSING


class Import(ArtefactStage):
    name = IMPORT
    schema = ImportConfig

    def reads(self, config: Config) -> tuple[str, ...]:
        return ()

    def for_readers(self, config: Config, readers: Sequence[Config]) -> Config:
        """Returns the configuration that imports the model that the later stages start from.

        Raises:
            ConfigError: the later stages start from several models.
        """
        # The plan has room for one import.
        sources = sorted({reader.stage.init_from for reader in readers if reader.stage.init_from.startswith(HF)})
        if len(sources) > 1:
            raise ConfigError(f"stage.init_from: {' and '.join(sources)}: expected one model for all stages")
        return replace(config, stage=replace(config.stage, init_from=sources[0]))

    def check(self, config: Config) -> None:
        accepted = f"{HF}FOLDER of transformers, or {HF}ID of a model on the hub"
        require(config.stage.init_from.startswith(HF), "stage.init_from", config.stage.init_from, accepted)

    def inspect(self, config: Config) -> Artefact:
        """Looks for the run: ready if it is there. Without one it reads the shape of the model, and may ask the hub.

        Raises:
            ArtefactError: another snapshot was imported under this name, or the model cannot be read.
            UserError: a package that is needed is not installed.
            OSError: a file cannot be read.
        """
        from dist_lm.model.size import parameter_count

        source, run = config.stage.init_from, imported_run(config)
        if not run.config.is_file():
            folder = folder_of(source, weights=False)
            _, architecture = model_in(folder, name_of(source))
            model = imported_model(config)
            size = readable_count(parameter_count(model))
            of_base = ""
            if holds_adapters(folder):
                of_base = f", adapters over {shown_value(named_base(folder))}, which they name"
            return Artefact(False, f"{architecture.name}, {size} parameters from {source}{of_base}")

        # A folder may have changed under the same name, or the name may be that of another model of the hub.
        imported = read_groups(run.config).get("imported", {})
        if lacking := [key for key in ("source", "architecture") if not isinstance(imported.get(key), str)]:
            raise ArtefactError(
                f"{run.config}: imported.{lacking[0]} is missing: remove this run, which imports it again"
            )
        if change := change_of(source, imported.get("snapshot") or {}):
            raise ArtefactError(
                f"{run.path} was imported from {imported['source']}, and {source} differs from that ({change}): remove "
                "this run, or import the other model under a name of its own by dist-lm import"
            )
        commit = str((imported.get("snapshot") or {}).get("revision", ""))
        at_commit = f", commit {commit[:12]}" if commit else ""
        return Artefact(True, f"{imported['architecture']} from {imported['source']}{at_commit}")

    def build(self, config: Config, console: "Console") -> None:
        """Reads the weights, and writes the run.

        Raises:
            ConfigError, ArtefactError, UserError: see `import_model`.
            OSError: a file cannot be read or written.
        """
        from dist_lm.stages.importing.snapshot import import_model  # imports torch

        source, run = config.stage.init_from, imported_run(config)
        with console.waiting(f"importing {source}"):
            import_model(source, run.path.name, run.work, add_marks=config.tokenizer.add_marks)

    def output(self, config: Config) -> Path:
        return imported_run(config).path


def imported_run(config: Config) -> RunDirectory:
    """Returns the run of an import on the way; one with `tokenizer.add_marks` has a name of its own."""
    name = name_of(config.stage.init_from)
    if config.tokenizer.add_marks:
        name += "-marks"
    return WorkDirectory(Path(config.work_dir)).run(Import.name, name)


def imported_model(config: Config) -> ModelConfig:
    """Returns the model that an import of stage.init_from gives; with `tokenizer.add_marks`, its vocabulary has the
    marks.

    Raises:
        ArtefactError, UserError: as `named_model` and `existing_vocab_size`.
    """
    from dist_lm.interop.existing_tokenizer import existing_vocab_size

    source = config.stage.init_from
    model = named_model(source)
    if not config.tokenizer.add_marks:
        return model
    vocab_size = existing_vocab_size(replace(config.tokenizer, source=source), config.work_dir)
    assert vocab_size is not None
    return replace(model, vocab_size=vocab_size)


STAGE = Import()
