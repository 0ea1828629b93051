"""A whole model of transformers as a run that a stage can start from: `snapshot.py` has the form of the run.

One tensor is in memory at a time.
"""

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, shown_value
from dist_lm.interop import foreign_files
from dist_lm.interop.adapter_folder import EMBEDDINGS
from dist_lm.interop.snapshot import (
    CONFIG,
    INDEX,
    WHOLE,
    chat_template_of,
    folder_of,
    model_in,
    snapshot_record,
    special_tokens_of,
    tokenizer_of,
)
from dist_lm.interop.snapshot_files import content_in, file_in, parsed
from dist_lm.interop.weights import ALIASES, BUFFERS, Converted, converted
from dist_lm.model.size import TOKEN_WEIGHTS, Shape, parameter_shapes
from dist_lm.stages.chat_layout import kept_template
from dist_lm.stages.exporting.tensors import FILE_BYTES, as_torch, in_files, made
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.symbols import END_OF_TEXT
from dist_lm.tokenizer.tokenizer import NoEndOfTextError, Tokenizer, with_marks
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import PLACES, ComputedTensor, StoredTensor, tensors_in, write_tensors
from dist_lm.training.state import TrainState

ADDED_MARKS = "tokenizer.add_marks"  # in place of the source of other tensors, for rows that no source has


def import_snapshot(
    folder: Path,
    source: str,
    run: RunDirectory,
    changed: Mapping[str, StoredTensor] | None = None,
    tokenizer_folder: Path | None = None,
    changed_by: str = "",
    add_marks: bool = False,
) -> RunDirectory:
    """Writes `run` from a folder in the form of transformers; it appears when it is complete.

    Args:
        changed: tensors of transformers that replace those of the folder; an embedding may have other rows.
        tokenizer_folder: where tokenizer and chat template are read; by default `folder`.
        changed_by: what the tensors of `changed` come from.
        add_marks: append the marks that the tokenizer lacks, with a row of embedding and head for each.

    Raises:
        ArtefactError: see `snapshot.import_model`.
        UserError: a package that is needed is not installed.
        OSError: a file cannot be written.
    """
    # All checks come before anything is written.
    model, architecture = model_in(folder, run.path.name)
    theirs = _weights(folder) | dict(changed or {})
    for name in EMBEDDINGS:
        if changed and name in changed:
            model = replace(model, vocab_size=changed[name].shape[0])
    # A configuration may claim any depth; each layer has several tensors.
    if model.n_layers > len(theirs):
        raise ArtefactError(
            f"{folder / CONFIG}: num_hidden_layers={model.n_layers}: the weights have {len(theirs)} tensors"
        )
    conversions = converted(architecture, parameter_shapes(model))
    _check_tensors(folder, theirs, conversions, model)
    words = Words.of(tokenizer_folder or folder, model.vocab_size)
    weights: Mapping[str, StoredTensor | ComputedTensor] = theirs
    if add_marks:
        words = words.with_marks()
        weights = with_rows(theirs, conversions, words.tokenizer.vocab_size)
        model = replace(model, vocab_size=words.tokenizer.vocab_size)
        conversions = converted(architecture, parameter_shapes(model))
    imported = {"source": source, "architecture": architecture.name, "snapshot": recorded(source, folder)}
    if add_marks:
        changed_by = ADDED_MARKS
    if changed_by:
        imported["changed_by"] = changed_by

    with appearing(run) as temporary:
        words.write(temporary)
        state = TrainState(tokenizer=words.tokenizer.sha256)
        write_checkpoint(temporary.checkpoints, _ours(weights, conversions, model), model, state)
        write_configuration(temporary, model, imported)
    return run


@dataclass(frozen=True)
class Words:
    """The tokenizer and the chat template of an import."""

    content: bytes  # the tokenizer's file
    file_name: str
    tokenizer: Tokenizer  # with the layout of conversations, if that is not ours
    template: str  # empty without one

    @classmethod
    def of(cls, folder: Path, rows: int) -> "Words":
        """Returns those in a folder of transformers, for an embedding with this number of rows.

        Raises:
            ArtefactError: there is no tokenizer, it does not fit, or has no end-of-text; or the template is damaged.
            UserError: the package `tokenizers` is needed and not installed.
        """
        content, file_name = tokenizer_of(folder, rows)
        tokenizer = _tokenizer(folder, content, file_name)
        layout = kept_template(folder, tokenizer)
        return cls(content, file_name, Tokenizer(content, file_name, layout), chat_template_of(folder))

    def with_marks(self) -> "Words":
        """Returns the same words with the marks that the tokenizer lacks behind its other tokens, whose ids stay.

        Raises:
            UserError: the package `tokenizers` is needed and not installed; or no process can be started for reading
                the file.
        """
        content = parsed(self.file_name, with_marks, self.content, self.file_name)
        tokenizer = Tokenizer(content, self.file_name, self.tokenizer.kept_template)
        return replace(self, content=content, tokenizer=tokenizer)

    def write(self, run: RunDirectory) -> None:
        """Writes them into a new run, whose folder is made.

        Raises:
            OSError: a file cannot be written.
        """
        folder = run.path / "tokenizer"
        folder.mkdir(parents=True)
        durable.write_bytes(folder / self.file_name, self.content)
        if self.template:
            durable.write_text(run.chat_template, self.template)
        if self.tokenizer.kept_template:
            self.tokenizer.kept_template.write(folder)


