"""`python -m dist_lm checkpoint inspect|verify|consolidate`, on a checkpoint of two ranks that split five heads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from dist_lm.__main__ import main
from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import ModelConfig
from dist_lm.config.stage import StageConfig
from dist_lm.errors import ArtefactError
from dist_lm.model.size import parameter_count
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.training import checkpoint, checkpoint_files, checkpoint_saver
from dist_lm.training.checkpoint_tensors import stored_tensors
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.state import TrainState
from tests.model.small_models import small_config
from tests.parallel.ranks import RankGroups

pytestmark = pytest.mark.cluster

CONFIG = small_config()
Arrays = dict[str, np.ndarray]


def write(world: World, checkpoints: Path) -> Arrays:
    """A checkpoint at step 7, LATEST and BEST; its tensors as they should be."""
    parallel = ParallelConfig(tp=2, compute_dtype="fp32")
    mesh = build_mesh(resolve_layout(parallel, CONFIG, world.size), world.device)
    model = build_model(CONFIG, parallel, mesh, world.device, seed=0)
    optimizer = build_optimizer(model, StageConfig(name="any"))
    for moments in optimizer.state.values():
        moments["exp_avg"].fill_(0.5)
    state = TrainState(step=7, tokens=7000, position=70, best_val_loss=2.5, best_step=7)
    tensors = checkpoint.tensors_of(model, optimizer, CONFIG)
    checkpoint_saver.write(checkpoints, tensors, state, CONFIG, world)
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy()
        for name, tensor in tensors.items()
    }


@pytest.fixture(scope="module")
def written(ranks: RankGroups, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arrays]:
    checkpoints = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints.mkdir()
    return checkpoints.parent, ranks.run(2, write, checkpoints)


@pytest.fixture
def run(written: tuple[Path, Arrays], tmp_path: Path) -> Path:
    """A run of one's own."""
    return Path(shutil.copytree(written[0], tmp_path / "run"))


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of a verb."""
    monkeypatch.setattr(sys, "argv", ["dist-lm", "checkpoint", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def step_of(run: Path) -> Path:
    return run / "checkpoints" / checkpoint_files.step_name(7)


def test_inspect_shows_step_model_logical_shapes_files_and_pointers(run, monkeypatch, capsys):
    assert call(monkeypatch, "inspect", run) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "step 7",
        "7,000 tokens, 70 sequences",
        "2.500, step 7",
        "LATEST, BEST",
        "n_heads=5",
        f"parameters {parameter_count(CONFIG):,}",
        "model.blocks.*.attention.query 2 5 x 8 x 40 F32",  # five heads, not the six that two ranks held
        "optimizer.*.exp_avg ",
        "shard-00002-model-00001-of-00001.safetensors",
    ):
        assert words in shown


def test_verify_of_a_whole_checkpoint(run, monkeypatch, capsys):
    for path in (run, run / "checkpoints", step_of(run)):
        assert call(monkeypatch, "verify", path) == 0
        assert "4 files, all intact" in capsys.readouterr().out


def test_verify_names_every_file_that_is_damaged_missing_or_foreign(run, monkeypatch, capsys):
    first, second = sorted(step_of(run).glob("shard-*"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.rename(step_of(run) / "shard-00009.safetensors")
    assert call(monkeypatch, "verify", run) == 2
    out, error = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [first.name, second.name, "shard-00009.safetensors"]
    assert "damaged files: 3" in error


def test_a_missing_state_file_is_damage_and_not_a_missing_checkpoint(run, monkeypatch, capsys):
    (step_of(run) / checkpoint_files.STATE).unlink()
    assert call(monkeypatch, "verify", step_of(run)) == 2
    assert "state.json is missing" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"state.json": {}}', '{"state.json": 3}'])
def test_a_manifest_that_cannot_be_read_is_one_line(run, monkeypatch, capsys, content):
    (step_of(run) / checkpoint_files.MANIFEST).write_text(content)
    assert call(monkeypatch, "verify", run) == 2
    assert "manifest.json cannot be read" in capsys.readouterr().err


def test_consolidate_writes_the_model_as_the_model_loads_it(run, written, tmp_path, monkeypatch):
    output = tmp_path / "model.safetensors"
    assert call(monkeypatch, "consolidate", run, "--output", output) == 0
    with safe_open(output, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["format"], metadata["step"], metadata["tokens"]) == ("pt", "7", "7000")
    model = Transformer(ModelConfig(**json.loads(metadata["model"])))
    model.load_state_dict(load_file(output), strict=True)
    for name, parameter in model.named_parameters():
        assert np.array_equal(parameter.detach().numpy(), written[1][f"model.{name}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "run"]


def test_consolidate_takes_the_optimizer_too_when_asked(run, written, tmp_path, monkeypatch):
    output = tmp_path / "all.safetensors"
    assert call(monkeypatch, "consolidate", run, "--output", output, "--optimizer") == 0
    found = load_file(output)
    assert {name if name.startswith("optimizer.") else f"model.{name}" for name in found} == written[1].keys()
    for name, tensor in found.items():
        assert np.array_equal(tensor.numpy(), written[1].get(name, written[1].get(f"model.{name}")))


def test_consolidate_refuses_what_would_lose_or_spread_something(run, tmp_path, monkeypatch, capsys):
    output = tmp_path / "model.safetensors"
    output.write_text("precious")
    assert call(monkeypatch, "consolidate", run, "--output", output) == 2
    assert "there is such a file" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert call(monkeypatch, "consolidate", run, "--output", tmp_path / "model.bin") == 2
    assert "expected a name that ends in .safetensors" in capsys.readouterr().err
    assert call(monkeypatch, "consolidate", run, "--output", tmp_path / "none" / "a.safetensors") == 2
    assert "expected a folder that exists" in capsys.readouterr().err
    next(step_of(run).glob("shard-*")).unlink()
    assert call(monkeypatch, "consolidate", run, "--output", tmp_path / "a.safetensors") == 2
    assert "is missing" in capsys.readouterr().err


@pytest.mark.heavy
def test_consolidate_on_a_full_disk_leaves_nothing(run, tmp_path):
    output = tmp_path / "model.safetensors"
    command = [sys.executable, "-m", "dist_lm", "checkpoint", "consolidate", str(run), "--output", str(output)]
    ended = subprocess.run(["prlimit", "--fsize=20000", *command], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "could not be written" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_inspect_does_not_show_a_part_as_the_whole(run, monkeypatch, capsys):
    last = sorted(step_of(run).glob("shard-*"))[-1]
    last.unlink()  # without it every tensor looks whole, only smaller
    assert call(monkeypatch, "inspect", run) == 2
    assert f"{last.name} is missing" in capsys.readouterr().err


def test_a_tensor_that_lacks_a_part_is_refused_whatever_the_manifest_says(run):
    sorted(step_of(run).glob("shard-*"))[0].unlink()
    with pytest.raises(ArtefactError, match="elements; a file of tensors is missing"):
        stored_tensors(step_of(run))


def test_a_path_without_a_checkpoint(tmp_path, monkeypatch, capsys):
    for verb in ("inspect", "verify"):
        assert call(monkeypatch, verb, tmp_path) == 2
        assert "no checkpoint there" in capsys.readouterr().err
