"""Log-probabilities of rankings under the reference: computed once, before the first step, and saved with the run.

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
from functools import partial
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
from dist_lm.parallel.messages import broadcast
from dist_lm.parallel.sharding import reshard
from dist_lm.rlhf.preference_objective import segment_logprobs
from dist_lm.storage import durable

log = logging.getLogger(__name__)

KEY, SHA256, CHECKPOINT = "key", "sha256", "checkpoint"
PROGRESS_S = 30.0  # seconds between two lines of the log


def reference_of(
    path: Path,
    key: Mapping[str, Any],
    splits: Mapping[str, RankingBatches],
    initial: Callable[[], AbstractContextManager[Transformer]],
    world: World,
    data_ranks: dist.ProcessGroup | None,
    *,
    has_steps: bool,
    scoring: Callable[[float], None],
) -> dict[str, SplitReference]:
    """Returns the reference of each split: from the file if its key is this one, else computed and written
    (collective).

    A file that is damaged or belongs to another key is replaced, with a line in the log. The first rank reads and
    writes the file; the others get its arrays. Returns after the file is on disk.

    Args:
        key: `checkpoint` and all else that the numbers depend on.
        initial: opens the reference model.
        data_ranks: the ranks that read different data; None: all.
        has_steps: whether the run has taken steps. Then the file belongs to the reference that it began with, even if
            the checkpoint at that path has changed since.
        scoring: called after every batch with the share of the rankings that this rank has read, in [0, 1].

    Raises:
        ArtefactError: no ranking of a split fits into a sequence, or a tar is damaged; or of `initial`.
        OSError: the file cannot be read or written; on the first rank alone, while the others wait for it.
        MessageError: another rank has sent something else.
    """
    stored = _stored(path, key, has_steps) if world.is_first else None
    stored = broadcast(stored, dict[str, SplitReference] | None)
    if stored is not None:
        return stored

    if has_steps and world.is_first:
        log.warning("%s is missing or does not fit: computed again from %s", path, key[CHECKPOINT])
    sizes = {name: batches.rankings.corpus.n_documents for name, batches in splits.items()}
    references: dict[str, SplitReference] = {}
    with initial() as model:
        for name, batches in splits.items():
            before = sum(sizes[earlier_name] for earlier_name in references)
            part = partial(_part_done, scoring, before / sum(sizes.values()), sizes[name] / sum(sizes.values()))
            references[name] = split_reference(model, batches, world, data_ranks, part)
        reshard(model)
    if world.is_first:
        _write(path, key, references)
    # No rank may go on before the file is there: a run that ends now must find it again.
    dist.barrier()
    return references


def _part_done(scoring: Callable[[float], None], before: float, part: float, share_of_part: float) -> None:
    scoring(before + part * share_of_part)


def _stored(path: Path, key: Mapping[str, Any], has_steps: bool) -> dict[str, SplitReference] | None:
    """Returns the arrays of a file that is intact and has this key, by split; None if there is no file, or, with a line
    in the log, if it is damaged or has another key.

    Args:
        has_steps: accept a key whose checkpoint alone differs.
    """
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

    # safetensors checks the form of a file, not the bits of its arrays.
    if metadata.get(SHA256) != _hash(arrays):
        log.warning("%s is damaged: its arrays have another hash than it says", path)
        return None
    changed = [name for name in key if saved.get(name) != key[name]]
    if changed and not (has_steps and changed == [CHECKPOINT]):
        log.info("%s belongs to another %s", path, " and ".join(changed))
        return None

    names = sorted({name.partition(".")[0] for name in arrays})
    return {name: SplitReference(arrays[f"{name}.logprob"], arrays[f"{name}.mismatched"]) for name in names}


def _write(path: Path, key: Mapping[str, Any], references: Mapping[str, SplitReference]) -> None:
    arrays = {}
    for name, reference in references.items():
        arrays[f"{name}.logprob"] = reference.logprob
        arrays[f"{name}.mismatched"] = reference.mismatched
    metadata = {KEY: json.dumps(dict(key), sort_keys=True), SHA256: _hash(arrays)}
    durable.write_bytes(path, save(arrays, metadata))
    log.info("wrote %s", path)


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    sha256 = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        sha256.update(f"{name} {array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return sha256.hexdigest()


@torch.no_grad()
def split_reference(
    model: Transformer,
    batches: RankingBatches,
    world: World,
    data_ranks: dist.ProcessGroup | None,
    scoring: Callable[[float], None],
) -> SplitReference:
    """Returns the log-probabilities of all rankings of a split, the same on every rank (collective).

    A ranking that no rank has read has NaN: it is too long, or beyond the batches' limit. The first rank logs its
    progress. Computed without gradients.

    Args:
        model: the reference.
        batches: assembled by `Trees`, which decide whether there are mismatched completions.
        data_ranks: the ranks that read different data; None: all.
        scoring: called after every batch with the share of the split that this rank has read, in [0, 1].

    Raises:
        ArtefactError: no ranking fits into a sequence, or a tar is damaged.
    """
    rankings = batches.rankings
    n_rankings = rankings.corpus.n_documents
    has_mismatches = cast(Trees, batches.assemble).mismatches
    logprob = np.zeros(int(rankings.completions.sum()), np.float32)
    mismatched = np.zeros(n_rankings if has_mismatches else 0, np.float32)
    is_read = np.zeros(n_rankings, np.float32)  # 1 for rankings of this rank's share

    logged_at = time.monotonic()
    for batch_on_host, placed in batches:
        batch = batch_on_host.to(world.device)
        assert isinstance(batch, CompletionBatch)
        logprob_S = segment_logprobs(model, batch).cpu().numpy()
        for ranking in placed:
            logprob[rankings.completion_slice(ranking.document)] = logprob_S[ranking.places]
            is_read[ranking.document] = 1

        if batch.mismatched:
            prompt_C = batch.mismatched.prompt_C
            logprob_C = segment_logprobs(model, batch.mismatched)[: len(prompt_C)].double()
            sum_P = logprob_C.new_zeros(len(placed)).index_add(0, prompt_C, logprob_C)
            mismatched[[ranking.document for ranking in placed]] = sum_P.cpu().numpy()

        # The ranks read about equally many rankings.
        n_share = max(1, n_rankings // batches.dp_size)
        scoring(min(1.0, float(is_read.sum()) / n_share))
        if world.is_first and time.monotonic() - logged_at > PROGRESS_S:
            logged_at = time.monotonic()
            log.info("reference: %d rankings of this rank's share of %d are done", int(is_read.sum()), len(is_read))

    # Each ranking was read by one rank and is 0 on all others, so one sum gives every rank all of them.
    sums = torch.from_numpy(np.concatenate([logprob, mismatched, is_read])).to(world.device)
    dist.all_reduce(sums, group=data_ranks)
    logprob, mismatched, is_read = np.split(sums.cpu().numpy(), np.cumsum([len(logprob), len(mismatched)]))
    logprob[np.repeat(is_read == 0, rankings.completions)] = np.nan
    mismatched[is_read[: len(mismatched)] == 0] = np.nan
    return SplitReference(logprob, mismatched)