def recorded(source: str, folder: Path) -> dict[str, Any]:
    """Returns what an import records of its snapshot.

    Raises:
        ArtefactError: a file cannot be read, or is a link that leaves the folder.
    """
    try:
        return snapshot_record(source, folder)
    except OSError as error:
        raise ArtefactError(f"{error.filename} cannot be read ({error.strerror})") from error


@contextmanager
def appearing(run: RunDirectory) -> Iterator[RunDirectory]:
    """Yields a temporary run that becomes `run` at the end of the block; after an error nothing is left.

    Raises:
        ArtefactError: a file cannot be written.
    """
    temporary = RunDirectory(run.path.with_name(f".{run.path.name}.{secrets.token_hex(8)}.tmp"))
    try:
        yield temporary
        temporary.path.rename(run.path)
        durable.fsync(run.path.parent)
    except OSError as error:
        raise ArtefactError(f"{run.path}: could not be written ({error}); free space or repair the folder") from error
    finally:
        shutil.rmtree(temporary.path, ignore_errors=True)


def _tokenizer(folder: Path, content: bytes, file_name: str) -> Tokenizer:
    """Returns the tokenizer of the folder.

    Raises:
        ArtefactError: it has no end-of-text by a known name, or cannot be read.
        UserError: the package `tokenizers` is not installed.
    """
    try:
        return Tokenizer(content, file_name)
    except NoEndOfTextError as error:
        eos_token = special_tokens_of(folder).get("eos_token", "")
        token = f"{eos_token}, its eos_token" if eos_token else "the token that ends a text"
        raise ArtefactError(
            f"{folder}: {file_name} has no end-of-text by a known name: copy the folder, and in the files of the "
            f"tokenizer rename {token}, to {END_OF_TEXT}"
        ) from error


def write_checkpoint(
    checkpoints: Path,
    tensors: Mapping[str, ComputedTensor],
    model: ModelConfig,
    state: TrainState,
    adapters: Mapping[str, Any] | None = None,
) -> None:
    """Writes parameters as a checkpoint of the step in `state`, without a process group; LATEST then names it.

    Args:
        tensors: by the name of the parameter; one is in memory at a time.
        adapters: see `checkpoint_files.write_state`.

    Raises:
        FileExistsError: the folder of the step exists, even an incomplete one.
        OSError: a file cannot be written; an incomplete folder may stay.
    """
    checkpoint = checkpoints / files.step_name(state.step)
    checkpoint.mkdir(parents=True)

    # One rank has written all: every tensor begins at offset 0 of its logical tensor.
    named = {files.MODEL + name: tensor for name, tensor in tensors.items()}
    checksums = {}
    for number, part in enumerate(in_files(named, FILE_BYTES), start=1):
        path = checkpoint / f"shard-00001-model-{number:05d}{files.TENSORS}"
        offsets = {name: {"saved_offsets": [0] * len(tensor.shape)} for name, tensor in part.items()}
        write_tensors(path, part, {"format": "pt", PLACES: json.dumps(offsets)})
        checksums[path.name] = durable.sha256_of(path)

    files.write_state(checkpoint, state, asdict(model), adapters)
    checksums[files.STATE] = durable.sha256_of(checkpoint / files.STATE)
    files.write_manifest(checkpoint, checksums)
    # Last, so that a checkpoint that LATEST names is complete.
    files.write_pointer(checkpoints, files.LATEST, checkpoint)


@contextmanager
def snapshot_at(source: str) -> Iterator[Path]:
    """Yields the folder that `source` names; for a GGUF file a temporary one, and a model of the hub is fetched.

    Raises:
        ArtefactError: there is no such model, or the file is damaged.
        UserError: a package that is needed (gguf, huggingface_hub) is not installed.
        OSError: a file cannot be written.
    """
    path = Path(source).expanduser()
    if path.suffix != ".gguf":
        yield folder_of(source)
        return
    from dist_lm.stages.importing.gguf import write_snapshot

    with TemporaryDirectory(prefix="dist_lm_gguf_") as folder:
        write_snapshot(path, Path(folder))
        yield Path(folder)


