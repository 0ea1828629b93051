"""The program of `dist-lm export`: a checkpoint as a folder that transformers loads.

    FOLDER/
      config.json generation_config.json
      model.safetensors, or model-00001-of-00002.safetensors ... with model.safetensors.index.json
      tokenizer.json (or tokenizer.model) tokenizer_config.json special_tokens_map.json chat_template.jinja
      model-F16.gguf, model-Q8_0.gguf or model-F32.gguf, with `--gguf`
      README.md    the model card; one that was edited stays
      export.json  written last: the checkpoint, the files of the export, the hash of the card that it wrote

One tensor is in memory at a time.
"""

import secrets
import shutil
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from dist_lm.chat.kept_template import turn_ends
from dist_lm.chat.template import chat_template
from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, ConfigError, require
from dist_lm.generation.load import model_config_of, run_of, tokenizer_of
from dist_lm.interop.architectures import Architecture, architecture_of, hf_config
from dist_lm.interop.gguf_file import gguf_architecture, require_gguf, write_gguf
from dist_lm.interop.hf_tokenizer import save_hf_tokenizer
from dist_lm.interop.weights import Converted, converted
from dist_lm.model.size import parameter_shapes
from dist_lm.stages.exporting.folder import refuse_files_of_others
from dist_lm.stages.exporting.model_card import CARD, RECORD, model_card
from dist_lm.stages.exporting.tensors import DTYPES, FILE_BYTES, Read, as_torch, in_files, made
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.symbols import END
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import ComputedTensor, model_tensors, write_tensors


