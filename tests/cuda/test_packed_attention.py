"""Attention of packed documents at the heads of `large`: the compiler takes the call of the flash kernel."""

import pytest
import torch

from dist_lm.model.attention import Visibility, attend

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("key_heads", [25, 5], ids=["heads", "groups"])
def test_a_compiled_call_has_no_graph_break(key_heads):
    def heads(count: int) -> torch.Tensor:
        return torch.zeros(2, 4096, count, 64, dtype=torch.bfloat16, device=CUDA)

    seen = Visibility(boundary=torch.zeros(9, dtype=torch.int32, device=CUDA))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    output = compiled(heads(25), heads(key_heads), heads(key_heads), seen)
    assert (output.shape, output.device) == ((2, 4096, 25, 64), CUDA)
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes].count(torch.ops.torch_attn._varlen_attn) == 1
