"""Parts of tensors in files: any box of a tensor is filled from exactly the files that hold entries of it."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dist_lm.config.model import ModelConfig
from dist_lm.errors import ArtefactError
from dist_lm.training import checkpoint
from dist_lm.training.checkpoint import PartsOfTensor, contents_of, needed_parts, read, read_contents, read_entries
from dist_lm.training.checkpoint_files import INDEX
from dist_lm.training.checkpoint_tensors import PLACES, StoredTensor, stored_tensors
from dist_lm.training.checkpoint_tensors import Part as StoredPart
from dist_lm.training.checkpoint_writer import Publication, publish
from dist_lm.training.state import TrainState

MODEL = ModelConfig(name="any", d_model=8, n_layers=1, n_heads=4, d_ff=8, max_seq_len=8, vocab_size=8)

Cuts = list[list[int]]


# Reads a checkpoint again and again while its file shrinks and grows, and says what came of it.
READER = """
import sys
from dataclasses import asdict
from pathlib import Path
from dist_lm.errors import ArtefactError
from dist_lm.training.checkpoint_tensors import stored_tensors

(tensor,) = stored_tensors(Path(sys.argv[1])).values()
n_whole = n_refused = 0
print("ready", flush=True)
while min(n_whole, n_refused) < 20:
    try:
        tensor.read()
        n_whole += 1
    except ArtefactError as error:
        assert "shorter than its header says" in str(error), error
        n_refused += 1
