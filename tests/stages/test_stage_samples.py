"""Samples at the end of a stage: nothing is gathered for none."""

from pathlib import Path

import torch

from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.stages.sampling import sample_prompts
from dist_lm.stages.training.arguments import EvaluationArguments
from dist_lm.storage.run_directory import RunDirectory
from dist_lm.tokenizer.tokenizer import Tokenizer


def test_without_samples_no_rank_makes_a_whole_copy_of_the_model(tiny_work, tmp_path: Path) -> None:
    def whole_copy() -> Transformer:
        raise AssertionError("nobody asked for a sample")

    arguments = EvaluationArguments(
        config=compose_config(["stage=code", "stage.sampling.samples_per_prompt=0"]),
        run=RunDirectory(tmp_path),
        world=World(0, 1, 0, torch.device("cpu")),
        tokenizer=Tokenizer.load(tiny_work.tokenizer_model),
        model=whole_copy,
        step=1,
    )
    assert sample_prompts(arguments) == []
