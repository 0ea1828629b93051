"""What `dist-lm bench learn` measures on: held-out sequences, the same for all learners.

Recipes with other tokenizers (another `work_dir` with the same documents) are measured on the whole of val, because
bits per byte compares them only on the same text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dist_lm.bench.learn_recipes import Learner, Recipe
from dist_lm.config.root import Config
from dist_lm.data.evaluation_batches import EvaluationBatches
from dist_lm.data.manifest import read_manifest
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ConfigError
from dist_lm.parallel.mesh import World
from dist_lm.stages.stage import run_of
from dist_lm.stages.text import held_out_batches
from dist_lm.stages.training.stage import Opening
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.training.objective import loss_metrics, summed_losses


@dataclass(frozen=True)
class HeldOut:
    """The held-out sequences, the same for all learners."""

    batches: EvaluationBatches
    device: torch.device

    def measure(self, learner: Learner) -> dict[str, float]:
        """Loss (nats a token) and bits per byte, as the metrics of `loss_metrics`."""
        languages = self.batches.corpus.languages
        sums = summed_losses(learner, self.batches, len(languages), self.device, None)  # pyright: ignore[reportArgumentType]
        return loss_metrics(sums.tolist(), languages, self.batches.bytes_by_language)

    @property
    def bytes_per_token(self) -> dict[str, float]:
        """UTF-8 bytes a token of the whole of val, by language; the end-of-text of each document counts."""
        corpus = self.batches.corpus
        return {
            language: float(corpus.n_bytes[chosen].sum() / corpus.lengths[chosen].sum())
            for number, language in enumerate(corpus.languages)
            if (chosen := corpus.language_codes == number).any()
        }


def opening_of(config: Config, device: torch.device) -> Opening:
    """With what a stage opens its data, for a process alone."""
    group, tokenizer = dist.group.WORLD, WorkDirectory(Path(config.work_dir)).tokenizer_model
    assert group is not None
    return Opening(
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
    """`stage.eval_sequences` sequences of val of `stage.corpus`."""
    return HeldOut(
        held_out_batches(opening_of(config, device), corpus_of(config, config.stage.corpus, "val"), False), device
    )


def held_out_of(recipes: Sequence[Recipe], device: torch.device) -> dict[str, HeldOut]:
    """What the recipe of each name is measured on: settings of the first recipe, tokens of its own work directory.

    Raises:
        ConfigError: other tokenizers, but not the whole of val or not the same documents; or another vocabulary.
    """
    first = recipes[0].config
    of_folder = {
        folder: held_out(replace(first, work_dir=folder), device)
        for folder in dict.fromkeys(one.config.work_dir for one in recipes)
    }
    for one in recipes:
        _require_vocabulary(one)
        if one.config.work_dir == first.work_dir:
            continue
        if first.stage.eval_sequences:
            raise ConfigError(
                f"{one.name}: work_dir={one.config.work_dir} has other tokens, and "
                f"stage.eval_sequences={first.stage.eval_sequences} of them are not the same text: expected "
                "stage.eval_sequences=0, the whole of val"
            )
        texts = [of_folder[folder].batches.corpus.n_bytes for folder in (first.work_dir, one.config.work_dir)]
        if not np.array_equal(texts[0], texts[1]):
            raise ConfigError(
                f"{one.name}: val of work_dir={one.config.work_dir} has {len(texts[1])} documents of "
                f"{texts[1].sum()} bytes, that of {first.work_dir} {len(texts[0])} of {texts[0].sum()}: expected the "
                "same documents; build both with the same corpus and seed"
            )
    return {one.name: of_folder[one.config.work_dir] for one in recipes}


def _require_vocabulary(recipe: Recipe) -> None:
    config = recipe.config
    for corpus in config.stage.streams:
        folder = WorkDirectory(Path(config.work_dir)).corpus(corpus)
        found = read_manifest(folder).recipe.vocab_size
        if found != config.model.vocab_size:
            raise ConfigError(
                f"{recipe.name}: model.vocab_size={config.model.vocab_size}: {folder} has {found} pieces: expected "
                f"model.vocab_size={found}"
            )


def corpus_of(config: Config, name: str, split: str) -> TokenCorpus:
    """A split of a corpus in the work directory of a recipe."""
    return TokenCorpus.open(WorkDirectory(Path(config.work_dir)).corpus(name), split)
