"""Stage `preference` on ranks: rankings as trees of completions, the reference, figures on held-out rankings.

Dimensions: B sequences, T tokens, P rankings, K completions of a ranking, C completions, S segments, N pairs.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_lm.config.corpus import SPLITS
from dist_lm.config.preference import KTO
from dist_lm.data.manifest import read_manifest
from dist_lm.data.rankings.completions import CompletionBatch, SplitReference, Trees
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.errors import ArtefactError
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.preference import PreferenceLoss
from dist_lm.rlhf.preference_objective import held_out_metrics, seen_rankings
from dist_lm.rlhf.reference import CHECKPOINT, reference_of
from dist_lm.stages.preference.config import PreferenceRunConfig
from dist_lm.stages.reward.ranks import (
    example_places,
    example_tree,
    open_rankings,
    passes_over,
    ranking_batches,
    ranking_stream,
)
from dist_lm.stages.training.arguments import DataArguments, StageData
from dist_lm.stages.training.stage import sequence_limit
from dist_lm.training import checkpoint_files


def open_data(arguments: DataArguments) -> StageData:
    """Opens the rankings of the stage's corpus, with their log-probabilities under the reference (collective).

    The log-probabilities are computed, or read from the run's file, which is written once.

    Raises:
        ConfigError: a setting that rankings do not allow.
        ArtefactError: the corpus holds no rankings, none fits into a sequence, or the file of the reference is gone.
        OSError: a file cannot be read.
    """
    config = arguments.config
    assert isinstance(config, PreferenceRunConfig)
    settings = config.stage.preference
    train, val = open_rankings(arguments, takes_labels=settings.algorithm == KTO)

    # The trees of the reference itself have no reference yet.
    plain_trees = Trees(None, settings.learns_text, settings.has_reference_point)
    references = {}
    if settings.has_reference:
        references = _references(arguments, config, train, val, plain_trees)
    train_trees = replace(plain_trees, reference=references.get("train"))
    val_reference = references.get("val")

    stream = ranking_stream(arguments, train, settings.lesson, settings.label_noise, train_trees)
    loss = PreferenceLoss(settings)

    def evaluate(model: Transformer, everything: bool, alive: Callable[[], None]) -> dict[str, float]:
        limit = sequence_limit(config, everything)
        batches = ranking_batches(arguments, val, limit, replace(plain_trees, reference=val_reference))
        logprobs, point = seen_rankings(model, batches, arguments.world.device, arguments.data_ranks, alive)
        return held_out_metrics(loss, val, val_reference, logprobs, point, config.seed)

    return StageData(stream, evaluate, passes=passes_over(arguments, stream))


def _references(
    arguments: DataArguments, config: PreferenceRunConfig, train: RankingCorpus, val: RankingCorpus, trees: Trees
) -> dict[str, SplitReference]:
    """Returns the log-probabilities of both splits under the reference by split, computed or read (collective). Those
    that are computed are written to the run's file.

    Raises:
        ArtefactError: the file is missing or belongs to other data, and training has begun; or the checkpoint that
            training starts from is missing.
        ConfigError: as `initial_model`.
    """
    stage, run = config.stage, arguments.run
    key: dict[str, Any] = {
        CHECKPOINT: _start(config),
        "corpus": read_manifest(config.corpus_in(run.work, stage.corpus)).content,
        "seq_len": stage.seq_len,
        "mismatches": trees.mismatches,
    }

    # The file is valid for this reference, corpus and length of sequences; any other would give other numbers.
    splits = dict(zip(SPLITS, (train, val), strict=True))
    return reference_of(
        run.reference,
        key,
        {name: ranking_batches(arguments, rankings, assemble=trees) for name, rankings in splits.items()},
        arguments.initial or partial(_no_model, run.reference),
        arguments.world,
        arguments.data_ranks,
        has_steps=arguments.position > 0,
        scoring=arguments.scoring,
    )


def _start(config: PreferenceRunConfig) -> str:
    """Identifies the reference: the hash of the checkpoint that training starts from, or the seed of a new model.

    Raises:
        ArtefactError: there is no such checkpoint.
    """
    if config.stage.init_from == "none":
        return f"seed {config.seed} {json.dumps(asdict(config.model), sort_keys=True)}"
    return checkpoint_files.fingerprint(checkpoint_files.find_checkpoint(Path(config.stage.init_from)))


def _no_model(path: Path) -> Any:
    raise ArtefactError(f"{path} is missing or belongs to other data: continue the run, which computes it again")


def example_batch(config: PreferenceRunConfig) -> CompletionBatch:
    """Returns a micro-batch (B, T) on the CPU with one ranking per sequence and random tokens, for the dry run."""
    settings, rows = config.stage.preference, config.stage.micro_batch
    tree = example_tree(config)
    branch_BT = tree["branch_BT"]
    k = int(branch_BT.max())  # completions of a ranking

    # Segments are numbered from 1: all completions, then all prompts. 0 is a token that no loss reads.
    row_B1 = torch.arange(rows)[:, None]
    prompt_segment = rows * k + 1 + row_B1 if settings.learns_text else 0
    segment_BT = (branch_BT + k * row_B1).where(branch_BT > 0, prompt_segment)
    batch = CompletionBatch(
        targets_BT=torch.randint(0, config.model.vocab_size, branch_BT.shape),
        loss_mask_BT=(segment_BT > 0).float(),
        segment_BT=segment_BT,
        tokens_S=torch.ones(rows * (k + 1)),
        prompt_C=torch.arange(rows * k) // k,
        reference_C=torch.zeros(rows * k if settings.has_reference else 0),
        ranked=example_places(torch.arange(rows * k).view(rows, k), as_rankings=settings.lesson == "rankings"),
        **tree,
    )
    if settings.has_reference_point:
        batch = replace(batch, mismatched=batch, mismatched_reference_P=torch.zeros(rows))
    return batch