def _weights(folder: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of all files that the index names, or of model.safetensors, by name; no weight is read yet.

    Raises:
        ArtefactError: a file is missing, damaged, or a link that leaves the folder; or two files have the same tensor.
    """
    names = [WHOLE]
    if (index := content_in(folder, INDEX)) is not None:
        where = str(folder / INDEX)
        names = parsed(where, foreign_files.weight_files, index, where)

    paths: list[Path] = []
    for name in names:
        path = file_in(folder, name)
        if path is None:
            raise ArtefactError(
                f"{folder}: {shown_value(name)} is missing: weights are read from safetensors files only"
            )
        paths.append(path)

    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        file_tensors = tensors_in(path)
        if doubles := sorted(file_tensors.keys() & tensors.keys()):
            raise ArtefactError(f"{path}: tensor {shown_value(doubles[0])} is in another file of the model, too")
        tensors |= file_tensors
    # Other families use some of these names for tensors of their own.
    is_gpt_neox = any(name.startswith("gpt_neox.") for name in tensors)
    if not is_gpt_neox:
        return tensors
    return {ALIASES.get(name, name): tensor for name, tensor in tensors.items()}


def _check_tensors(
    folder: Path, theirs: Mapping[str, StoredTensor], conversions: list[Converted], model: ModelConfig
) -> None:
    """Refuses missing tensors, other shapes, and tensors that the model has no place for.

    Raises:
        ArtefactError: names the tensor.
    """
    for tensor in conversions:
        if tensor.name not in theirs:
            raise ArtefactError(f"{folder}: {tensor.name} is missing in the weights")
        if theirs[tensor.name].shape != tensor.shape:
            raise ArtefactError(
                f"{folder}: {tensor.name} has shape {theirs[tensor.name].shape}, expected {tensor.shape} by {CONFIG}"
            )

    # A tied head may be stored beside the embedding, if it is the same.
    expected = {tensor.name for tensor in conversions}
    for name, stored in theirs.items():
        if name in expected or BUFFERS.fullmatch(name):
            continue
        is_head = model.tie_embeddings and name in (*ALIASES, *ALIASES.values())
        if not is_head or not np.array_equal(stored.read(), theirs[conversions[0].name].read()):
            raise ArtefactError(f"{folder}: {shown_value(name)}: the model has no place for this tensor")


def with_rows(
    theirs: Mapping[str, StoredTensor], conversions: list[Converted], rows: int
) -> dict[str, StoredTensor | ComputedTensor]:
    """Returns the tensors with embedding and head of `rows` rows, in fp32; the others, and the mapping given, stay as
    they are. The rows there stay; each new one is their mean, so that the model finds a new token as likely as an
    average one.

    The new tensors are computed when they are read.

    Args:
        conversions: those of the model as it is stored.
        rows: at least as many as there are.
    """

    def grown(tensor: StoredTensor, name: str) -> torch.Tensor:
        weight = as_torch(tensor, name).float()
        mean = weight.double().mean(0, keepdim=True).float()
        return torch.cat([weight, mean.expand(rows - len(weight), -1)])

    tensors: dict[str, StoredTensor | ComputedTensor] = dict(theirs)
    for conversion in conversions:
        if conversion.ours[0] in TOKEN_WEIGHTS:
            stored = theirs[conversion.name]
            shape = (rows, *stored.shape[1:])
            tensors[conversion.name] = made("F32", shape, partial(grown, stored, conversion.name))
    return tensors


def _ours(
    theirs: Mapping[str, StoredTensor | ComputedTensor], conversions: list[Converted], model: ModelConfig
) -> dict[str, ComputedTensor]:
    """Returns our parameters in fp32 by name, in the order of the model; they are computed when they are written, and a
    tensor of theirs that is damaged raises its ArtefactError then. A score of theirs has no bias: ours is 0.
    """

    def read(conversion: Converted, index: int) -> torch.Tensor:
        return conversion.to_ours(as_torch(theirs[conversion.name], conversion.name), index)

    # One tensor of theirs may hold several of ours, such as query, key and value.
    parameters: dict[str, ComputedTensor] = {}
    for conversion in conversions:
        for index, name in enumerate(conversion.ours):
            parameters[name] = made("F32", conversion.shapes[index], partial(read, conversion, index))
    if model.head == "scalar":
        parameters["scalar_head.bias"] = made("F32", (1,), lambda: torch.zeros(1))

    shapes: dict[str, Shape] = parameter_shapes(model)
    return {name: parameters[name] for name in shapes}


def write_configuration(run: RunDirectory, model: ModelConfig, imported: Mapping[str, Any]) -> None:
    """Writes conf/model/NAME.yaml and config.yaml into a new run, which has no folder conf/model.

    Args:
        imported: source, architecture, and hashes by which a later command finds out whether the source has changed.
    """
    conf = run.path / "conf" / "model"
    conf.mkdir(parents=True)
    durable.write_text(conf / f"{model.name}.yaml", OmegaConf.to_yaml(OmegaConf.create(asdict(model))))
    config = {"model": asdict(model), "imported": dict(imported)}
    durable.write_text(run.config, OmegaConf.to_yaml(OmegaConf.create(config)))
