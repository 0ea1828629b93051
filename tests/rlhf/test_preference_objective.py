"""Stage preference with a model: a tree is K passes, and how a batch is cut changes no loss, metric or gradient."""

from typing import Any

import numpy as np
import pytest
import torch

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.preference import PreferenceConfig
from dist_lm.config.stage import StageConfig
from dist_lm.data.batch import Batch
from dist_lm.data.rankings.completions import SplitReference, Trees
from dist_lm.data.rankings.shards import RankingCorpus
from dist_lm.data.rankings.stream import RankingBatches, RankingStream
from dist_lm.model.size import parameter_shapes
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, adds_sums, build_mesh, data_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.parallel.values import fill
from dist_lm.rlhf.preference import PreferenceLoss
from dist_lm.rlhf.preference_objective import (
    held_out_metrics,
    preference_objective,
    preparation,
    seen_rankings,
    segment_logprobs,
)
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.optimizer import build_optimizer
from dist_lm.training.step import accumulate_gradients, update
from tests.data.rankings.made_rankings import corpus_of, random_rankings
from tests.interop.hf_models import FAMILIES, our_model, small
from tests.parallel.on_a_mesh import logical_arrays
from tests.parallel.ranks import RankGroups
from tests.parallel.training_task import gradients
from tests.rlhf.made_pairs import WIDTH, batch_of, reference_under

NEAR = 1e-5
ALGORITHMS = {
    "dpo": PreferenceConfig(),
    "dpo by pairs": PreferenceConfig(learn_from="pairs"),
    "ipo": PreferenceConfig(algorithm="ipo", beta=0.5),
    "kto": PreferenceConfig(algorithm="kto"),
    "orpo": PreferenceConfig(algorithm="orpo"),
    "simpo": PreferenceConfig(algorithm="simpo"),
}
MODEL = small("GPTNeoX", init_std=0.2)
ROWS = 8  # of a step


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> RankingCorpus:
    return corpus_of(tmp_path_factory.mktemp("rankings"), random_rankings(40, vocabulary=100))


@pytest.fixture(scope="module")
def reference(rankings: RankingCorpus) -> SplitReference:
    model = our_model(MODEL)
    with torch.no_grad():
        assert model.lm_head is not None
        model.lm_head.weight *= 1.1  # surer, so that random tokens are less likely and the KL divergence is above 0
    return reference_under(model, rankings)


# --- a tree is K passes ---

