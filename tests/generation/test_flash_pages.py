"""The cache of the flash kernel, with the kernel's contract in plain PyTorch in its place: it runs on CUDA only."""

import random
from dataclasses import replace

import pytest
import torch

from dist_lm.config.pool import RolloutPoolConfig
from dist_lm.generation import decoder as decoder_module
from dist_lm.generation import engine as engine_module
from dist_lm.generation.decoder import Decoder, best_page_tokens, build_cache
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.flash_pages import DecodeGraphs, FlashPages, graph_size
from dist_lm.generation.paged_cache import PlainPages, pages_for
from dist_lm.generation.shard import share_of
from dist_lm.parallel import mesh
from dist_lm.stages.generate.stage import GenerateConfig
from tests.generation.test_engine import CONFIG, GROUPED, PAGE, model_of, requests_of_all_kinds, run_schedule


def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table):
    """Queries of a sequence are its last ones; keys follow its table of pages. tests/cuda has the other checks. The
    kernel chooses in how many parts it splits the keys."""
    before, behind = window_size
    assert behind == 0
    assert block_table.dtype == seqused_k.dtype == cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_k.shape == cu_q.shape
    assert int(cu_k[0]) == 0
    assert bool(((seqused_k <= cu_k.diff()) & (cu_k.diff() <= max_k)).all())
    assert q.is_contiguous()
    assert max_k == block_table.shape[1] * k.shape[1]
    outputs = []
    for row, (start, end) in enumerate(zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)):
        n_queries, n_keys = end - start, int(seqused_k[row])
        assert 0 < n_queries <= max_q
        assert n_keys <= max_k
        key, value = (pool[block_table[row].long()].flatten(0, 1)[:n_keys] for pool in (k, v))
        groups = q.shape[1] // k.shape[2]
        assert enable_gqa == (groups > 1)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("qhk,shk->hqs", q[start:end], key) * scale
        own = torch.arange(n_keys - n_queries, n_keys)[:, None]
        seen = torch.arange(n_keys) <= own
        if before >= 0:
            seen &= torch.arange(n_keys) >= own - before
        weight = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqs,shk->qhk", weight, value))
    return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines take the kernel's cache."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(decoder_module, "build_cache", FlashPages)


@pytest.mark.heavy
@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["heads", "groups"])
def test_schedules_give_what_a_plain_forward_gives(config):
    model, dice = model_of(config).double(), random.Random(3)
    for _ in range(4):
        run_schedule(model, requests_of_all_kinds(6), pages=dice.randint(12, 20), seed=dice.getrandbits(20))


