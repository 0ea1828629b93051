"""The part of `dist-lm export` for a checkpoint of adapters: a folder that peft loads over the base."""

from pathlib import Path

from omegaconf import OmegaConf

from dist_lm.generation.load import run_of
from dist_lm.interop.architectures import Architecture
from dist_lm.interop.peft import peft_config, peft_tensors
from dist_lm.stages.export import DTYPES, as_torch, made
from dist_lm.storage import durable
from dist_lm.training import checkpoint_files as files
from dist_lm.training.adapters import adapted_model
from dist_lm.training.checkpoint_tensors import stored_tensors, write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_adapters(folder: Path, checkpoint: Path, found: Architecture, dtype: str, base: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json into `folder`.

    Args:
        found: architecture of the model.
        dtype: bf16 | fp32.
        base: folder or hub id of the base in transformers' form; empty: see `base_name`.

    Raises:
        ArtefactError: the base is gone or has changed.
    """
    model, stored = adapted_model(checkpoint), stored_tensors(checkpoint)
    tensors = peft_tensors(found, model, lambda name: as_torch(stored[files.MODEL + name], name))
    stored_dtype = DTYPES[dtype][0]
    parts = {name: made(stored_dtype, tensor.shape, tensor.make) for name, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS, parts, {"format": "pt"})
    durable.write_json(folder / CONFIG, peft_config(found, model, base or base_name(Path(model.base))))


def base_name(base: Path) -> str:
    """Where an imported base came from: a folder or hub id, which transformers loads. The path of another base, which
    has to be exported first."""
    run = run_of(base)
    source = OmegaConf.select(OmegaConf.load(run.config), "imported.source") if run else None
    if source is None:
        return str(run.path if run else base)
    source = str(source).removeprefix("hf:")
    folder = Path(source).expanduser()
    return str(folder.resolve()) if folder.is_dir() else source
