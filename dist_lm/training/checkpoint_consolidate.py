"""A checkpoint's tensors in one safetensors file: `python -m dist_lm checkpoint consolidate PATH --output FILE`."""

import json
import os
import secrets
from pathlib import Path

from dist_lm.errors import ArtefactError
from dist_lm.storage import durable
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_tensors import LENGTH_BYTES, METADATA, StoredTensor, stored_tensors

ALIGNMENT = 8  # of the numbers, so that they can be mapped


def consolidate(path: Path, output: Path, with_optimizer: bool = False) -> int:
    """Write the model of the checkpoint at `path` to `output`; returns how many tensors that are.

    Parameters are called as in the model, moments `optimizer.PARAMETER.exp_avg`. At any time one tensor is in memory;
    `output` appears when all is written.

    Raises:
        ArtefactError: `output` is there already or cannot be written, or the checkpoint is damaged.
    """
    if output.suffix != files.TENSORS:
        raise ArtefactError(f"--output={output}: expected a name that ends in {files.TENSORS}")
    if output.exists():
        raise ArtefactError(f"--output={output}: is there already; name another file, or remove it first")
    if not output.parent.is_dir():
        raise ArtefactError(f"--output={output}: there is no folder {output.parent}; make it first")
    directory = files.require_intact(files.find_checkpoint(path))
    tensors = {}
    for name, tensor in stored_tensors(directory).items():
        if name.startswith(files.MODEL):
            tensors[name.removeprefix(files.MODEL)] = tensor
        elif with_optimizer and name.startswith(files.OPTIMIZER):
            tensors[name] = tensor
    state, model = files.read_state(directory)
    metadata = {"format": "pt", "step": str(state.step), "tokens": str(state.tokens), "model": json.dumps(model)}
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(8)}.tmp")
    try:
        _write(temporary, tensors, metadata)
        temporary.rename(output)
        durable.fsync_directory(output.parent)
    except OSError as error:
        raise ArtefactError(f"--output={output}: could not be written ({error}); free space or name another") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(tensors)


def _write(path: Path, tensors: dict[str, StoredTensor], metadata: dict[str, str]) -> None:
    header: dict[str, object] = {METADATA: metadata}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.bytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(LENGTH_BYTES, "little"))
        file.write(encoded)
        for tensor in tensors.values():
            file.write(tensor.read().data)
        file.flush()
        os.fsync(file.fileno())
