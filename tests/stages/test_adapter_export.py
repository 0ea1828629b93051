"""`dist-lm export` of a run with adapters: a folder for peft, or the merged model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from dist_lm.config.model import AdaptedModelConfig
from dist_lm.config.root import save_config
from dist_lm.errors import ArtefactError, ConfigError
from dist_lm.generation.load import load_model
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.averaging import average
from dist_lm.stages.exporting.files import export
from dist_lm.stages.importing.snapshot import import_model
from dist_lm.storage.run_directory import RunDirectory, WorkDirectory
from dist_lm.training import checkpoint, checkpoint_saver
from dist_lm.training import checkpoint_files as files
from dist_lm.training.checkpoint_files import fingerprint
from dist_lm.training.checkpoint_tensors import consolidate, model_weights, tensors_in
from dist_lm.training.state import TrainState
from tests.conftest import TINY
from tests.training_run import linked, write_untrained

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture
def base(tiny_work: WorkDirectory, tmp_path: Path) -> RunDirectory:
    run = write_untrained(linked(tiny_work, tmp_path / "work"), "language", seed=0)
    save_config(compose_config(["stage=language", *TINY, f"work_dir={run.work.path}"]), run.config)
    return run


@pytest.fixture
def adapted(base: RunDirectory) -> RunDirectory:
    """The run code/default, with adapters of `base` that change its output."""
    config = compose_config(["stage=code", *TINY, f"work_dir={base.work.path}", "stage.lora.rank=3"])
    found = files.find_checkpoint(base.path)
    shape = config.trained_shape
    assert isinstance(shape, AdaptedModelConfig)
    shape = replace(shape, base=str(found.resolve()), base_sha256=fingerprint(found))
    model = Transformer(shape)
    initialise(model, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.05 * torch.randn(parameter.shape) if name.endswith(".b") else 0
    run = base.work.run("code", "default")
    run.create()
    save_config(config, run.config)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tensors = checkpoint.tensors_of(model, None, shape)
        checkpoint_saver.write(run.checkpoints, tensors, TrainState(step=7), shape, World(0, 1, 0, torch.device("cpu")))
    finally:
        dist.destroy_process_group()
    return run


@pytest.mark.heavy
def test_peft_over_the_exported_base_is_the_merged_model(base: RunDirectory, adapted: RunDirectory, tmp_path: Path):
    export(base.path, tmp_path / "base", "fp32")
    export(adapted.path, tmp_path / "adapter", "fp32", base=str(tmp_path / "base"))
    export(adapted.path, tmp_path / "merged", "fp32", merge=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokens_BT = torch.randint(0, 600, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = load(tmp_path / "merged")(input_ids=tokens_BT).logits
        beside = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(input_ids=tokens_BT).logits
        alone = load(tmp_path / "base")(input_ids=tokens_BT).logits
    torch.testing.assert_close(beside, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))
    assert float((alone - whole).abs().max()) > 0.01


def test_the_folder_holds_adapters_alone_and_names_the_base(base: RunDirectory, adapted: RunDirectory, tmp_path: Path):
    export(adapted.path, tmp_path / "adapter", "fp32")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "LoRA of rank 3, alpha 16, over language/default/checkpoints/step_00000005" in card
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base.path)
    base.config.write_text("imported: {source: 'hf:owner/model'}\n")
    export(adapted.path, tmp_path / "adapter", "fp32")  # an earlier export is replaced
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "owner/model"


def test_programs_that_read_a_run_get_the_merged_model(adapted: RunDirectory, tmp_path: Path):
    expected = model_weights(files.find_checkpoint(adapted.path))
    for name, value in load_model(adapted.path).weights.items():
        assert np.array_equal(value.numpy(), expected[name]), name
    consolidate(adapted.path, tmp_path / "one.safetensors")
    for name, tensor in tensors_in(tmp_path / "one.safetensors").items():
        assert np.array_equal(tensor.read().view(np.float32).reshape(tensor.shape), expected[name]), name


def test_an_average_of_adapters_keeps_its_base(base: RunDirectory, adapted: RunDirectory):
    folder = average(adapted, last=1, ema=False, device="", console=Console(quiet=True))
    expected = model_weights(files.find_checkpoint(adapted.path))
    found = model_weights(folder)
    assert {name: np.array_equal(found[name], value) for name, value in expected.items()} == dict.fromkeys(found, True)


def test_what_has_no_base_or_no_merged_model_is_refused(base: RunDirectory, adapted: RunDirectory, tmp_path: Path):
    pytest.importorskip("gguf")
    with pytest.raises(ConfigError, match=r"--gguf=F16: expected --merge"):
        export(adapted.path, tmp_path / "adapter", gguf="F16")
    write_untrained(base.work, "language", seed=2)
    with pytest.raises(ArtefactError, match=f"{base.path}.* has changed since"):
        export(adapted.path, tmp_path / "adapter")
    files.find_checkpoint(base.path).rename(tmp_path / "moved")
    with pytest.raises(ArtefactError, match=r"step_00000005, which is gone"):
        load_model(adapted.path)


@pytest.mark.heavy
def test_our_own_export_of_adapters_comes_back(base: RunDirectory, adapted: RunDirectory, tmp_path: Path):
    """Over the run that it names, which peft could not load, and over its export."""
    work, expected = base.work, model_weights(files.find_checkpoint(adapted.path))
    export(adapted.path, tmp_path / "over_run", "fp32")
    export(base.path, tmp_path / "base", "fp32")
    export(adapted.path, tmp_path / "over_export", "fp32", base=str(tmp_path / "base"))
    for source, name in (("over_run", "one"), ("over_export", "two")):
        run = import_model(str(tmp_path / source), name, work)
        found = model_weights(files.find_checkpoint(run.path))
        for parameter, value in expected.items():
            assert np.allclose(found[parameter], value, rtol=0, atol=1e-6), parameter
        record = files.read_adapters(files.find_checkpoint(run.path))
        assert record is not None
        assert record["lora"]["rank"] == 3  # of each of the queries, keys and values of a fused weight
        assert load_model(run.path).tokenizer.sha256 == load_model(adapted.path).tokenizer.sha256
