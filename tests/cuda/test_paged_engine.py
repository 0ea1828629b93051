"""The paged engine at the widths of `large`, in bf16 on CUDA: the flash kernel accepts its calls."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_lm.config.model import ModelConfig
from dist_lm.generation import flash_pages
from dist_lm.generation.decoder import Decoder
from dist_lm.generation.engine import Engine
from dist_lm.generation.flash_pages import PAGE_TOKENS, CudaCapture, DecodeGraphs, FlashPages
from dist_lm.generation.paged_cache import Piece, PlainPages
from dist_lm.model.size import parameter_count, parameter_shapes
from dist_lm.prepare.compose import compose_config
from tests.cuda.card import stand_in
from tests.cuda.flash_contract import RefusedError, checked_varlen_attn

pytestmark = pytest.mark.cuda

WHOLE = compose_config(["stage=language", "model=large"]).model
LARGE = replace(WHOLE, n_layers=4)
GROUPED = replace(
    LARGE,
    n_layers=2,
    n_kv_heads=5,
    norm="rmsnorm",
    ffn="swiglu",
    bias=False,
    qkv_bias=True,
    qk_norm=True,
    tie_embeddings=True,
    parallel_residual=True,
    rotary_fraction=0.5,
    rope_scaling="llama3",
    rope_factor=8.0,
)
CUDA = torch.device("cuda", 0)


class Eager:
    """Stands in for CUDA graphs: a replay runs the recorded step, on the tensors of the recording."""

    def __init__(self, device: torch.device) -> None:
        assert device == CUDA

    def __call__(self, step):
        return (lambda: None), step()


@pytest.fixture(autouse=True)
def page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory of fake tensors cannot be pinned."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)


@pytest.fixture
def kernel_name() -> str:
    return "FA2"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, kernel_name: str) -> list[dict[str, torch.Tensor]]:
    """Calls of the kernel, each of which it accepted."""
    seen = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        output = checked_varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, kernel=kernel_name, **options)
        seen.append({"q": q, "cu_k": cu_k, **options})
        return output

    active = None if kernel_name == "FA2" else kernel_name
    monkeypatch.setattr(flash_pages, "current_flash_attention_impl", lambda: active)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(flash_pages, "CudaCapture", Eager)
    return seen


def weights_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape) for name, shape in parameter_shapes(config).items()}


def decoder_of(config: ModelConfig) -> Decoder:
    decoder = Decoder(config, 64, PAGE_TOKENS, torch.bfloat16, CUDA)
    decoder.load(weights_of(config))
    assert isinstance(decoder.cache, FlashPages)
    return decoder


def check_logits(logits: torch.Tensor, config: ModelConfig, rows: int) -> None:
    assert tuple(logits.shape) == (rows, config.vocab_size)
    assert (logits.dtype, logits.device) == (torch.float32, CUDA)


@pytest.mark.parametrize("kernel_name", ["FA2", "FA3"])
@pytest.mark.parametrize("config", [LARGE, GROUPED, WHOLE], ids=["heads", "groups", "32 layers"])
def test_prompts_are_accepted(calls, config):
    decoder = decoder_of(config)
    pieces = [Piece(list(range(300)), 0, [0, 1]), Piece([7] * 256, 512, [2, 3, 4]), Piece([1], 0, [5])]
    check_logits(decoder.prefill(pieces), config, len(pieces))
    assert len(calls) == config.n_layers


@pytest.mark.parametrize(
    ("config", "graphs", "kernel_name"),
    [
        (LARGE, True, "FA2"),
        (LARGE, False, "FA3"),
        (GROUPED, False, "FA2"),
        (GROUPED, True, "FA3"),
        (WHOLE, True, "FA2"),
    ],
    ids=["heads-graphs", "heads-eager-FA3", "groups-eager", "groups-graphs-FA3", "32 layers"],
)
def test_decode_steps_are_accepted(calls, config, graphs):
    decoder = decoder_of(config)
    assert isinstance(decoder._graphs, DecodeGraphs)
    if not graphs:
        decoder._graphs = None
    plan = decoder.plan([[0, 1], [2], [3]], [300, 5, 7])
    for _ in range(2):
        check_logits(decoder.decode([0, 0, 0], plan), config, 3)
        plan.advance()
    assert len(calls) == config.n_layers * (1 if graphs else 2)
    rows = 4 if graphs else 3  # graphs have a few sizes
    assert {len(call["q"]) for call in calls} == {rows}


@pytest.mark.parametrize("graphs", [True, False])
def test_a_decoder_that_sleeps_gives_the_memory_of_its_weights_back(calls, graphs, monkeypatch):
    """Finds weights that stay on the card while the learner trains, or that the next step does not find there."""
    stand_in(monkeypatch)
    decoder = decoder_of(LARGE)
    if not graphs:
        decoder._graphs = None
        decoder.load(weights_of(LARGE))
    stored = [*decoder._stored.values()]
    n_bytes = sum(tensor.nbytes for tensor in stored)
    assert n_bytes > 2 * parameter_count(LARGE) * 0.99

    for is_replaced in (False, True):
        decoder.sleep()
        assert not any(tensor.untyped_storage().nbytes() for tensor in stored)
        if is_replaced:
            decoder.load(weights_of(LARGE))
            stored = [*decoder._stored.values()]
        decoder.wake()
        assert sum(tensor.untyped_storage().nbytes() for tensor in stored) == n_bytes
        decoder.resize(64)
        plan = decoder.plan([[0, 1], [2], [3]], [300, 5, 7])
        check_logits(decoder.decode([0, 0, 0], plan), LARGE, 3)


class Inputs(TorchDispatchMode):
    """Storages that a step reads and has not made, and the devices of all tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.devices: set[torch.device] = set()
        self._made: dict[int, torch.Tensor] = {}  # held, so that no address is used twice

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.devices |= {tensor.device for tensor in tensors_in((args, kwargs))}
        self.read |= {address(tensor) for tensor in tensors_in((args, kwargs))} - self._made.keys()
        result = function(*args, **(kwargs or {}))
        self._made |= {address(one): one for one in tensors_in(result) if address(one) not in self.read}
        return result


