"""What a step of the engine asks of host and device at the widths of `large`: one wait, a few asynchronous copies."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.request import Request, SamplingParams
from tests.cuda.card import Traffic, pinned
from tests.cuda.test_paged_engine import CUDA, LARGE, calls, kernel_name, weights_of  # noqa: F401  two fixtures

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("calls")]

FREE = SamplingParams(max_new_tokens=400)
SHALLOW = replace(LARGE, n_layers=2)  # a copy of every layer is seen
ONE_WAIT = {"device to host": 1}


class Downloads(Traffic):
    """A download gives zeros, outside the fake mode, because the engine reads them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        new = func is torch.ops.aten.lift_fresh.default  # of `torch.tensor`
        if given and not new and not any(isinstance(one, FakeTensor) for one in given):
            with unset_fake_temporarily():
                return func(*args, **kwargs or {})
        before = self.waits["device to host"]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.waits["device to host"] == before:
            return result
        with unset_fake_temporarily():
            return torch.zeros(result.shape, dtype=result.dtype)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["flash", "plain"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    options = EngineOptions(page_tokens=256, step_tokens=2048, piece_tokens=256)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "inference_mode", torch.no_grad)
        return Engine(SHALLOW, weights_of(SHALLOW), eot_id=1, options=options, dtype=request.param, device=CUDA)


def step(engine: Engine) -> Traffic:
    with Downloads(axes={}) as traffic:
        Engine.step.__wrapped__(engine)  # type: ignore[attr-defined]  not in inference mode
    assert not traffic.uploads["pageable"]
    return traffic


@pytest.mark.parametrize(
    ("params", "uploads"),
    [
        ([replace(FREE, top_p=0.9), replace(FREE, top_k=40), replace(FREE, temperature=0), FREE], 1),
        ([replace(FREE, repetition_penalty=1.2), replace(FREE, logit_bias={3: 1.0}), FREE], 2),
        ([replace(FREE, top_logprobs=5), replace(FREE, top_k=40), FREE], 1),
        ([replace(FREE, presence_penalty=0.5), replace(FREE, frequency_penalty=1.0), FREE], 2),
    ],
    ids=["mixed", "adjusted", "alternatives", "counted"],
)
def test_a_decode_step_waits_once(engine, params, uploads):
    """It uploads the tokens of its sequences, what adjusts their logits, and a plan when one turns to its next page."""
    for number, one in enumerate(params):
        engine.submit(Request(str(number), [5] * (252 + number), one))
    step(engine)  # the prompts
    step(engine)
    plans = 0
    for _ in range(5):
        planned = engine._plan
        traffic = step(engine)
        assert +traffic.waits == ONE_WAIT
        turned = engine._plan is not planned
        assert traffic.uploads["pinned"] == uploads + turned
        plans += turned
    assert 0 < plans < 5


def test_prompts_are_planned_once_for_all_layers(engine):
    for number in range(3):
        engine.submit(Request(str(number), [5] * (300 + number), FREE, n=2))
    pieces = step(engine)  # one piece of each prompt
    assert not +pieces.waits
    assert pieces.uploads == {"pinned": 2}  # plan, tokens
    ends = step(engine)  # the rest of the prompts, and their first tokens
    assert +ends.waits == ONE_WAIT
    # plan, tokens, rows and positions, seeds, parameters
    assert ends.uploads == {"pinned": 5}


def test_a_step_that_ends_a_prompt_beside_others_waits_once(engine):
    engine.submit(Request("first", [5] * 100, FREE))
    step(engine)
    engine.submit(Request("second", [5] * 100, FREE))
    both = step(engine)
    assert len(engine._running) == 2
    assert +both.waits == ONE_WAIT
    # plan, tokens, rows and positions; plan, tokens; seeds, parameters
    assert both.uploads == {"pinned": 7}


def test_a_step_reads_8192_prompt_tokens(monkeypatch):
    """With the 512 tokens of a CPU, a GPU reads the prompts of a batch in sixteen times as many steps."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "inference_mode", torch.no_grad)
        engine = Engine(SHALLOW, weights_of(SHALLOW), eot_id=1, dtype=torch.bfloat16, device=CUDA)
    for number in range(9):
        engine.submit(Request(str(number), [5] * 1024, FREE))
    step(engine)
    assert (len(engine._running), len(engine._prefilling)) == (8, 1)
