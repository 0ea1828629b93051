"""Reads a run for generation: the model of a checkpoint of any layout, its tokenizer, and openings of documents.

One process reads unsharded tensors; no process group is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from dist_lm.config.model import ModelConfig
from dist_lm.config.root import load_yaml
from dist_lm.data.manifest import manifest_path, read_manifest
from dist_lm.errors import ArtefactError, UserError
from dist_lm.interop.foreign_files import pieces_in
from dist_lm.interop.snapshot_files import content_in, parsed
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory, tokenizer_in
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import model_weights

DEPTH = 3  # levels of a run below its work directory (runs/STAGE/RUN_ID)


@dataclass(frozen=True)
class LoadedModel:
    """A model and its tokenizer."""

    name: str  # run and checkpoint: `code/default/step_00000400`
    config: ModelConfig
    weights: dict[str, torch.Tensor]  # parameters by name, in host memory
    tokenizer: Tokenizer
    run: RunDirectory | None  # None if the checkpoint is outside a run


def load_model(path: Path, tokenizer: Path | None = None) -> LoadedModel:
    """Returns the model of a checkpoint with all its weights, fp32 in host memory, and its tokenizer. Adapters are
    merged. Every file of the checkpoint is read and compared with its hash.

    Args:
        path: a run, a folder of checkpoints, or a checkpoint.
        tokenizer: file or folder of the tokenizer; by default that of the run's work directory.

    Raises:
        ArtefactError: checkpoint or tokenizer is missing or damaged, they do not fit, the base of adapters is gone or
            has changed, or the model computes scores.
        UserError: the tokenizer needs the package `tokenizers`, which is not installed.
    """
    checkpoint = files.require_intact(files.find_checkpoint(path))
    state, config = files.read_state(checkpoint)[0], model_config_of(checkpoint)
    if config.head != "tokens":
        raise ArtefactError(
            f"checkpoint {checkpoint}: its model computes scores and not text (model.head={config.head})"
        )

    run = run_of(checkpoint)
    loaded_tokenizer = tokenizer_of(checkpoint, tokenizer, run)
    if loaded_tokenizer.vocab_size != config.vocab_size:
        raise ArtefactError(
            f"checkpoint {checkpoint}: its model knows {config.vocab_size} tokens, the tokenizer has "
            f"{loaded_tokenizer.vocab_size}: give the tokenizer it was trained with by --tokenizer=PATH"
        )
    # The same size is not enough: ids of another tokenizer would be other text.
    files.check_tokenizer(checkpoint, state, loaded_tokenizer.sha256)

    weights = {name: torch.from_numpy(array) for name, array in model_weights(checkpoint).items()}
    name = str(checkpoint)
    if run:
        name = "/".join((*run.path.parts[-2:], checkpoint.name))
    return LoadedModel(name, config, weights, loaded_tokenizer, run)


def model_config_of(checkpoint: Path) -> ModelConfig:
    """Returns the model configuration in a checkpoint.

    Raises:
        ArtefactError: the checkpoint does not describe a model.
    """
    _, model = files.read_state(checkpoint)
    fields: dict[str, Any] = dict(model)
    try:
        return ModelConfig(**fields)
    except (TypeError, UserError) as error:
        raise ArtefactError(f"checkpoint {checkpoint}: {files.STATE} does not describe a model ({error})") from error


def run_of(checkpoint: Path) -> RunDirectory | None:
    """Returns the run that contains a checkpoint; None if the checkpoint is outside a run with a configuration.

    A path that leads through a link and the one it resolves to are both tried; the one whose work directory has a
    tokenizer is preferred.
    """
    # The run or a folder above it may be a link: prefer the path that has a tokenizer.
    runs = [
        RunDirectory(path.parents[1])
        for path in (checkpoint.absolute(), checkpoint.resolve())
        if path.parent.name in ("checkpoints", "averages") and len(path.parents) >= 2 + DEPTH
    ]
    runs = [run for run in runs if run.config.is_file()]
    return next(iter(sorted(runs, key=lambda run: not run.tokenizer_model.is_file())), None)


def tokenizer_of(checkpoint: Path, named: Path | None, run: RunDirectory | None) -> Tokenizer:
    """Returns the tokenizer at `named` (a file, or a folder with it), else that of the run.

    Raises:
        ArtefactError: it is missing, damaged, or takes too much time or memory to read; or there is neither.
        UserError: it needs the package `tokenizers`, which is not installed.
    """
    if named is not None:
        file = tokenizer_in(named) if named.is_dir() else named
        if not file.is_file():
            raise ArtefactError(
                f"--tokenizer={named}: no tokenizer there; expected work/tokenizer, or its tokenizer.model or "
                "tokenizer.json"
            )
        # The file may be somebody else's.
        target = file.resolve()
        parsed(str(file), pieces_in, content_in(target.parent, target.name), str(file))
        return Tokenizer.load(file)

    if run is None:
        raise ArtefactError(
            f"checkpoint {checkpoint}: it lies in no run, so its tokenizer is unknown: give --tokenizer=PATH"
        )
    path = run.tokenizer_model
    if not path.is_file():
        raise ArtefactError(f"{path}: no tokenizer there: give the run's own by --tokenizer=PATH")
    return Tokenizer.load(path)


def stage_tokenizer(checkpoint: Path, work: WorkDirectory, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of a checkpoint that a stage reads: that of its run or work directory, else that of `work`.

    Raises:
        ArtefactError: there is no tokenizer, its size is not `vocab_size`, or the checkpoint was trained with another
            one.
        UserError: it needs the package `tokenizers`, which is not installed.
    """
    path = work.tokenizer_model
    is_in_run = len(checkpoint.parents) > 1 + DEPTH  # the run may have no configuration
    if is_in_run and RunDirectory(checkpoint.parents[1]).tokenizer_model.exists():
        path = RunDirectory(checkpoint.parents[1]).tokenizer_model

    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != vocab_size:
        raise ArtefactError(
            f"{path} has {tokenizer.vocab_size} pieces, model.vocab_size={vocab_size}: not this model's"
        )
    files.check_tokenizer(checkpoint, files.read_state(checkpoint)[0], tokenizer.sha256)
    return tokenizer


