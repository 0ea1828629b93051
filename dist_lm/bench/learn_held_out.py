"""Held-out sequences on which `dist-lm bench learn` measures, the same for all learners.

Recipes with other tokenizers (another `work_dir` with the same documents) are measured on the whole of val, because
bits per byte compares them only on the same text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dist_lm.bench.learner import Learner, Recipe
from dist_lm.config.root import Config
from dist_lm.data.evaluation_batches import EvaluationBatches
from dist_lm.data.manifest import read_manifest
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ConfigError
from dist_lm.parallel.mesh import World
from dist_lm.stages.stage import run_of
from dist_lm.stages.text import held_out_batches
from dist_lm.stages.training.arguments import DataArguments
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training.objective import loss_metrics, summed_losses


@dataclass(frozen=True)
class HeldOut:
    """The held-out sequences, the same for all learners."""

    batches: EvaluationBatches
    device: torch.device

    def measure(self, learner: Learner) -> dict[str, float]:
        """Returns loss (nats a token) and bits per byte, under the names of `loss_metrics`."""
        languages = self.batches.corpus.languages
        sums = summed_losses(learner, self.batches, len(languages), self.device, None)  # pyright: ignore[reportArgumentType]
        return loss_metrics(sums.tolist(), languages, self.batches.bytes_by_language)

    @property
    def bytes_per_token(self) -> dict[str, float]:
        """UTF-8 bytes a token over the whole of val, by language; the end-of-text of each document counts."""
        corpus = self.batches.corpus
        return {
            language: float(corpus.n_bytes[chosen].sum() / corpus.lengths[chosen].sum())
            for number, language in enumerate(corpus.languages)
            if (chosen := corpus.language_codes == number).any()
        }


def arguments_of(config: Config, device: torch.device) -> DataArguments:
    """Returns the arguments with which a stage opens its data, from its beginning, for a single process, which must be
    a process group (`learn.alone`).

    Raises:
        ArtefactError: the tokenizer is missing or damaged.
        UserError: the package `tokenizers` is needed and not installed.
    """
    group, tokenizer = dist.group.WORLD, WorkDirectory(Path(config.work_dir)).tokenizer_model
    assert group is not None
    return DataArguments(
        config,
        run_of(config),
        World(0, 1, 0, device),
        Tokenizer.load(tokenizer),
        data_ranks=group,
        dp_rank=0,
        dp_size=1,
        position=0,
    )


def held_out(config: Config, device: torch.device) -> HeldOut:
    """Opens `stage.eval_sequences` sequences of val of `stage.corpus`.

    Raises:
        ArtefactError: the work directory lacks the corpus or the tokenizer, or one is damaged.
    """
    corpus = corpus_of(config, config.stage.corpus, "val")
    return HeldOut(held_out_batches(arguments_of(config, device), corpus, False), device)


def held_out_of(recipes: Sequence[Recipe], device: torch.device) -> dict[str, HeldOut]:
    """Returns the held-out sequences of each recipe, by name: settings of the first recipe, tokens of its own work
    directory.

    Raises:
        ConfigError: recipes have different tokenizers, but not the whole of val or not the same documents; or a model
            has another vocabulary than its corpus.
        ArtefactError: a work directory lacks a corpus or the tokenizer, or one is damaged.
    """
    first = recipes[0].config
    by_work_dir = {
        work_dir: held_out(replace(first, work_dir=work_dir), device)
        for work_dir in dict.fromkeys(recipe.config.work_dir for recipe in recipes)
    }

    for recipe in recipes:
        _require_vocabulary(recipe)
        work_dir = recipe.config.work_dir
        if work_dir == first.work_dir:
            continue

        # Bits per byte of two tokenizers compare only on the same text, hence on the whole of val.
        if first.stage.eval_sequences:
            raise ConfigError(
                f"{recipe.name}: work_dir={work_dir} has other tokens, and "
                f"stage.eval_sequences={first.stage.eval_sequences} of them are not the same text: expected "
                "stage.eval_sequences=0, the whole of val"
            )
        first_bytes, bytes_here = (by_work_dir[name].batches.corpus.n_bytes for name in (first.work_dir, work_dir))
        if not np.array_equal(first_bytes, bytes_here):
            raise ConfigError(
                f"{recipe.name}: val of work_dir={work_dir} has {len(bytes_here)} documents of "
                f"{bytes_here.sum()} bytes, that of {first.work_dir} {len(first_bytes)} of {first_bytes.sum()}: "
                "expected the same documents; build both with the same corpus and seed"
            )

    return {recipe.name: by_work_dir[recipe.config.work_dir] for recipe in recipes}


def _require_vocabulary(recipe: Recipe) -> None:
    """Refuses a model with another vocabulary than its corpora.

    Raises:
        ConfigError: names the recipe and the corpus.
        ArtefactError: a corpus is missing, or its manifest is damaged.
    """
    config = recipe.config
    for corpus in config.stage.corpus_names:
        folder = WorkDirectory(Path(config.work_dir)).corpus(corpus)
        num_pieces = read_manifest(folder).recipe.vocab_size
        if num_pieces != config.model.vocab_size:
            raise ConfigError(
                f"{recipe.name}: model.vocab_size={config.model.vocab_size}: {folder} has {num_pieces} pieces: "
                f"expected model.vocab_size={num_pieces}"
            )


def corpus_of(config: Config, name: str, split: str) -> TokenCorpus:
    """Opens a split of a corpus in the work directory of a recipe.

    Raises:
        ArtefactError: the corpus or the split is missing, empty or damaged.
    """
    return TokenCorpus.open(WorkDirectory(Path(config.work_dir)).corpus(name), split)
