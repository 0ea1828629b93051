"""Loaders of other libraries for `dist-lm bench loader`, each with a corpus in its own format on local disk.

A sample has seq_len + 1 tokens as uint16, the next one begins where it ends, and documents play no part. Every library
shuffles as it does by default, or as its manual shows, and reads in this process without workers. Of a batch it fills
the inputs and the targets; loss mask, documents, positions and numbers of sequences are ours alone.

Dimensions: B sequences, T tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH = 8  # samples
SHARD_BYTES = 2**26  # the default of mosaicml-streaming, and of `litdata.optimize(chunk_bytes="64MB")`
# Reading a record of ArrayRecord takes longer the more its file has: four times as long with 62,000 as with 4,000.
RECORDS_OF_A_FILE = 4096
# The values that webdataset's README shows: it has no default.
SHUFFLED_TARS, SHUFFLED_SAMPLES = 100, 1000

Samples = np.ndarray  # (samples, seq_len + 1), uint16


@dataclass(frozen=True)
class Peer:
    """How one library writes samples, reads them again, and where the tokens of a sample are."""

    modules: tuple[str, ...]  # what it imports; they say whether it is installed
    write: Callable[[Path, Samples], None]  # into a folder that does not exist yet
    dataset: Callable[[Path, int], Iterable[Any]]  # (folder, tokens of a sample); each iteration is an epoch
    tokens: Callable[[Any], np.ndarray]  # of one sample


def why_not(name: str) -> str | None:
    """Returns why a peer cannot run, with the command that installs it; None if it can. No package is imported."""
    if all(find_spec(module) for module in PEERS[name].modules):
        return None
    return f"not installed: pip install {name}"


def samples_of(tokens: np.ndarray, seq_len: int) -> Samples:
    """Cuts tokens (n,) into samples, (n // (seq_len + 1), seq_len + 1); the last tokens are left out."""
    n_samples = len(tokens) // (seq_len + 1)
    return tokens[: n_samples * (seq_len + 1)].reshape(n_samples, seq_len + 1)


def rows_of(name: str, directory: Path, samples: Samples) -> Callable[[], Iterator[np.ndarray]]:
    """Writes samples in the format of a peer.

    Args:
        name: one of PEERS.
        directory: a folder that does not exist yet.

    Returns:
        A function whose every call yields the tokens of an epoch's samples, (seq_len + 1,) as uint16, shuffled.

    Raises:
        ImportError: the peer, or a package that it imports, is not installed.
        OSError: a file cannot be written or read.
    """
    peer = PEERS[name]
    peer.write(directory, samples)
    dataset = peer.dataset(directory, samples.shape[1])
    return lambda: map(peer.tokens, dataset)


def batches_of(rows: Iterator[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields inputs and targets of BATCH rows, both (B, T) as int64, computed as those of the random crop are."""
    while batch := list(islice(rows, BATCH)):
        tokens = np.stack(batch).astype(np.int64)
        inputs_BT = torch.from_numpy(np.ascontiguousarray(tokens[:, :-1]))
        targets_BT = torch.from_numpy(np.ascontiguousarray(tokens[:, 1:]))
        yield inputs_BT, targets_BT


def epochs(epoch: Callable[[], Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """Yields the rows of one epoch after the other, without end."""
    while True:
        yield from epoch()


# --- the libraries ---


def _write_webdataset(directory: Path, samples: Samples) -> None:
    directory.mkdir()
    with import_module("webdataset").ShardWriter(str(directory / "%06d.tar"), verbose=0) as writer:
        for number, row in enumerate(samples):
            writer.write({"__key__": f"{number:08d}", "tokens": row.tobytes()})


def _webdataset(directory: Path, n_tokens: int) -> Iterable[Any]:
    tars = [str(path) for path in sorted(directory.glob("*.tar"))]
    dataset = import_module("webdataset").WebDataset(tars, shardshuffle=SHUFFLED_TARS)
    return dataset.shuffle(SHUFFLED_SAMPLES)


def _write_streaming(directory: Path, samples: Samples) -> None:
    columns = {"tokens": f"ndarray:uint16:{samples.shape[1]}"}
    with import_module("streaming").MDSWriter(out=str(directory), columns=columns) as writer:
        for row in samples:
            writer.write({"tokens": row})


def _streaming(directory: Path, n_tokens: int) -> Iterable[Any]:
    # It deals out samples to ranks by batches, so it must know their size, though it yields single samples.
    return import_module("streaming").StreamingDataset(local=str(directory), shuffle=True, batch_size=BATCH)


def _write_litdata(directory: Path, samples: Samples) -> None:
    directory.mkdir()
    litdata = import_module("litdata")

    # Its `optimize` starts processes that write through this class. Chunks hold whole samples, for each loses the rest.
    n_bytes = 2 * samples.shape[1]
    cache = import_module("litdata.streaming").Cache(
        str(directory),
        chunk_bytes=SHARD_BYTES // n_bytes * n_bytes,
        item_loader=litdata.TokensLoader(samples.shape[1]),
    )
    for number, row in enumerate(samples):
        cache[number] = row
    cache.done()
    cache.merge()


def _litdata(directory: Path, n_tokens: int) -> Iterable[Any]:
    litdata = import_module("litdata")
    return litdata.StreamingDataset(str(directory), item_loader=litdata.TokensLoader(n_tokens), shuffle=True)


def _write_grain(directory: Path, samples: Samples) -> None:
    directory.mkdir()
    module = import_module("array_record.python.array_record_module")
    for first in range(0, len(samples), RECORDS_OF_A_FILE):
        # A group of one record is what grain's manual asks for: it reads records at random places.
        writer = module.ArrayRecordWriter(str(directory / f"{first:08d}.array_record"), "group_size:1")
        for row in samples[first : first + RECORDS_OF_A_FILE]:
            writer.write(row.tobytes())
        writer.close()


def _grain(directory: Path, n_tokens: int) -> Iterable[Any]:
    grain = import_module("grain")
    files = [str(path) for path in sorted(directory.glob("*.array_record"))]
    source = grain.sources.ArrayRecordDataSource(files)
    # Its default of 16 threads takes several times the CPU time, and would read ahead while other variants are timed.
    in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return grain.MapDataset.source(source).shuffle(seed=0).to_iter_dataset(in_this_thread)


def _from_bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint16)


PEERS = {
    "webdataset": Peer(
        modules=("webdataset",),
        write=_write_webdataset,
        dataset=_webdataset,
        tokens=lambda sample: _from_bytes(sample["tokens"]),
    ),
    "mosaicml-streaming": Peer(
        modules=("streaming",),
        write=_write_streaming,
        dataset=_streaming,
        tokens=lambda sample: sample["tokens"],
    ),
    "litdata": Peer(
        modules=("litdata",),
        write=_write_litdata,
        dataset=_litdata,
        tokens=np.asarray,
    ),
    "grain": Peer(
        modules=("grain", "array_record"),
        write=_write_grain,
        dataset=_grain,
        tokens=_from_bytes,
    ),
}
"""Name, as pip knows it -> the peer."""
