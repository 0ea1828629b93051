"""The program of `dist-lm export`: a checkpoint as a folder that transformers loads.

    FOLDER/
      config.json generation_config.json
      model.safetensors, or model-00001-of-00002.safetensors ... with model.safetensors.index.json
      tokenizer.json (or tokenizer.model) tokenizer_config.json special_tokens_map.json chat_template.jinja
      model-F16.gguf or model-Q8_0.gguf, with `--gguf`
      README.md    the model card; one that was edited stays
      export.json  written last: the checkpoint, the files of the export, the hash of the card that it wrote

One tensor is in memory at a time.
"""

import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_lm.chat.kept_template import turn_ends
from dist_lm.chat.template import chat_template
from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, ConfigError, require
from dist_lm.generation.load import model_config_of, run_of, tokenizer_of
from dist_lm.interop.architectures import Architecture, architecture_of, hf_config
from dist_lm.interop.gguf_file import require_gguf, write_gguf
from dist_lm.interop.hf_tokenizer import save_hf_tokenizer
from dist_lm.interop.weights import Converted, converted
from dist_lm.model.size import Shape, parameter_shapes
from dist_lm.stages.exporting.model_card import model_card
from dist_lm.stages.exporting.stage import CARD, RECORD
from dist_lm.storage import durable
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.symbols import END
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import MadeTensor, StoredTensor, model_tensors, write_tensors

DTYPES = {"bf16": ("BF16", torch.bfloat16), "fp32": ("F32", torch.float32)}  # names in safetensors and torch
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FILE_BYTES = 4 << 30  # of weights in one file
Read = Callable[[str], torch.Tensor]  # a parameter of ours by its name


