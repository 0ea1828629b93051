"""Attention of packed documents at the heads of `large`: the flash kernel and the compiler accept its call."""

from functools import partial

import pytest
import torch

from dist_lm.model.attention import Visibility, attend
from tests.cuda.flash_contract import checked_varlen_attn

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda", 0)


def inputs(key_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Visibility]:
    q, k, v = (
        torch.zeros(2, 4096, heads, 64, dtype=torch.bfloat16, device=CUDA) for heads in (25, key_heads, key_heads)
    )
    return q, k, v, Visibility(boundary=torch.zeros(9, dtype=torch.int32, device=CUDA))


@pytest.mark.parametrize("kernel", ["FA2", "FA3"])
@pytest.mark.parametrize("key_heads", [25, 5], ids=["heads", "groups"])
def test_the_kernel_accepts_the_call(monkeypatch, key_heads, kernel):
    checked = partial(checked_varlen_attn, kernel=kernel)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", checked)
    assert attend(*inputs(key_heads)).shape == (2, 4096, 25, 64)


@pytest.mark.parametrize("key_heads", [25, 5], ids=["heads", "groups"])
def test_a_compiled_call_has_no_graph_break(key_heads):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    output = compiled(*inputs(key_heads))
    assert (output.shape, output.device) == ((2, 4096, 25, 64), CUDA)
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes].count(torch.ops.torch_attn._varlen_attn) == 1