class Recorded:
    """Stands in for CUDA graphs: a step is replayed with the tensors that it was recorded with."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, step):
        result = step().clone()
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            result.copy_(step())

        return replay, result


@pytest.mark.heavy
@pytest.mark.usefixtures("flash")
def test_replayed_steps_give_what_a_plain_forward_gives(monkeypatch):
    graphs, recorded = [], Recorded()

    class WithGraphs(Decoder):
        def __init__(self, config, n_pages, page_tokens, dtype, device):
            super().__init__(config, n_pages, page_tokens, dtype, device)
            longest = pages_for(config.max_seq_len, page_tokens)
            self._graphs = DecodeGraphs(self._decode, self.cache, longest, recorded)
            graphs.append(self._graphs)

    monkeypatch.setattr(engine_module, "Decoder", WithGraphs)
    model, dice = model_of(CONFIG), random.Random(4)
    for _ in range(3):
        run_schedule(model, requests_of_all_kinds(9), pages=dice.randint(12, 24), seed=dice.getrandbits(20))
    assert recorded.replayed > 10 * recorded.captured > 10 * len(graphs)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["heads", "groups"])
def test_graphs_outlive_their_weights(config):
    recorded, models = Recorded(), [model_of(config).double() for _ in range(2)]
    models[1].load_state_dict({name: value * 1.25 for name, value in models[0].state_dict().items()})
    before = {name: value.clone() for name, value in models[0].named_parameters()}
    decoder = Decoder(config, 8, PAGE, torch.float64, torch.device("cpu"))
    decoder._graphs = DecodeGraphs(decoder._decode, decoder.cache, 4, recorded)
    fresh = Decoder(config, 8, PAGE, torch.float64, torch.device("cpu"))
    for model in models:
        for one in (decoder, fresh):
            one.load(dict(model.named_parameters()))
        logits, expected = (one.decode([3, 5], one.plan([[0], [1]], [0, 0])) for one in (decoder, fresh))
        assert torch.equal(logits, expected)
    assert recorded.captured == 1
    assert all(torch.equal(value, before[name]) for name, value in models[0].named_parameters())


def test_a_few_sizes_of_graphs_take_any_number_of_sequences():
    sizes = [graph_size(n) for n in range(1, 257)]
    assert all(size >= n for n, size in enumerate(sizes, start=1))
    assert all(size <= 2 * n and size < n + 8 for n, size in enumerate(sizes, start=1))
    assert len(set(sizes)) == 4 + 31


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, 64),
        ("cpu", torch.bfloat16, 64),
        ("cuda", torch.float32, 64),
        ("cuda", torch.bfloat16, 256),
        ("cuda", torch.float16, 256),
    ],
)
def test_pages_suit_the_kernel(device, dtype, expected):
    assert best_page_tokens(CONFIG, dtype, torch.device(device)) == expected


@pytest.mark.parametrize(("given", "expected"), [(0, 64), (32, 32), (512, 512)])
def test_an_engine_takes_the_size_of_pages_that_is_given(given, expected):
    options = Engine(
        CONFIG, dict(model_of(CONFIG).named_parameters()), options=EngineOptions(page_tokens=given), eot_id=0
    ).options
    assert (options.page_tokens, options.n_pages) == (expected, options.cache_tokens // expected)


def test_heads_that_the_kernel_does_not_take_have_small_pages():
    config = replace(CONFIG, d_model=60, n_heads=5)  # 12 numbers a head
    assert best_page_tokens(config, torch.bfloat16, torch.device("cuda")) == 64


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        (EngineOptions(), "cpu", (512, 256)),
        (EngineOptions(), "cuda", (8192, 8192)),
        (EngineOptions(step_tokens=1000), "cuda", (1000, 992)),
        (EngineOptions(step_tokens=1000, piece_tokens=100), "cuda", (1000, 100)),
        (EngineOptions(step_tokens=100), "cpu", (100, 256)),
    ],
)
def test_prompt_tokens_of_a_step_follow_the_device_unless_asked_for(options, device, expected):
    """A GPU that reads 512 tokens a step is idle; pieces that are no whole blocks would break the prefix cache."""
    chosen = options.for_device(torch.device(device))
    assert (chosen.step_tokens, chosen.piece_tokens) == expected


@pytest.mark.parametrize(
    ("capability", "error", "activated"),
    [((9, 0), None, True), ((8, 0), None, False), ((9, 0), ImportError("undefined symbol"), False)],
    ids=["Hopper", "Ampere", "of another torch"],
)
def test_flash_attention_3_is_used_where_it_imports(monkeypatch, caplog, capability, error, activated):
    """A kernel for another GPU ends in an illegal instruction; a package that does not fit must not end the run."""
    asked = []

    def activate(name: str) -> None:
        asked.append(name)
        if error is not None:
            raise error

    monkeypatch.setattr(mesh.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(mesh, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(mesh, "use_flash_attention_3", mesh.use_flash_attention_3.__wrapped__)
    assert mesh.use_flash_attention_3(torch.device("cuda", 0)) is activated
    assert asked == ["FA3"] * (capability == (9, 0))
    assert ("undefined symbol" in caplog.text) is (error is not None)


@pytest.mark.parametrize("pool", [RolloutPoolConfig(), GenerateConfig(name="generate"), EngineOptions()])
def test_stages_choose_pages_by_device(pool):
    assert pool.page_tokens == 0


@pytest.mark.parametrize(
    ("device", "dtype", "page", "kind"),
    [
        ("cpu", torch.float32, 64, PlainPages),
        ("cpu", torch.bfloat16, 256, PlainPages),
        ("meta", torch.bfloat16, 256, PlainPages),
    ],
)
def test_without_the_kernel_pages_are_read_in_plain_pytorch(device, dtype, page, kind):
    assert isinstance(build_cache(share_of(CONFIG), 4, page, dtype, torch.device(device)), kind)