def export(
    path: Path,
    folder: Path,
    dtype: str = "bf16",
    tokenizer: Path | None = None,
    gguf: str | None = None,
    merge: bool = False,
    base: str = "",
) -> Path:
    """Writes the checkpoint that `path` names to `folder`; returns the checkpoint.

    The folder appears when it is complete; an earlier export there is replaced, but for a model card that was edited.
    Adapters are written as peft reads them, unless they are merged.

    Args:
        dtype: bf16 | fp32.
        tokenizer: file or folder; by default that of the run.
        gguf: F16 | Q8_0 | F32: a file for llama.cpp as well.
        merge: write the merged model of a checkpoint of adapters.
        base: folder or hub id of the base, for peft; by default where it was imported from.

    Raises:
        ConfigError: no architecture of transformers holds the model, or an option is unknown or does not fit it.
        ArtefactError: the checkpoint or tokenizer is missing, damaged or another one, or `folder` holds files of others
            or cannot be written.
        UserError: the package gguf is not installed.
        OSError: a file cannot be read.
    """
    # All checks come before anything is written.
    require(dtype in DTYPES, "--dtype", dtype, " or ".join(DTYPES))
    folder = folder.expanduser().resolve()
    refuse_files_of_others(folder)
    # A damaged checkpoint would become an export that nobody can check.
    checkpoint = files.require_intact(files.find_checkpoint(path))
    model, run = model_config_of(checkpoint), run_of(checkpoint)
    architecture = architecture_of(model)
    if isinstance(architecture, str):
        raise ConfigError(f"checkpoint {checkpoint}: no architecture of transformers holds it: {architecture}")
    as_adapters = files.read_adapters(checkpoint) is not None and not merge
    if gguf is not None:
        accepted = "--merge as well: llama.cpp gets the merged model of a run with adapters"
        require(not as_adapters, "--gguf", gguf, accepted)
        require_gguf(gguf, model, gguf_architecture(model, architecture))
    vocabulary = tokenizer_of(checkpoint, tokenizer, run)
    files.check_tokenizer(checkpoint, files.read_state(checkpoint)[0], vocabulary.sha256)

    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir(parents=True)
        if as_adapters:
            from dist_lm.stages.exporting.adapters import write_adapters

            write_adapters(temporary, checkpoint, architecture, dtype, base, vocabulary.special_ids)
        else:
            stored = model_tensors(checkpoint)

            def read(name: str) -> torch.Tensor:
                return as_torch(stored[name], name)

            write_model(temporary, model, read, dtype, token_ids(vocabulary))
            if gguf is not None:
                layout = gguf_architecture(model, architecture)
                conversions = converted(layout, parameter_shapes(model))
                template = _template(run, vocabulary)
                gguf_path = temporary / f"model-{gguf}.gguf"
                write_gguf(gguf_path, gguf, model, layout, conversions, read, vocabulary, template)

        save_hf_tokenizer(Path(vocabulary.name), temporary, _template(run, vocabulary))
        # For import, and for converters that read SentencePiece.
        if vocabulary.is_trained:
            shutil.copyfile(vocabulary.name, temporary / "tokenizer.model")
        card = model_card(checkpoint, model, architecture, run, dtype, as_adapters).encode()
        durable.write_bytes(temporary / CARD, edited_card(folder) or card)

        # The record is written last: a folder with it is complete.
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        record = {
            "checkpoint": str(checkpoint),
            "manifest": durable.sha256_of(checkpoint / files.MANIFEST),
            "dtype": dtype,
        }
        durable.write_json(temporary / RECORD, record | {"files": sizes, "card": sha256(card).hexdigest()})

        if folder.exists():
            refuse_files_of_others(folder)
            shutil.rmtree(folder)
        temporary.rename(folder)
        durable.fsync(folder.parent)
    except OSError as error:
        raise ArtefactError(f"{folder}: could not be written ({error}); free space or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return checkpoint


def edited_card(folder: Path) -> bytes | None:
    """Returns the model card of an earlier export, if it is not as that wrote it.

    Raises:
        ArtefactError: the record of the export is no JSON.
        OSError: a file cannot be read.
    """
    record = durable.read_json(folder / RECORD)
    if not record or not (folder / CARD).is_file():
        return None
    card = (folder / CARD).read_bytes()
    if "card" in record:
        is_edited = sha256(card).hexdigest() != record["card"]
    else:
        # An older version recorded only the size.
        is_edited = len(card) != record.get("files", {}).get(CARD)
    return card if is_edited else None


def write_model(folder: Path, model: ModelConfig, read: Read, dtype: str, ids: Mapping[str, Any]) -> None:
    """Writes config.json, generation_config.json and the weights (safetensors, several files if large) into `folder`.

    A model with a scalar head gets no generation_config.json.

    Args:
        read: gives whole, unpadded parameters.
        dtype: bf16 | fp32.
        ids: token ids by their names in config.json; `eos_token_id` may be a list.

    Raises:
        ConfigError: no architecture of transformers holds the model; names the option.
        OSError: a file cannot be written.
    """
    architecture = architecture_of(model)
    if isinstance(architecture, str):
        raise ConfigError(architecture)
    name, torch_dtype = DTYPES[dtype]
    parts = list(in_files(_made(architecture, model, read, name, torch_dtype), FILE_BYTES))

    # Large weights are split as transformers splits them, with an index.
    file_names = ["model.safetensors"]
    if len(parts) > 1:
        file_names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
        file_of = {tensor: file for file, part in zip(file_names, parts, strict=True) for tensor in part}
        size = sum(tensor.bytes for part in parts for tensor in part.values())
        index = {"metadata": {"total_size": size}, "weight_map": file_of}
        durable.write_json(folder / "model.safetensors.index.json", index)
    for file, part in zip(file_names, parts, strict=True):
        write_tensors(folder / file, part, {"format": "pt"})

    # config.json takes one end of text, generation_config.json all tokens that end a generation.
    eos_ids = ids["eos_token_id"]
    first_eos_id = eos_ids[0] if isinstance(eos_ids, list) else eos_ids
    config = hf_config(model, architecture, str(torch_dtype).removeprefix("torch."))
    config |= {**ids, "eos_token_id": first_eos_id}
    durable.write_json(folder / "config.json", config)
    if model.head == "tokens":
        durable.write_json(folder / "generation_config.json", dict(ids))


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the ids of config.json: the first token of documents, padding, and the list of all tokens that end
    generations.

    With the kept template of an imported model they are those that its own files name.
    """
    ids = {"bos_token_id": tokenizer.first_token.id, "pad_token_id": tokenizer.pad_id}
    turn_end_ids = [tokenizer.special_ids[END]] if END in tokenizer.special_ids else []
    if template := tokenizer.kept_template:
        # Conversations in a template of an imported model end as its own tokens say.
        named_ids = {f"{name}_id": tokenizer.special_ids_in_file.get(text) for name, text in template.special_tokens}
        ids |= {name: named_ids[name] for name in ids if named_ids.get(name) is not None}
        turn_end_ids = list(turn_ends(tokenizer))
    return ids | {"eos_token_id": list(dict.fromkeys((tokenizer.eot_id, *turn_end_ids)))}


def _made(
    architecture: Architecture, model: ModelConfig, read: Read, dtype: str, torch_dtype: torch.dtype
) -> dict[str, ComputedTensor]:
    """Tensors of transformers by name, computed from ours when they are written."""

    def compute(conversion: Converted) -> torch.Tensor:
        return conversion.to_theirs([read(name).detach().to("cpu", torch_dtype) for name in conversion.ours])

    conversions = converted(architecture, parameter_shapes(model))
    return {conversion.name: made(dtype, conversion.shape, partial(compute, conversion)) for conversion in conversions}


def _template(run: RunDirectory | None, tokenizer: Tokenizer) -> str:
    """Returns the chat template by which conversations were laid out: the imported model's, else ours."""
    if tokenizer.kept_template:
        return tokenizer.kept_template.text
    # An imported model whose template lays out as ours keeps the text of its own.
    if run and run.chat_template.is_file():
        return run.chat_template.read_text(encoding="utf-8")
    return chat_template()