def export(
    path: Path,
    folder: Path,
    dtype: str = "bf16",
    tokenizer: Path | None = None,
    gguf: str | None = None,
    merge: bool = False,
    base: str = "",
) -> Path:
    """Write the checkpoint that `path` names to `folder`; returns the checkpoint.

    The folder appears when it is complete; an earlier export there is replaced, but for a model card that was edited.
    Adapters are written as peft reads them, unless they are merged.

    Args:
        dtype: bf16 | fp32.
        tokenizer: file or folder; by default that of the run.
        gguf: F16 | Q8_0: a file for llama.cpp as well.
        merge: write the merged model of a checkpoint of adapters.
        base: folder or hub id of the base, for peft; by default where it was imported from.

    Raises:
        ConfigError: no architecture of transformers holds the model, or `dtype` is unknown.
        ArtefactError: the checkpoint is missing or damaged, or `folder` holds files of others.
    """
    require(dtype in DTYPES, "--dtype", dtype, " or ".join(DTYPES))
    folder = folder.expanduser().resolve()
    _refuse_files_of_others(folder)
    checkpoint = files.require_intact(files.find_checkpoint(path))
    model, run = model_config_of(checkpoint), run_of(checkpoint)
    found = architecture_of(model)
    if isinstance(found, str):
        raise ConfigError(f"checkpoint {checkpoint}: no architecture of transformers holds it: {found}")
    adapters = files.read_adapters(checkpoint) is not None and not merge
    if gguf is not None:
        require(not adapters, "--gguf", gguf, "--merge as well: llama.cpp gets the merged model of a run with adapters")
        require_gguf(gguf, model, found)
    pieces = tokenizer_of(checkpoint, tokenizer, run)
    files.check_tokenizer(checkpoint, files.read_state(checkpoint)[0], pieces.sha256)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir(parents=True)
        if adapters:
            from dist_lm.stages.exporting.adapters import write_adapters

            write_adapters(temporary, checkpoint, found, dtype, base)
        else:
            stored = model_tensors(checkpoint)

            def read(name: str) -> torch.Tensor:
                return as_torch(stored[name], name)

            write_model(temporary, model, read, dtype, token_ids(pieces))
            if gguf is not None:
                entries, file = converted(found, parameter_shapes(model)), temporary / f"model-{gguf}.gguf"
                write_gguf(file, gguf, model, found, entries, read, pieces, _template(run, pieces))
        save_hf_tokenizer(Path(pieces.name), temporary, _template(run, pieces))
        if pieces.is_trained:  # for import, and for converters that read SentencePiece
            shutil.copyfile(pieces.name, temporary / "tokenizer.model")
        card = model_card(checkpoint, model, found, run, dtype, adapters).encode()
        durable.write_bytes(temporary / CARD, edited_card(folder) or card)
        written = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        record = {
            "checkpoint": str(checkpoint),
            "manifest": durable.sha256_of(checkpoint / files.MANIFEST),
            "dtype": dtype,
        }
        durable.write_json(temporary / RECORD, record | {"files": written, "card": sha256(card).hexdigest()})
        if folder.exists():
            _refuse_files_of_others(folder)
            shutil.rmtree(folder)
        temporary.rename(folder)
        durable.fsync_directory(folder.parent)
    except OSError as error:
        raise ArtefactError(f"{folder}: could not be written ({error}); free space or name another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return checkpoint


def edited_card(folder: Path) -> bytes | None:
    """The model card of an earlier export, if it is not as that wrote it."""
    record = durable.read_json(folder / RECORD)
    if not record or not (folder / CARD).is_file():
        return None
    card = (folder / CARD).read_bytes()
    if "card" not in record:  # written by an older version
        return card if len(card) != record.get("files", {}).get(CARD) else None
    return card if sha256(card).hexdigest() != record["card"] else None


def write_model(folder: Path, model: ModelConfig, read: Read, dtype: str, ids: Mapping[str, Any]) -> None:
    """Write config.json, generation_config.json and the weights into `folder`.

    Args:
        read: gives whole, unpadded parameters.
        dtype: bf16 | fp32.
        ids: token ids by their names in config.json; `eos_token_id` may be a list.

    Raises:
        ConfigError: no architecture of transformers holds the model; names the option.
    """
    found = architecture_of(model)
    if isinstance(found, str):
        raise ConfigError(found)
    name, torch_dtype = DTYPES[dtype]
    parts = list(in_files(_made(found, model, read, name, torch_dtype), FILE_BYTES))
    names = ["model.safetensors"]
    if len(parts) > 1:
        names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
        weights = {tensor: file for file, part in zip(names, parts, strict=True) for tensor in part}
        size = sum(tensor.bytes for part in parts for tensor in part.values())
        index = {"metadata": {"total_size": size}, "weight_map": weights}
        durable.write_json(folder / "model.safetensors.index.json", index)
    for file, part in zip(names, parts, strict=True):
        write_tensors(folder / file, part, {"format": "pt"})
    first = ids["eos_token_id"][0] if isinstance(ids["eos_token_id"], list) else ids["eos_token_id"]
    config = hf_config(model, found, str(torch_dtype).removeprefix("torch."))
    config |= {**ids, "eos_token_id": first}
    durable.write_json(folder / "config.json", config)
    if model.head == "tokens":
        durable.write_json(folder / "generation_config.json", dict(ids))


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of config.json: the opening of documents; end-of-text and the end of a turn end generations."""
    ends = [tokenizer.special_ids[END]] if END in tokenizer.special_ids else []
    found = {"bos_token_id": tokenizer.opening.first, "pad_token_id": tokenizer.pad_id}
    if kept := tokenizer.kept_template:
        names = {f"{name}_id": tokenizer.file_names.get(text) for name, text in kept.special_tokens}
        found |= {name: names[name] for name in found if names.get(name) is not None}
        ends = list(turn_ends(tokenizer))
    return found | {"eos_token_id": list(dict.fromkeys((tokenizer.eot_id, *ends)))}


def in_files(
    tensors: Mapping[str, StoredTensor | MadeTensor], file_bytes: int
) -> Iterator[dict[str, StoredTensor | MadeTensor]]:
    """The tensors of each file, in order: a new file starts when a tensor does not fit into `file_bytes`."""
    part: dict[str, StoredTensor | MadeTensor] = {}
    for name, tensor in tensors.items():
        if part and sum(one.bytes for one in part.values()) + tensor.bytes > file_bytes:
            yield part
            part = {}
        part[name] = tensor
    yield part


def as_torch(tensor: StoredTensor | MadeTensor, name: str) -> torch.Tensor:
    """A stored tensor.

    Raises:
        ArtefactError: its dtype is none of fp32, fp16 and bf16; names the tensor.
    """
    if tensor.dtype not in TORCH:
        file = f"{tensor.parts[0].file}: " if isinstance(tensor, StoredTensor) else ""
        raise ArtefactError(f"{file}{name} is {tensor.dtype}: expected {', '.join(TORCH)}")
    return torch.from_numpy(tensor.read()).view(TORCH[tensor.dtype]).view(tensor.shape)


def made(dtype: str, shape: Shape, make: Callable[[], torch.Tensor]) -> MadeTensor:
    """A tensor of a file, computed when it is written. `dtype`: name of safetensors."""
    torch_dtype = TORCH[dtype]
    return MadeTensor(dtype, shape, math.prod(shape) * torch_dtype.itemsize, lambda: _bytes(make().to(torch_dtype)))


def _made(
    found: Architecture, model: ModelConfig, read: Read, dtype: str, torch_dtype: torch.dtype
) -> dict[str, MadeTensor]:
    def tensor(one: Converted) -> torch.Tensor:
        return one.to_theirs([read(name).detach().to("cpu", torch_dtype) for name in one.ours])

    return {one.name: made(dtype, one.shape, partial(tensor, one)) for one in converted(found, parameter_shapes(model))}


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _template(run: RunDirectory | None, tokenizer: Tokenizer) -> str:
    """The chat template that conversations were laid out by: that of an imported model, else ours."""
    if tokenizer.kept_template:
        return tokenizer.kept_template.text
    own = run.chat_template if run else None
    return own.read_text(encoding="utf-8") if own and own.is_file() else chat_template()


def _refuse_files_of_others(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ArtefactError(f"{folder} is a file: name a folder")
    record = durable.read_json(folder / RECORD)
    known = {RECORD, *record.get("files", {})}
    if others := sorted({path.name for path in folder.iterdir()} - known):
        raise ArtefactError(f"{folder} holds {others[0]}, which no export wrote: name a new or empty folder")
