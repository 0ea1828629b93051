"""What a step of the engine asks of host and device at the widths of `large`: one wait, a few asynchronous copies."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lm.generation.engine import Engine, EngineOptions
from dist_lm.generation.request import Request, SamplingParams
from tests.cuda.test_paged_engine import CUDA, LARGE, calls, kernel_name, weights_of  # noqa: F401  two fixtures

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("calls")]

aten = torch.ops.aten
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal, aten.is_nonzero)
FREE = SamplingParams(max_new_tokens=400)
SHALLOW = replace(LARGE, n_layers=2)  # a copy of every layer is seen


class Traffic(TorchDispatchMode):
    """Counts waits of the host for the device, and copies from pinned and from pageable memory.

    A download gives zeros, outside the fake mode, because the engine reads them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, operator = kwargs or {}, function._overloadpacket
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        new = operator is aten.lift_fresh  # of `torch.tensor`
        if given and not new and not any(isinstance(one, FakeTensor) for one in given):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        result = function(*args, **kwargs)
        if operator in WAITS and given[0].device.type == "cuda":
            self.waits[str(operator)] += 1
        elif operator in (aten.index, aten.index_put_) and any(one.dtype == torch.bool for one in tree_leaves(args[1])):
            self.waits["index by a mask"] += 1
        elif operator in (aten._to_copy, aten.copy_):
            source, target = (given[0], result) if operator is aten._to_copy else (given[1], given[0])
            if (source.device.type, target.device.type) == ("cpu", "cuda"):
                last = args[2] if len(args) > 2 else False
                asynchronous = kwargs.get("non_blocking", last) and hasattr(source, "is_fake_pinned")
                self.uploads["pinned" if asynchronous else "pageable"] += 1
            elif (source.device.type, target.device.type) == ("cuda", "cpu"):
                self.waits["download"] += 1
                with unset_fake_temporarily():
                    return torch.zeros(result.shape, dtype=result.dtype)
        return result


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.clone()
    copy.is_fake_pinned = True  # type: ignore[attr-defined]
    return copy


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["flash", "plain"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    options = EngineOptions(page_tokens=256, step_tokens=2048)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "inference_mode", torch.no_grad)
        return Engine(SHALLOW, weights_of(SHALLOW), eot_id=1, options=options, dtype=request.param, device=CUDA)


def step(engine: Engine) -> Traffic:
    with Traffic() as traffic:
        Engine.step.__wrapped__(engine)  # type: ignore[attr-defined]  not in inference mode
    assert not traffic.uploads["pageable"]
    return traffic


@pytest.mark.parametrize(
    ("params", "uploads"),
    [
        ([replace(FREE, top_p=0.9), replace(FREE, top_k=40), replace(FREE, temperature=0), FREE], 1),
        ([replace(FREE, repetition_penalty=1.2), replace(FREE, logit_bias={3: 1.0}), FREE], 2),
    ],
    ids=["mixed", "adjusted"],
)
def test_a_decode_step_waits_once(engine, params, uploads):
    """It uploads the tokens of its sequences, what adjusts their logits, and a plan when one turns to its next page."""
    for number, one in enumerate(params):
        engine.submit(Request(str(number), [5] * (252 + number), one))
    step(engine)
    plans = 0
    for _ in range(5):
        planned = engine._plan
        traffic = step(engine)
        assert traffic.waits == {"download": 1}
        turned = engine._plan is not planned
        assert traffic.uploads["pinned"] == uploads + turned
        plans += turned
    assert 0 < plans < 5


def test_prompts_are_planned_once_for_all_layers(engine):
    for number in range(3):
        engine.submit(Request(str(number), [5] * (300 + number), FREE, n=2))
    pieces = step(engine)  # one piece of each prompt
    assert not pieces.waits
    assert pieces.uploads == {"pinned": 2}  # plan, tokens
    ends = step(engine)  # the rest of the prompts, then a token for each sequence
    assert ends.waits == {"download": 2}
    # plan, tokens, rows and positions, seeds, parameters; plan, tokens
    assert ends.uploads == {"pinned": 7}