def tensors_in(values) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("config", [LARGE, GROUPED], ids=["heads", "groups"])
def test_new_weights_are_where_captured_steps_read_them(config):
    decoder, read, loaded = decoder_of(config), [], []
    plan, token_B = decoder.plan([[0], [2]], [5, 7]), torch.zeros(2, dtype=torch.int64, device=CUDA)
    decoder.decode([0, 0], plan)
    graphs = decoder._graphs
    assert graphs
    captured = dict(graphs._graphs)
    for _ in range(2):
        with Inputs() as inputs:
            decoder._decode(token_B, plan)
        read.append(inputs.read)
        assert inputs.devices == {CUDA}
        loaded.append(weights_of(config))
        decoder.load(loaded[-1])
    assert read[0] == read[1]
    assert len(read[0]) > 2 * config.n_layers
    assert graphs._graphs == captured


@pytest.mark.parametrize(
    ("dtype", "pages", "kind"), [(torch.bfloat16, 256, FlashPages), (torch.float32, 64, PlainPages)], ids=str
)
def test_an_engine_uses_the_kernel_and_graphs_in_half_precision(monkeypatch, calls, dtype, pages, kind):
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    engine = Engine(LARGE, weights_of(LARGE), eot_id=0, dtype=dtype, device=CUDA)
    assert engine.options.page_tokens == pages
    assert isinstance(engine._decoder, Decoder)
    assert isinstance(engine._decoder.cache, kind)
    assert (engine._decoder._graphs is not None) == (kind is FlashPages)


def call(**changes) -> torch.Tensor:
    """A call that the kernel accepts, with changes."""

    def integers(*shape):
        return torch.zeros(shape, dtype=torch.int32, device=CUDA)

    def pool(page, d_head=64):
        return torch.zeros(8, page, 5, d_head, dtype=torch.bfloat16, device=CUDA)

    page, d_head, kernel = changes.pop("page", 256), changes.pop("d_head", 64), changes.pop("kernel", "FA2")
    given = {
        "q": torch.zeros(3, 5, d_head, dtype=torch.bfloat16, device=CUDA),
        "k": pool(page, d_head),
        "v": pool(page, d_head),
        "cu_q": integers(4),
        "cu_k": integers(4),
        "max_q": 1,
        "max_k": 2 * page,
        "seqused_k": integers(3),
        "block_table": integers(3, 2),
        "window_size": (-1, 0),
    }
    changed = {name: change(given[name]) for name, change in changes.items()}
    return checked_varlen_attn(**given | changed, kernel=kernel)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cu_k": lambda _: None}, "both must be set"),
        ({"cu_k": lambda given: given.long()}, "key offsets must be int32"),
        ({"cu_k": lambda given: given[:3]}, r"key offsets must have shape \(4,\)"),
        ({"page": 64}, "only multiples of 256"),
        ({"d_head": 260}, "only multiples of 8 up to 256"),
        ({"block_table": lambda given: given.long()}, "must be int32"),
        ({"block_table": lambda given: given.t().contiguous().t()}, "contiguous in the last"),
        ({"block_table": lambda given: given[:2]}, "a row for each sequence"),
        ({"seqused_k": lambda _: None}, "number of used keys"),
        ({"q": lambda given: given.float()}, "only bf16 and fp16"),
        ({"q": lambda given: given.transpose(1, 2).contiguous().transpose(1, 2)}, "contiguous in the last"),
        ({"kernel": "FA3"}, "refused beside a table of pages"),
    ],
    ids=str,
)
def test_the_contract_refuses(changes, words):
    assert call().shape == (3, 5, 64)
    with pytest.raises(RefusedError, match=words):
        call(**changes)


def test_flash_attention_3_takes_any_page_and_no_key_offsets_beside_them():
    assert call(kernel="FA3", page=64, cu_k=lambda _: None).shape == (3, 5, 64)


def test_steps_are_captured_on_their_own_device_while_other_threads_call_cuda(monkeypatch):
    """The current device is another one than that of the steps."""
    events = []

    class Stream(SimpleNamespace):
        def wait_stream(self, other):
            events.append(("waits", self.device, other.device))

    @contextmanager
    def on(stream):
        events.append(("on", stream.device))
        yield

    @contextmanager
    def graph(recorded, pool, stream, capture_error_mode="global"):
        assert stream is streams[0]
        events.append(("captures on", stream.device, capture_error_mode))
        yield

    streams, mine, other = [], torch.device("cuda", 0), torch.device("cuda", 1)
    stands_in = {
        "graph_pool_handle": lambda: None,
        "Stream": lambda device=other: streams.append(Stream(device=device)) or streams[-1],
        "current_stream": lambda device=other: Stream(device=device),
        "stream": on,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": graph,
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    capture = CudaCapture(mine)
    for _ in range(2):
        capture(lambda: torch.zeros(1, device=CUDA))
    waits = ("waits", mine, mine)
    assert events == 2 * [waits, ("on", mine), ("captures on", mine, "thread_local"), waits]
    assert len(streams) == 1