"""


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def boxes_between(cuts: Cuts) -> list[tuple[slice, ...]]:
    """The boxes of a tensor that is cut at these indices of each dimension."""
    return list(product(*([slice(*pair) for pair in pairwise(cut)] for cut in cuts)))


def write_parts(directory: Path, tensors: dict[str, np.ndarray], cuts: dict[str, Cuts]) -> None:
    """Writes each part to a file of its own number, beside the parts of other tensors with that number."""
    files: dict[int, dict[str, tuple[np.ndarray, list[int]]]] = {}
    for name, array in tensors.items():
        for number, box in enumerate(boxes_between(cuts[name])):
            files.setdefault(number, {})[name] = np.array(array[box], order="C"), [cut.start for cut in box]
    for number, parts in files.items():
        places = {name: {"saved_offsets": offsets} for name, (_, offsets) in parts.items()}
        save_file(
            {name: part for name, (part, _) in parts.items()},
            directory / f"shard-{number:05d}.safetensors",
            metadata={PLACES: json.dumps(places)},
        )


def test_a_tensor_in_parts_is_read_whole(tmp_path: Path, alone):
    """Finds parts that are put in the wrong place, and a type that is read as another."""
    tensors = {
        "model.matrix": np.arange(35, dtype=np.float32).reshape(5, 7),
        "model.line": np.arange(9, dtype=np.float32),
        "optimizer.matrix.step": np.float32(3).reshape(()),
    }
    cuts = {"model.matrix": [[0, 2, 5], [0, 3, 4, 7]], "model.line": [[0, 1, 9]], "optimizer.matrix.step": []}
    write_parts(tmp_path, tensors, cuts)

    read_tensors = {name: torch.full(array.shape, -1.0) for name, array in tensors.items()}
    read(tmp_path, read_tensors)
    for name, array in tensors.items():
        assert np.array_equal(read_tensors[name].numpy(), array), name


def test_a_missing_tensor_another_shape_and_a_short_file_are_refused_by_name(tmp_path: Path, alone):
    """Finds a load that leaves a tensor as it was, or ends in the words of numpy alone."""
    write_parts(tmp_path, {"model.line": np.arange(9, dtype=np.float32)}, {"model.line": [[0, 4, 9]]})
    with pytest.raises(ArtefactError, match=r"no tensor model\.other"):
        read(tmp_path, {"model.other": torch.zeros(9)})
    with pytest.raises(ArtefactError, match=r"model\.line has shape \[9\] there, expected \[10\]"):
        read(tmp_path, {"model.line": torch.zeros(10)})

    cut = tmp_path / "shard-00001.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4])
    with pytest.raises(ArtefactError, match=r"shard-00001\.safetensors is shorter than its header says"):
        read(tmp_path, {"model.line": torch.zeros(9)})


@pytest.mark.heavy
def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path):
    """Finds a file that is mapped: where it ends before its mapping, the kernel ends the process (SIGBUS)."""
    write_parts(tmp_path, {"model.line": np.zeros(1 << 20, np.float32)}, {"model.line": [[0, 1 << 20]]})
    (file,) = tmp_path.glob("*.safetensors")
    size = file.stat().st_size
    reader = subprocess.Popen([sys.executable, "-c", READER, str(tmp_path)], stdout=subprocess.PIPE)
    assert reader.stdout
    with reader.stdout:
        assert reader.stdout.readline() == b"ready\n"
    while reader.poll() is None:
        os.truncate(file, size // 2)
        os.truncate(file, size)
    assert reader.returncode == 0


SHORT = {"dtype": "F32", "shape": [9], "parts": [[0, 100, 0, 4], [1, 100, 4, 5]]}


@pytest.mark.parametrize(
    ("names", "entry", "reason"),
    [
        (["a.safetensors", "../b.safetensors"], SHORT, r"'\.\./b\.safetensors' is no name"),
        (["a.safetensors", "/etc/passwd"], SHORT, "'/etc/passwd' is no name"),
        (["a.safetensors"], SHORT, r"model\.line has a part of impossible size or place"),
        (["a.safetensors"], SHORT | {"parts": [[-1, 0, 0, 9]]}, "impossible"),
        (["a.safetensors"], SHORT | {"parts": [[0, -8, 0, 9]]}, "impossible"),
        (["a.safetensors"], SHORT | {"parts": [[0, 0, -2, 11]]}, "impossible"),
        (["a.safetensors"], SHORT | {"parts": [[0, 0, 0, 1 << 63]]}, "cannot be read"),
        (["a.safetensors"], SHORT | {"parts": [[0, 0, 0]]}, "cannot be read"),
        (["a.safetensors"], SHORT | {"shape": [float("inf")]}, "cannot be read"),
        (["a.safetensors"], SHORT | {"parts": []}, r"parts of model\.line do not hold every entry once"),
        (["a.safetensors"], SHORT | {"parts": [[0, 0, 0, 4], [0, 0, 5, 4]]}, "do not hold every entry once"),
        (["a.safetensors"], SHORT | {"parts": [[0, 0, 0, 5], [0, 0, 4, 4]]}, "do not hold every entry once"),
    ],
    ids=[
        *("folder above", "another folder", "no such file", "file before the first", "before the file"),
        *("before the tensor", "too large", "too few numbers", "no number", "no parts", "hole", "overlap and hole"),
    ],
)
def test_an_index_that_others_wrote_is_refused(tmp_path: Path, alone, names, entry, reason):
    """Finds an index that reads files elsewhere, ends one rank with an error of numpy, or leaves former values."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(200))
    (tmp_path / INDEX).write_text(json.dumps({"files": names, "tensors": {"model.line": entry}}))
    with pytest.raises(ArtefactError, match=reason):
        read(tmp_path, {"model.line": torch.zeros(9)})


def test_headers_whose_parts_overlap_are_refused(tmp_path: Path):
    """Finds parts that add up to the tensor and leave a hole, where a consolidated file had any memory."""
    numbers = np.zeros(2, dtype=np.float32)
    for number, offset in enumerate((0, 0, 4)):
        places = {PLACES: json.dumps({"model.line": {"saved_offsets": [offset]}})}
        save_file({"model.line": numbers}, tmp_path / f"{number}.safetensors", metadata=places)
    with pytest.raises(ArtefactError, match=r"parts of model\.line overlap and leave holes"):
        stored_tensors(tmp_path)


