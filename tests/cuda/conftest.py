"""CUDA code on fake tensors, without a GPU: `bash launch/test.sh tests/cuda`, a pytest process of its own.

A fake tensor has shape, dtype and device, and no memory, so models run at their real size. `guard.cpp` is loaded first.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).with_name("guard.cpp")
LOADED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    # the root is this folder (pytest.ini) only if these tests run alone: others must not see the guard
    config.stash[LOADED] = config.rootpath == SOURCE.parent and "torch" not in sys.modules
    if config.stash[LOADED]:
        assert config.cache is not None
        load_guard(config.cache.mkdir("cuda_guard"))


@pytest.fixture(autouse=True)
def fake_cuda(pytestconfig: pytest.Config) -> Iterator[None]:
    """Tensors that a test makes are fake. `no_grad` because `inference_mode` fails on fake CUDA tensors."""
    if not pytestconfig.stash[LOADED]:
        pytest.fail("needs a process of its own: run `bash launch/test.sh tests/cuda`", pytrace=False)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Graphs that torch.compile has traced; they run operation by operation. No function may be in parts."""
    import torch
    from torch._dynamo.utils import counters

    from tests.cuda.card import stand_in

    stand_in(monkeypatch)
    traced: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: object):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch.compiler.reset()
    counters.clear()
    yield traced
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
    torch.compiler.reset()


def load_guard(cache: Path) -> None:
    """Build the guard for this torch, unless `cache` holds it, and load it and the libraries of torch it needs.

    Raises:
        UsageError: no compiler, or it refused; pytest ends with exit code 4.
    """
    spec = importlib.util.find_spec("torch")
    assert spec
    assert spec.origin
    torch = Path(spec.origin).parent
    key = hashlib.sha256(SOURCE.read_bytes() + importlib.metadata.version("torch").encode()).hexdigest()[:12]
    library = cache / f"guard-{key}.so"
    if not library.exists():
        _build(library, torch)
    for needed in (torch / "lib/libtorch_global_deps.so", torch / "lib/libtorch_cpu.so", library):
        if needed.exists():
            ctypes.CDLL(str(needed), ctypes.RTLD_GLOBAL)


def _build(library: Path, torch: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise pytest.UsageError("tests/cuda: g++ is missing; install it (apt-get install g++)")
    unfinished = library.with_suffix(".making")
    folders = [f"-I{torch}/include", f"-L{torch}/lib"]
    command = [compiler, "-std=c++20", "-shared", "-fPIC", str(SOURCE), *folders, "-lc10", "-ltorch_cpu"]
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise pytest.UsageError(f"tests/cuda: g++ failed on {SOURCE}:\n{done.stderr}")
    unfinished.replace(library)
