"""Attention against its definition, and the choice of kernel.

Dimensions: B sequences, T tokens, H query heads, G key/value heads, K d_head.
"""

import pytest
import torch

from dist_lm.data.batch import document_boundaries
from dist_lm.model import attention
from dist_lm.model.attention import CAUSAL, attend, within_documents, within_window
from dist_lm.model.size import documents_apart, packs_documents


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible_BTT: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v in float64."""
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bthk,bshk->bhts", q.double(), k.double()) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible_BTT[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights, v.double())


def heads(n_tokens: int, n_heads: int, seed: int, n_rows: int = 2) -> torch.Tensor:
    return torch.randn(n_rows, n_tokens, n_heads, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("key_heads", [6, 2, 1])
@pytest.mark.parametrize("n_tokens", [1, 33, 700])
def test_masked_and_causal(n_tokens: int, key_heads: int) -> None:
    """700 tokens: more than one block of the CPU kernel, some of them masked altogether."""
    q, k, v = heads(n_tokens, 6, 0), heads(n_tokens, key_heads, 1), heads(n_tokens, key_heads, 2)
    causal = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril().expand(2, -1, -1)
    assert torch.allclose(attend(q, k, v, CAUSAL).double(), by_definition(q, k, v, causal), atol=1e-5)
    document = torch.arange(n_tokens).expand(2, -1) // torch.tensor([[10], [600]])
    visible = causal & (document[:, :, None] == document[:, None, :])
    masked = attend(q, k, v, within_documents(document, torch.float32, 8))
    assert torch.allclose(masked.double(), by_definition(q, k, v, visible), atol=1e-5)


@pytest.mark.parametrize("key_heads", [6, 2])
def test_documents_one_by_one_are_the_mask_forward_and_backward(key_heads: int) -> None:
    document = torch.arange(300).expand(2, -1) // torch.tensor([[100], [170]])
    made = [[heads(300, n, seed).requires_grad_() for seed, n in enumerate((6, key_heads, key_heads))] for _ in "ab"]
    mask = attention._masked(
        (document[:, :, None] == document[:, None, :]) & torch.ones(300, 300, dtype=torch.bool).tril(), torch.float32
    )
    apart = within_documents(document, torch.float32, 8)
    assert apart.boundary is not None
    outputs = [attend(*inputs, visibility) for inputs, visibility in zip(made, (mask, apart), strict=True)]
    assert torch.allclose(*outputs, atol=1e-6)
    for output in outputs:
        (output * output.detach().sin()).sum().backward()
    for masked, other in zip(*made, strict=True):
        assert torch.allclose(masked.grad, other.grad, atol=1e-6)


def test_documents_one_by_one_in_bf16_are_rounded_once() -> None:
    document = torch.arange(300).expand(2, -1) // torch.tensor([[100], [170]])
    half = [heads(300, 6, seed).bfloat16() for seed in range(3)]
    apart = within_documents(document, torch.bfloat16, 8)
    found = attend(*half, apart)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, attend(*(one.float() for one in half), apart).bfloat16())


def test_documents_of_one_length_take_one_call_and_rows_of_few_tokens_a_mask() -> None:
    cases = {
        "a document a row": (torch.arange(24).expand(4, -1) // 24, True),
        "three a row": (torch.arange(24).expand(4, -1) // 8, True),
        "short rows of any": (torch.arange(24).expand(4, -1) // 18, False),
        "long rows of any": (torch.arange(300).expand(4, -1) // 170, True),
    }
    for name, (document, apart) in cases.items():
        n_tokens = document.shape[1]
        q, k, v = heads(n_tokens, 6, 0, 4), heads(n_tokens, 2, 1, 4), heads(n_tokens, 2, 2, 4)
        seen = (document[:, :, None] == document[:, None, :]) & torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
        visibility = within_documents(document, torch.float32, 8)
        assert (visibility.boundary is not None) == apart, name
        assert torch.allclose(attend(q, k, v, visibility).double(), by_definition(q, k, v, seen), atol=1e-5), name


def test_boundaries() -> None:
    document = torch.tensor([[0, 0, 1, 2, 2], [2, 2, 2, 2, 3], [0, 0, 0, 0, 0]])
    assert document_boundaries(document).tolist() == [0, 2, 3, 5, 9, 10, 15]
    assert document_boundaries(document).dtype == torch.int32


def test_packed_kernel_gets_what_the_mask_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable-length kernel runs on CUDA only: here a stand-in that follows its documentation."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
        before, behind = window_size
        assert behind == 0
        assert enable_gqa == (q.shape[1] != k.shape[1])
        pieces = []
        for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            assert 0 < end - start <= min(max_q, max_k)
            causal = torch.ones(1, end - start, end - start, dtype=torch.bool).tril()
            if before >= 0:
                causal = causal.triu(-before)
            pieces.append(by_definition(q[None, start:end], k[None, start:end], v[None, start:end], causal)[0])
        assert torch.equal(cu_q, cu_k)
        return torch.cat(pieces).to(q.dtype)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    document = torch.arange(33).expand(2, -1) // torch.tensor([[5], [20]])
    for key_heads in (6, 2):
        q, k, v = heads(33, 6, 0), heads(33, key_heads, 1), heads(33, key_heads, 2)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        packed = attention.variable_length(*flat, document_boundaries(document), 33).view_as(q)
        assert torch.allclose(packed, attend(q, k, v, within_documents(document, q.dtype, 8)), atol=1e-5)

        windowed = attention.variable_length(*flat, document_boundaries(document), 33, 7).view_as(q)
        assert not torch.allclose(windowed, packed, atol=1e-3)
        position = torch.arange(33)[None]
        visibility = within_documents(document, q.dtype, 8, branch_BT=torch.zeros_like(document))  # a mask
        visibility = within_window(visibility, 7, position, q.shape[:2], q.dtype, 8)
        assert torch.allclose(windowed, attend(q, k, v, visibility), atol=1e-5)


def test_cpu_takes_the_fused_kernel() -> None:
    """An explicit mask must not fall back to the kernel that keeps all T x T weights."""
    long, short = torch.arange(64).expand(2, -1) // 64, torch.arange(64).expand(2, -1) // 5
    assert within_documents(long, torch.float32, 8).boundary is not None
    assert within_documents(short, torch.float32, 8).bias_B1TS is not None
    q, k, v = (heads(64, 5, seed).requires_grad_() for seed in range(3))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        attend(q, k, v, within_documents(long, torch.float32, 8)).sum().backward()
        attend(q, k, v, within_documents(short, torch.float32, 8)).sum().backward()
        attend(q, k, v, CAUSAL).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize(
    ("device", "half", "d_head", "packed"),
    [
        ("cuda", True, 64, True),
        ("cuda", True, 256, True),
        ("cuda", False, 64, False),
        ("cpu", True, 64, False),
        ("cuda", True, 12, False),
        ("cuda", True, 264, False),
    ],
)
def test_what_the_flash_kernel_cannot_take_goes_to_the_mask(device: str, half: bool, d_head: int, packed: bool) -> None:
    assert packs_documents(device, half, d_head) == packed


def test_a_mask_is_kept_where_neither_a_kernel_nor_the_cpu_takes_documents_apart() -> None:
    assert documents_apart("cpu", False, 12)
    assert documents_apart("cuda", True, 64)
    assert not documents_apart("cuda", False, 64)
