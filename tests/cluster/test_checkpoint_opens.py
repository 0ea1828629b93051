"""How many files each rank opens when a run continues from a checkpoint of many."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dist_lm.config.model import ModelConfig
from dist_lm.model.size import parameter_shapes
from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import all_gather
from dist_lm.parallel.values import shard_of
from dist_lm.storage import durable
from dist_lm.training import checkpoint, checkpoint_files
from dist_lm.training.checkpoint_tensors import index_of, stored_tensors
from dist_lm.training.state import TrainState
from tests.parallel.ranks import RankGroups
from tests.training.test_checkpoint_parts import write_parts

pytestmark = [pytest.mark.cluster, pytest.mark.heavy]

MODEL = ModelConfig(name="any", d_model=64, n_layers=3, n_heads=4, d_ff=64, max_seq_len=8, vocab_size=320)


def value(name: str) -> np.ndarray:
    return np.random.default_rng(sum(name.encode())).standard_normal(parameter_shapes(MODEL)[name], dtype=np.float32)


def written_by(n_ranks: int, checkpoints: Path) -> Path:
    """A checkpoint of parameters as `n_ranks` ranks of FSDP write it: a file each."""
    directory = checkpoints / checkpoint_files.step_name(7)
    directory.mkdir(parents=True)
    tensors = {f"model.{name}": value(name) for name in parameter_shapes(MODEL)}
    cuts = {}
    for name, array in tensors.items():
        rows = -(-len(array) // n_ranks)
        cuts[name] = [sorted({0, len(array), *range(0, len(array), rows)}), *([0, size] for size in array.shape[1:])]
    write_parts(directory, tensors, cuts)

    index = index_of(stored_tensors(directory))
    durable.write_json(directory / checkpoint_files.INDEX, index)
    checkpoint_files.write_state(directory, TrainState(step=7), vars(MODEL))
    digests = {path.name: durable.sha256_of(path) for path in directory.iterdir()}
    checkpoint_files.write_manifest(directory, digests)
    checkpoint_files.write_pointer(checkpoints, checkpoint_files.LATEST, directory)
    return directory


def opened_by(world: World, checkpoints: Path) -> list[tuple[list[str], bool]]:
    """Verifies and loads the newest checkpoint; by rank, what it opened there, and whether its shards are right."""
    mesh = init_device_mesh("cpu", (world.size,))
    names = [f"model.{name}" for name in parameter_shapes(MODEL)]
    expected = {
        name: distribute_tensor(torch.from_numpy(value(name.removeprefix("model."))), mesh, [Shard(0)])
        for name in names
    }
    tensors = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}

    opened: list[str] = []
    is_on = True

    def note(event: str, arguments: tuple) -> None:
        # A hook cannot be removed, so it is switched off.
        if is_on and event == "open" and Path(str(arguments[0])).parent.parent == checkpoints:
            opened.append(Path(str(arguments[0])).name)

    sys.addaudithook(note)
    directory = checkpoint.newest_intact(checkpoints, world)
    assert directory is not None
    checkpoint_files.read_state(directory)
    checkpoint.read(directory, tensors)
    is_on = False

    are_right = all(torch.equal(shard_of(tensors[name]), shard_of(expected[name])) for name in names)
    return all_gather((opened, are_right), tuple[list[str], bool])


@pytest.mark.parametrize("readers", [2, 8])
@pytest.mark.parametrize("writers", [2, 8, 32])
def test_a_rank_opens_its_share_and_the_files_with_its_entries(
    ranks: RankGroups, tmp_path: Path, writers: int, readers: int
):
    """Finds a rank that opens every file, as each of 512 ranks did with about 4,000 files."""
    directory = written_by(writers, tmp_path)
    n_files = len(checkpoint_files.read_manifest(directory))
    # The entries of a reader lie in this many files at most: it reads one range of rows of each tensor, whose cuts
    # differ by the number of rows.
    row_files = {
        rank: {
            writer
            for shape in parameter_shapes(MODEL).values()
            for row in range(*(_rows(shape[0], readers, rank)))
            for writer in [row // -(-shape[0] // writers)]
        }
        for rank in range(readers)
    }

    for rank, (opened, are_right) in enumerate(ranks.run(readers, opened_by, tmp_path)):
        assert are_right
        share = len(range(rank, n_files, readers))
        pointers_of_first = 2 if rank == 0 else 0  # manifest and index, which it reads for all
        assert len(opened) <= 1 + len(row_files[rank]) + share + pointers_of_first, opened


def _rows(n_rows: int, n_ranks: int, rank: int) -> tuple[int, int]:
    size = -(-n_rows // n_ranks)
    return min(rank * size, n_rows), min((rank + 1) * size, n_rows)
