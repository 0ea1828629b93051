"""Log-probabilities of rankings under the reference: computed once, before the first step, and kept with the run.

The reference is the model that training starts from, so it need not be held beside the policy. The file
`reference.safetensors` holds `SPLIT.logprob` and `SPLIT.mismatched` (`SplitReference`). Its metadata have a key, which
names the checkpoint and the content of the corpus that the arrays belong to, and a hash of the arrays.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dist_lm.data.rankings.completions import CompletionBatch, SplitReference, Trees
from dist_lm.data.rankings.stream import RankingBatches
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.parallel.sharding import reshard
from dist_lm.rlhf.preference_objective import segment_logprobs
from dist_lm.storage import durable

log = logging.getLogger(__name__)

KEY, SHA256, CHECKPOINT = "key", "sha256", "checkpoint"
PROGRESS_S = 30.0  # between two lines of the log


def reference_of(
    path: Path,
    key: Mapping[str, Any],
    splits: Mapping[str, RankingBatches],
    initial: Callable[[], AbstractContextManager[Transformer]],
    world: World,
    group: dist.ProcessGroup | None,
    *,
    begun: bool,
    alive: Callable[[], None],
) -> dict[str, SplitReference]:
    """The reference of each split: from the file if its key is this one, else computed and written (collective).

    Args:
        key: `checkpoint` and whatever else the numbers depend on.
        initial: the reference.
        group: the ranks that read different data.
        begun: whether the run has taken steps. Then the file belongs to the reference that it began with, even if the
            checkpoint at that place has changed since.
        alive: called after every batch.
    """
    found: list[dict[str, SplitReference] | None] = [None]
    if world.is_first:
        found[0] = _stored(path, key, begun)
    dist.broadcast_object_list(found, 0, device=world.device)
    if found[0] is not None:
        return found[0]
    if begun and world.is_first:
        log.warning("%s is missing or does not fit: computed again from %s", path, key[CHECKPOINT])
    with initial() as model:
        made = {name: split_reference(model, batches, world, group, alive) for name, batches in splits.items()}
        reshard(model)
    if world.is_first:
        _write(path, key, made)
    dist.barrier()
    return made


def _stored(path: Path, key: Mapping[str, Any], begun: bool) -> dict[str, SplitReference] | None:
    """The arrays of a file that is whole and has this key; None without one."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not iterable itself
        saved = json.loads(metadata[KEY])
    except (SafetensorError, KeyError, ValueError) as error:
        log.warning("%s is damaged (%s)", path, error)
        return None
    if metadata.get(SHA256) != _hash(arrays):
        log.warning("%s is damaged: its arrays have another hash than it says", path)
        return None
    changed = [name for name in key if saved.get(name) != key[name]]
    if changed and not (begun and changed == [CHECKPOINT]):
        log.info("%s belongs to another %s", path, " and ".join(changed))
        return None
    names = sorted({name.partition(".")[0] for name in arrays})
    return {name: SplitReference(arrays[f"{name}.logprob"], arrays[f"{name}.mismatched"]) for name in names}


def _write(path: Path, key: Mapping[str, Any], made: Mapping[str, SplitReference]) -> None:
    arrays = {f"{name}.{part}": getattr(one, part) for name, one in made.items() for part in ("logprob", "mismatched")}
    metadata = {KEY: json.dumps(dict(key), sort_keys=True), SHA256: _hash(arrays)}
    durable.write_bytes(path, save(arrays, metadata))
    log.info("wrote %s", path)


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


@torch.no_grad()
def split_reference(
    model: Transformer,
    batches: RankingBatches,
    world: World,
    group: dist.ProcessGroup | None,
    alive: Callable[[], None],
) -> SplitReference:
    """Log-probabilities of all rankings of a split, the same on every rank (collective).

    Args:
        model: the reference.
        batches: made by `Trees`, which decide whether there are mismatched completions.
        group: the ranks that read different data; None: all.
        alive: called after every batch.
    """
    rankings, asks = batches.rankings, cast(Trees, batches.assemble).mismatches
    logprob = np.zeros(int(rankings.completions.sum()), np.float32)
    others = np.zeros(rankings.corpus.n_documents if asks else 0, np.float32)
    seen = np.zeros(rankings.corpus.n_documents, np.float32)
    told = time.monotonic()
    for made, placed in batches:
        batch = made.to(world.device)
        assert isinstance(batch, CompletionBatch)
        own_S = segment_logprobs(model, batch).cpu().numpy()
        for one in placed:
            logprob[rankings.places(one.document)], seen[one.document] = own_S[one.places], 1
        if batch.mismatched:
            prompt_C = batch.mismatched.prompt_C
            values_C = segment_logprobs(model, batch.mismatched)[: len(prompt_C)].double()
            sums_P = values_C.new_zeros(len(placed)).index_add(0, prompt_C, values_C)
            others[[one.document for one in placed]] = sums_P.cpu().numpy()
        alive()
        if world.is_first and time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            log.info("reference: %d rankings of this rank's share of %d are done", int(seen.sum()), len(seen))
    whole = torch.from_numpy(np.concatenate([logprob, others, seen])).to(world.device)
    dist.all_reduce(whole, group=group)
    logprob, others, seen = np.split(whole.cpu().numpy(), np.cumsum([len(logprob), len(others)]))
    logprob[np.repeat(seen == 0, rankings.completions)] = np.nan
    others[seen[: len(others)] == 0] = np.nan
    return SplitReference(logprob, others)
