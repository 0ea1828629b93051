"""A GGUF file as a folder that transformers would save: the inverse of `gguf_file`. Needs the extra `gguf`.

Quantised weights become fp32: the numbers that llama.cpp computes with, not those of the model before quantisation.
"""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError, UserError, shown_value
from dist_lm.interop.architectures import Architecture
from dist_lm.interop.gguf_file import names_of_tensors, rows_of_transformers
from dist_lm.interop.gguf_header import described_gguf
from dist_lm.interop.snapshot_files import parsed
from dist_lm.interop.weights import converted
from dist_lm.model.size import parameter_shapes
from dist_lm.storage import durable
from dist_lm.training.checkpoint_files import ShortFileError, read_exactly
from dist_lm.training.checkpoint_tensors import ComputedTensor, write_tensors

PREFIX_BYTES, MOST_PREFIX_BYTES = 16 << 20, 256 << 20  # the header is looked for in as many bytes, then in more


def write_snapshot(path: Path, folder: Path) -> None:
    """Writes the model in the GGUF file `path` as config.json, model.safetensors (fp32), tokenizer and chat template.

    The files go into `folder`, which exists; one tensor is in memory at a time.

    Raises:
        ArtefactError: the file is damaged, or holds an option, a tensor or a tokenizer that ours lacks; names it.
        UserError: the package gguf is not installed.
        OSError: a file cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{path} needs the package gguf: pip install 'dist_lm[gguf]'") from error
    described = _described(path)
    config, options, architecture_fields, content, file_name, template, tensors = described
    model, architecture = ModelConfig(**options), Architecture(**architecture_fields)
    stored = {name: tensor for name, *tensor in tensors}
    conversions = converted(architecture, parameter_shapes(model))
    names = names_of_tensors(architecture, model.n_layers, conversions)

    # A tensor too many is an option that our model lacks, so it is refused like one too few.
    for name in [*(set(stored) - set(names)), *(set(names) - set(stored))]:
        reason = "the model has no place for this tensor" if name in stored else "this tensor is missing"
        raise ArtefactError(f"{path}: {shown_value(name)}: {reason}")
    for name, conversion in names.items():
        shape = tuple(stored[name][1])
        if math.prod(shape) != math.prod(conversion.shape):
            raise ArtefactError(f"{path}: {name} has shape {shape}, expected {conversion.shape}")

    # Called when the tensor is written, so that one tensor is in memory at a time.
    def read(name: str) -> Any:
        type_number, sizes, offset, n_bytes = stored[name]
        rows = math.prod(sizes[:-1])
        data = np.empty((*sizes[:-1], n_bytes // rows), np.uint8)
        try:
            with path.open("rb") as file:
                read_exactly(file, offset, data.reshape(-1).data)
        except (OSError, ShortFileError) as error:
            raise ArtefactError(f"{path}: tensor {name} cannot be read ({error})") from error
        try:
            weights = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(type_number))
        except NotImplementedError as error:
            kind = gguf.GGMLQuantizationType(type_number).name
            raise ArtefactError(f"{path}: tensor {name} is {kind}, which the package gguf cannot read") from error
        tensor = rows_of_transformers(names[name], torch.tensor(weights), model, architecture)
        return tensor.contiguous().view(-1).view(torch.uint8).numpy()

    tensors = {
        conversion.name: ComputedTensor("F32", conversion.shape, 4 * math.prod(conversion.shape), partial(read, name))
        for name, conversion in names.items()
    }
    durable.write_json(folder / "config.json", config)
    durable.write_bytes(folder / file_name, content)
    if template:
        durable.write_text(folder / "chat_template.jinja", template)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def _described(path: Path) -> list[Any]:
    """Returns what `described_gguf` does of the file, computed by a process with limits.

    Raises:
        ArtefactError: as `described_gguf`; or the file cannot be read, or its header has more than MOST_PREFIX_BYTES.
    """
    length = PREFIX_BYTES
    while length <= MOST_PREFIX_BYTES:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                prefix = file.read(length)
        except OSError as error:
            raise ArtefactError(f"{path} cannot be read ({error.strerror})") from error
        described = parsed(str(path), described_gguf, prefix, size, str(path))
        if described is not None:
            return described
        length *= 4
    raise ArtefactError(f"{path}: its header has more than {MOST_PREFIX_BYTES >> 20} MiB")