OPTIONS = {
    **{family: small(family, init_std=0.2) for family in FAMILIES},
    "grouped queries": small("Llama", n_heads=4, d_model=48, n_kv_heads=2, init_std=0.2),
    "tied": small("Qwen3", tie_embeddings=True, init_std=0.2),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_log_probabilities_are_those_of_as_many_passes(rankings: RankingCorpus, name: str) -> None:
    model, numbers = our_model(OPTIONS[name]), range(12)
    settings = PreferenceConfig(algorithm="orpo")  # prompts have targets too
    with torch.no_grad():
        batch = batch_of(rankings, numbers, settings)
        found = segment_logprobs(model, batch).tolist()
        alone, prompts = [], []
        for number in numbers:
            tokens, branch = rankings.tokens(number), rankings.arrays(number).branch
            n = int((branch == 0).sum())
            for k in range(1, int(branch.max()) + 1):
                one = torch.from_numpy(tokens[(branch == 0) | (branch == k)].astype(np.int64))[None]
                logprob_T = model(one[:, :-1]).log_softmax(-1).gather(-1, one[:, 1:, None])[0, :, 0]
                alone.append(float(logprob_T[n - 1 :].sum()))
            prompts.append(float(logprob_T[: n - 1].sum()))
    assert found == pytest.approx([*alone, *prompts], rel=NEAR, abs=NEAR)


def test_chunks_of_logits_change_nothing(rankings: RankingCorpus) -> None:
    model, batch = our_model(MODEL), batch_of(rankings, range(12), PreferenceConfig())
    with torch.no_grad():
        whole = segment_logprobs(model, batch)
        model.chunk_bytes = 1000
        torch.testing.assert_close(segment_logprobs(model, batch), whole)


# --- how a batch is cut ---


def one_step(
    world: World,
    directory: str,
    reference: tuple[np.ndarray, np.ndarray],
    name: str,
    micro_batch: int,
    parallel: ParallelConfig,
) -> dict[str, Any]:
    """Loss, metrics, gradients and held-out figures of a step (collective)."""
    from pathlib import Path

    settings, rankings = ALGORITHMS[name], RankingCorpus.open(Path(directory), "train")
    mesh = build_mesh(resolve_layout(parallel, MODEL, world.size), world.device)
    data, known = data_mesh(mesh), SplitReference(*reference) if ALGORITHMS[name].has_reference else None
    model = build_model(MODEL, parallel, mesh, world.device, seed=0)
    weights = our_model(MODEL).state_dict()
    fill(model, MODEL, lambda name, shape: weights[name])
    optimizer = build_optimizer(model, StageConfig(name="preference", lr=1e-3))
    kept: dict[str, torch.Tensor] = {}
    optimizer.register_step_pre_hook(lambda *_: kept.update(gradients(model)))
    loss = PreferenceLoss(settings)
    trees = Trees(known, settings.learns_text, settings.has_reference_point)
    cut = {"dp_rank": data.get_local_rank(), "dp_size": data.size(), "seq_len": WIDTH, "pad_id": 0}
    with RankingStream(
        rankings, settings.lesson, 0.0, seed=0, global_batch=ROWS, micro_batch=micro_batch, assemble=trees, **cut
    ) as stream:
        batches: list[Batch] = next(stream).micro_batches
        prepare = preparation(loss)
        if prepare:
            batches = list(prepare(model, batches))
        sums = accumulate_gradients(model, preference_objective(loss), batches)
    result = update(model, optimizer, sums, grad_clip=1e9, adds_sums=adds_sums(mesh), stop=StopRequest())
    held_out = RankingBatches(rankings=rankings, micro_batch=micro_batch, assemble=trees, **cut)
    seen, point = seen_rankings(model, held_out, world.device, data.get_group())
    return {
        "numbers": {"loss": result.loss, "count": result.count, "norm": result.grad_norm} | result.metrics,
        "gradients": logical_arrays(kept, parameter_shapes(MODEL)),
        "held out": held_out_metrics(loss, rankings, known, seen, point, seed=0),
    }


CUTS = [(1, 4, ParallelConfig()), (1, 2, ParallelConfig()), (2, 4, ParallelConfig()), (2, 2, ParallelConfig())]
MORE_CUTS = [(2, 4, ParallelConfig(tp=2)), (2, 4, ParallelConfig(cp=2))]


@pytest.mark.heavy
@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_cut_changes_a_loss_a_metric_or_a_gradient(
    ranks: RankGroups, rankings: RankingCorpus, reference: SplitReference, name: str
) -> None:
    arguments = (str(rankings.corpus.directory), (reference.logprob, reference.mismatched), name)
    expected = ranks.run(1, one_step, *arguments, ROWS, ParallelConfig())
    assert expected["numbers"]["norm"] > 0.01
    if name == "kto":
        assert expected["numbers"]["train/kl"] > 0.1
    for size, micro_batch, parallel in [*CUTS, *(MORE_CUTS if name in ("dpo", "kto") else [])]:
        found = ranks.run(size, one_step, *arguments, micro_batch, parallel)
        for part in ("numbers", "held out"):
            assert found[part] == pytest.approx(expected[part], rel=NEAR, abs=NEAR), (size, micro_batch, part)
        for key, gradient in expected["gradients"].items():
            np.testing.assert_allclose(found["gradients"][key], gradient, rtol=NEAR, atol=NEAR, err_msg=key)
