"""What `dist-lm bench learn` measures on: held-out sequences, the same for all learners.

Recipes with other tokenizers (another `work_dir` with the same documents) are measured on the whole of val, because
bits per byte compares them only on the same text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dist_lm.config.root import Config
from dist_lm.data.evaluation_batches import EvaluationBatches
from dist_lm.data.manifest import read_manifest
from dist_lm.data.token_corpus import TokenCorpus
from dist_lm.errors import ConfigError
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.training.objective import loss_metrics, summed_losses

if TYPE_CHECKING:
    from dist_lm.bench.learn import Learner, Recipe


@dataclass(frozen=True)
class HeldOut:
    """The held-out sequences, the same for all learners."""

    batches: EvaluationBatches
    device: torch.device

    def measure(self, learner: "Learner") -> dict[str, float]:
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


def held_out(config: Config, device: torch.device) -> HeldOut:
    """`stage.eval_sequences` sequences of val of `stage.corpus`."""
    stage = config.stage
    batches = EvaluationBatches(
        corpus=corpus_of(config, "val"),
        seq_len=stage.seq_len,
        micro_batch=stage.micro_batch,
        dp_rank=0,
        dp_size=1,
        limit_sequences=stage.eval_sequences,
        document_mask=stage.document_mask,
        reset_positions=stage.reset_positions,
    )
    return HeldOut(batches, device)


def held_out_of(recipes: Sequence["Recipe"], device: torch.device) -> dict[str, HeldOut]:
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


def _require_vocabulary(recipe: "Recipe") -> None:
    config = recipe.config
    folder = WorkDirectory(Path(config.work_dir)).corpus(config.stage.corpus)
    found = read_manifest(folder).recipe.vocab_size
    if found != config.model.vocab_size:
        raise ConfigError(
            f"{recipe.name}: model.vocab_size={config.model.vocab_size}: {folder} has {found} pieces: expected "
            f"model.vocab_size={found}"
        )


def corpus_of(config: Config, split: str) -> TokenCorpus:
    """A split of `stage.corpus` in the work directory of a recipe."""
    return TokenCorpus.open(WorkDirectory(Path(config.work_dir)).corpus(config.stage.corpus), split)
