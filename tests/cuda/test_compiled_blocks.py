"""Blocks of `large` under torch.compile on fake CUDA tensors: one graph each way, no break, few recompilations."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dist_lm.data.batch import Batch
from dist_lm.parallel.sharding import RECOMPILATIONS, reshard
from tests.cuda.card import CARD, played, text
from tests.cuda.test_train_step import LAYOUTS, config_of

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(
    ("layout", "mode", "dropout"),
    [
        ("fsdp-8", "none", 0.1),
        ("fsdp-8", "selective", 0.0),
        ("fsdp-8", "full", 0.1),
        ("tp-2", "none", 0.0),
        ("tp-2-sp", "selective", 0.1),
        ("cp-4", "selective", 0.1),
    ],
)
def test_a_block_is_one_graph_for_any_documents(graphs, layout, mode, dropout):
    ranks, overrides = LAYOUTS[layout]
    options = [f"parallel.activation_checkpointing={mode}", f"stage.dropout={dropout}", "parallel.compile=always"]
    with played(config_of(*overrides, *options, layers=2), ranks) as run:
        for documents in (3, 5):
            run.step([text(run.config, documents)])
    assert len(graphs) == 2  # for the first number of documents, then for all numbers


def test_batches_of_any_shape_stay_below_the_limit(graphs):
    """Stage tools: rows of conversations, few counted targets, a last micro-batch of one row, evaluations between."""
    config = config_of("parallel.compile=always", stage="tools", layers=2)
    with played(config, 8) as run:
        for rows, documents, counted in [(4, 9, 640), (3, 5, 1024), (1, 3, 64), (4, 1, 8192), (2, 2, None)]:
            batch = conversations(text(replace_rows(config, rows), documents), counted)
            run.step([batch])
            with torch.no_grad():
                run.trainer.model.token_losses(batch.to(CARD))
            reshard(run.trainer.model)
    assert len(graphs) <= RECOMPILATIONS


def replace_rows(config, rows: int):
    return replace(config, stage=replace(config.stage, micro_batch=rows))


def conversations(batch: Batch, counted: int | None) -> Batch:
    if counted is None:
        return batch
    with unset_fake_temporarily():
        return replace(batch, logit_index_N=torch.arange(counted)).pin_memory()
