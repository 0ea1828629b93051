"""The peer of `bench tp` computes what our model computes, and the benchmark runs."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from typer.testing import CliRunner

from dist_lm.__main__ import app
from dist_lm.bench import tp
from dist_lm.bench.case import configurations
from dist_lm.bench.rank import made_up_batch
from dist_lm.config.model import ModelConfig
from dist_lm.model.keyed_random import initialise
from dist_lm.model.size import parameter_count
from dist_lm.model.transformer import Transformer

TINY = [
    "model=nano",
    "model.tie_embeddings=false",
    "model.qk_norm=false",
    "model.d_model=32",
    "model.n_layers=2",
    "model.d_ff=48",
    "model.vocab_size=512",
]
WORKLOAD = ["stage.global_batch=2", "stage.seq_len=16"]


def tiny(*overrides: str):
    return configurations((), [*TINY, *WORKLOAD, *overrides], quick=True)[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.n_heads=4"],
        ["model.n_heads=4", "model.n_kv_heads=2", "model.ffn=swiglu", "model.norm=rmsnorm", "model.bias=false"],
    ],
    ids=["neox", "llama"],
)
def test_it_has_the_weights_and_the_losses_of_our_model(overrides):
    config = tiny(*overrides)
    ours, theirs = Transformer(config.model), tp.PeerTransformer(config.model)
    initialise(ours, config.seed)
    tp.fill(theirs, config.seed)
    assert sum(p.numel() for p in theirs.parameters()) == parameter_count(config.model)
    batch = made_up_batch(config, slice(None), torch.device("cpu"))
    logits_BTV = theirs(batch)
    losses_BT = F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
    own_BT = ours.token_losses(batch)
    torch.testing.assert_close(losses_BT.view_as(own_BT), own_BT, rtol=1e-5, atol=1e-6)


def test_a_model_that_torch_cannot_cut_has_no_peer_and_says_why():
    model = ModelConfig("odd", d_model=50, n_layers=1, n_heads=25, d_ff=33, max_seq_len=8, vocab_size=64)
    assert tp.misfit(model, 2) == "n_heads=25, d_ff=33: not divisible by tp=2"
    even = replace(model, d_model=48, n_heads=4, d_ff=32)
    assert tp.misfit(even, 2) == ""
    assert tp.misfit(replace(even, tie_embeddings=True), 2) == "the peer has no tied embedding"
    assert tp.misfit(replace(even, qk_norm=True), 2) == "the peer has no norm of queries and keys"
    assert tp.misfit(replace(even, parallel_residual=True), 2) == "the peer has no parallel residual"
    (comparison,) = tp.cases([*TINY, *WORKLOAD, "model.d_model=50", "model.n_heads=25"], quick=True)[0].comparisons
    assert comparison.peer is None
    assert "n_heads=25" in comparison.peer_name


@pytest.mark.bars
@pytest.mark.skipif(torch.cuda.is_available(), reason="the workload is one for CPU ranks")
def test_the_verb_runs_it(tmp_path):
    file = tmp_path / "tp.jsonl"
    arguments = ["bench", "tp", *TINY, *WORKLOAD, "model.n_heads=4", "--quick", "--json", str(file)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    (line,) = [json.loads(text) for text in file.read_text().splitlines()]
    assert (line["bench"], line["peer"], line["rounds"]) == ("tp", tp.TORCH, 3)
    assert line["ratio"] == line["value"] / line["peer_value"]
    assert "ratio" in done.output
