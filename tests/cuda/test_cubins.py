"""Inductor's kernels for the blocks of `large` on an H100 compile to machine code (sm_90), without a GPU.

Needs triton (extra `cuda_tests`). The driver is the only part of it that asks for a card, so a stand-in names the
target. The functions that replace others below are torch's private ones: a new torch may need other stand-ins.
"""

import functools
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
import torch.utils._triton
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_lm.data.batch import Batch
from dist_lm.model.keyed_random import DropoutKey
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.sharding import wrap_blocks
from tests.cuda.card import CARD, text
from tests.cuda.test_train_step import config_of

pytestmark = pytest.mark.cuda

# what Inductor asks of a card
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=0,
)
KERNEL = re.compile(r"(triton_\w+) = async_compile\.triton\('triton_\w+', '''(.*?)''', device_str='cuda'\)", re.DOTALL)


class GeneratedError(Exception):
    """Code is generated; nothing is to be compiled or loaded from it."""


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Code that Inductor generates for compiled functions, which run operation by operation."""
    # here, because the module is collected without the extra, too
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H100,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: H100.name,
        "is_bf16_supported": lambda *_, **__: True,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: False,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    for name in ("is_available", "device_count", "current_device", "get_device_properties", "is_bf16_supported"):
        monkeypatch.setattr(CudaInterface, name, staticmethod(answers[name]))
    monkeypatch.setattr(CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90))
    monkeypatch.setattr(CudaInterface, "raise_if_triton_unavailable", staticmethod(lambda device=None: None))
    monkeypatch.setattr(CudaInterface, "is_triton_capable", staticmethod(lambda device=None: True))
    monkeypatch.setattr(CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: H100))
    monkeypatch.setattr(CudaInterface.Worker, "current_device", staticmethod(lambda: 0))
    monkeypatch.setattr(torch.utils._triton, "triton_hash_with_backend", lambda: "no backend")
    monkeypatch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
    monkeypatch.setattr(FakeTensorMode, "avoid_device_init", property(lambda self: True))
    for passes in (joint_graph, post_grad):  # patterns that are traced on a real card
        monkeypatch.setattr(passes, "lazy_init", lambda *_, **__: None)
    target = GPUTarget("cuda", 90, 32)
    driver: Any = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: CARD,
    )
    triton.runtime.driver.set_active(driver)
    generated: list[str] = []

    def keep_code(graph: GraphLowering) -> None:
        wrapper, _ = graph.codegen()
        generated.append(wrapper.value)
        raise GeneratedError

    monkeypatch.setattr(GraphLowering, "compile_to_module", keep_code)

    def compile_graph(graph: torch.fx.GraphModule, inputs: Any, *, is_backward: bool):
        try:
            compile_fx_inner(graph, inputs, is_backward=is_backward)
        except Exception as error:
            if "GeneratedError" not in repr(error):
                raise
        return graph.forward

    def partition(graph: torch.fx.GraphModule, joint: Any, **options: Any):
        joint_graph.joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, joint, compiler="inductor", **options)

    backend = aot_autograd(
        fw_compiler=functools.partial(compile_graph, is_backward=False),
        bw_compiler=functools.partial(compile_graph, is_backward=True),
        decompositions=select_decomp_table(),
        partition_fn=partition,
    )
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    forget_answers()
    with inductor_config.patch(compile_threads=1, fx_graph_cache=False):
        yield generated
    torch.compiler.reset()
    forget_answers()


def forget_answers() -> None:
    """Torch keeps what it once found out about triton."""
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.parametrize(("mode", "dropout"), [pytest.param("none", 0.0, marks=pytest.mark.bars), ("selective", 0.1)])
def test_kernels_compile_to_machine_code(sources, monkeypatch, tmp_path, mode, dropout):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = config_of(layers=2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    batch: Batch = text(config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(CARD):
            model = Transformer(config.model)
        torch.set_default_dtype(torch.float32)
        wrap_blocks(model, mode, compiled=True, whole_graph=True)
        model.dropout = DropoutKey(dropout, seed=0, step=1) if dropout else None
        model.token_losses(batch.to(CARD)).sum().backward()
    assert len(sources) == 2  # forward and backward pass of a block
    kernels = {found[1]: found[2] for source in sources for found in KERNEL.finditer(source)}
    assert len(kernels) > 4
    for source in kernels.values():
        getattr(PyCodeCache.load(source), name_in(source)).precompile(warm_cache_only=True)
    assert {path.stem for path in tmp_path.rglob("*.cubin")} == set(map(name_in, kernels.values()))


def name_in(source: str) -> str:
    """The function that the source of a kernel defines."""
    found = re.search(r"^def (triton_\w+)", source, re.MULTILINE)
    assert found, source
    return found.group(1)