def test_an_index_has_the_files_that_ranks_wrote(tmp_path: Path):
    """Finds a save that trusts a listing of the folder, which a network file system may show as it was before."""
    temporary, target = tmp_path / ".step_00000001", tmp_path / "step_00000001"
    temporary.mkdir()
    write_parts(temporary, {"model.line": np.arange(9, dtype=np.float32)}, {"model.line": [[0, 4, 9]]})
    digests = {path.name: "of a rank" for path in temporary.iterdir()}
    (temporary / "shard-00009.safetensors").write_bytes(b"listed, but written by no rank")

    publish(Publication(temporary, target, digests, TrainState(step=1), asdict(MODEL), None))
    assert read_contents(target).files == ["shard-00000.safetensors", "shard-00001.safetensors"]


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[Cuts, tuple[slice, ...]]:
    """Cuts of a tensor, and a box of it that may be empty."""
    shape = draw(st.lists(st.integers(1, 12), max_size=3))
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))}) for size in shape]
    ends = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    return cuts, tuple(slice(*pair) for pair in ends)


@settings(deadline=None)
@given(cut_tensors())
def test_the_parts_that_are_needed_are_those_with_entries(cut_tensor: tuple[Cuts, tuple[slice, ...]]):
    """Finds a file that is opened for nothing, and one that is left out."""
    cuts, box = cut_tensor
    shape = tuple(cut[-1] for cut in cuts)
    boxes = boxes_between(cuts)
    parts = [
        StoredPart(Path(f"{number}"), 0, 4, tuple(c.start for c in part), tuple(c.stop - c.start for c in part))
        for number, part in enumerate(boxes)
    ]
    contents = contents_of({"any": StoredTensor("any", "F32", shape, tuple(parts))})

    wanted = np.zeros(shape, bool)
    wanted[box] = True
    expected = {str(number) for number, part in enumerate(boxes) if wanted[part].any()}
    assert needed_parts(contents, {"any": box}).keys() == expected
    assert contents.tensors["any"].fill(box)


@pytest.mark.parametrize(("long_row", "block"), [(1 << 14, 1 << 20), (1, 1), (1 << 14, 50), (30, 50)])
@settings(deadline=None, max_examples=30)
@given(cut_tensor=cut_tensors())
def test_a_box_of_a_part_is_read_whatever_its_rows(
    tmp_path_factory: pytest.TempPathFactory, long_row: int, block: int, cut_tensor
):
    """Finds entries of another row, where rows are read one by one, in blocks, or around what is not wanted."""
    cuts, box = cut_tensor
    part = np.asarray(np.random.default_rng(0).integers(1 << 60, size=[cut[-1] for cut in cuts]))
    path = tmp_path_factory.mktemp("part") / "part"
    path.write_bytes(b"head" + part.tobytes())

    wanted = part[*box, ...]
    target = np.zeros(wanted.shape, part.dtype)
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(checkpoint, "LONG_ROW", long_row)
        patch.setattr(checkpoint, "BLOCK", block)
        read_entries(file, 4, part.shape, box, target)
    assert np.array_equal(target, wanted)


@settings(deadline=None)
@given(cut_tensors(), st.data())
def test_parts_that_miss_or_repeat_an_entry_do_not_fill_a_box(cut_tensor: tuple[Cuts, tuple[slice, ...]], data):
    """Finds a hole or an overlap that the check of corners does not see: it must agree with counting all entries."""
    cuts, box = cut_tensor
    shape = tuple(cut[-1] for cut in cuts)
    parts = [
        tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape)
        for _ in range(data.draw(st.integers(0, 3)))
    ]
    # Mostly real tiles with few changes, because random boxes hardly ever fit.
    tiles = boxes_between(cuts)
    del tiles[: data.draw(st.integers(0, 2))]
    parts += tiles

    covered = np.zeros(shape, dtype=int)
    for part in parts:
        covered[part] += 1
    by_dimension = (len(parts), len(shape))
    offset_PD = np.array([[cut.start for cut in part] for part in parts], dtype=np.int64).reshape(by_dimension)
    end_PD = np.array([[cut.stop for cut in part] for part in parts], dtype=np.int64).reshape(by_dimension)
    zeros_P = np.zeros(len(parts), dtype=np.int64)
    placed = PartsOfTensor("F32", list(shape), zeros_P, zeros_P, offset_PD, end_PD - offset_PD)
    assert placed.fill(box) == (covered[box] == 1).all()