@dataclass(frozen=True)
class Openings:
    """Typical beginnings of documents: the prompts of a run's samples (`stage.sampling.prompts`)."""

    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)  # texts by language
    corpus: str = ""
    languages: Sequence[str] = ()  # languages of the corpus

    def of(self, language: str) -> Sequence[str]:
        """Returns the openings of a language, at least one.

        Raises:
            UserError: there is none; the message names the languages with openings.
        """
        if prompts := self.prompts.get(language):
            return prompts
        available = self._languages_with_openings()
        way_out = f"use one of {available}, or type" if available else "type"
        raise UserError(f"/lang {language}: the run has no opening of that language; {way_out} a beginning yourself")

    def __str__(self) -> str:
        available = self._languages_with_openings()
        text = f"openings for {available}" if available else "this run has no openings"
        if self.languages:
            text += f" (corpus {self.corpus} holds {', '.join(self.languages)})"
        return text

    def _languages_with_openings(self) -> str:
        return ", ".join(language for language, prompts in self.prompts.items() if prompts)


def read_openings(run: RunDirectory | None) -> Openings:
    """Returns the openings in a run's configuration; empty without a run. Languages are those of the train split of its
    corpus, sorted; empty if the corpus is not there.

    Raises:
        ArtefactError: the run's configuration, or the manifest of its corpus, cannot be read.
        OSError: a file cannot be read.
    """
    if run is None:
        return Openings()
    try:
        config: Any = load_yaml(run.config)
        by_language = OmegaConf.select(config, "stage.sampling.prompts") or {}
        corpus = OmegaConf.select(config, "stage.corpus") or ""
        prompts = {str(language): [str(prompt) for prompt in texts] for language, texts in by_language.items()}
    except Exception as error:  # YAML and OmegaConf raise many types
        raise ArtefactError(f"{run.config}: cannot be read ({' '.join(str(error).split())})") from error

    languages: Sequence[str] = ()
    if corpus and manifest_path(run.corpus(corpus)).is_file():  # a copied run may lack its corpus
        languages = sorted(read_manifest(run.corpus(corpus)).splits["train"].languages)
    return Openings(prompts, corpus, languages)
