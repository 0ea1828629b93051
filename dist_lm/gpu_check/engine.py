"""The generation engine on one card, against a plain forward pass of the model."""

import time
from collections.abc import Sequence

import torch

from dist_lm.config.model import ModelConfig
from dist_lm.generation.engine import Engine, EngineOptions
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.gpu_check.probe import Probe, expect
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer

LOGPROB_ERROR = 0.15  # nats, mean over the tokens of an answer in bf16; a wrong page or mask costs a nat and more
BEHIND = 0.7  # nats by which a greedy token may miss the likeliest one of the plain forward pass
Prompts = Sequence[list[int]]


def engine(probe: Probe) -> None:
    """Greedy answers of prompts of many lengths, with CUDA graphs and without, before and after new weights; speed."""
    device = probe.world.device
    tiny = ("model=nano", "model.n_layers=2", "model.vocab_size=512", "model.max_seq_len=256")
    shape = ("model=large", "model.n_layers=8", "model.max_seq_len=2048", "model.init_std=0.05", "stage.seq_len=64")
    config = probe.config(*shape, tiny=tiny).model
    models = [_model(config, seed, device) for seed in range(2)]
    lengths = (1, 40, 70) if probe.rehearsal else (1, 255, 256, 257, 700, 1500)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    dtype = torch.float32 if probe.rehearsal else torch.bfloat16
    weights = [dict(model.named_parameters()) for model in models]
    options = EngineOptions(cache_tokens=max(len(prompts), 64) * config.max_seq_len // 4)
    with Engine(config, weights[0], eot_id=0, options=options, dtype=dtype, device=device) as own:
        graphs = _graphs(own)
        if not probe.rehearsal:
            expect(own.options.page_tokens == 256, f"pages of {own.options.page_tokens} tokens: the kernel needs 256")
            expect(graphs is not None, "the engine captures no CUDA graphs")
        _check_answers(probe, "first weights", own, models[0], prompts)
        captured = dict(graphs._graphs) if graphs else {}
        own.load_weights(weights[1], version=1)
        _check_answers(probe, "new weights", own, models[1], prompts)
        if graphs:
            expect(graphs._graphs == captured, "new weights made the engine capture its CUDA graphs again")
            _set_graphs(own, None)
            _check_answers(probe, "without graphs", own, models[1], prompts)
            _set_graphs(own, graphs)
        for sequences in (1, 16):
            _note_speed(probe, own, prompts[1], sequences)


def _model(config: ModelConfig, seed: int, device: torch.device) -> Transformer:
    model = Transformer(config)
    initialise(model, seed)
    return model.requires_grad_(requires_grad=False).to(device)


def _graphs(own: Engine):
    return getattr(own._decoder, "_graphs", None)


def _set_graphs(own: Engine, graphs) -> None:
    own._decoder._graphs = graphs  # type: ignore[union-attr]


def _answers(own: Engine, prompts: Prompts, new: int) -> list[Answer]:
    params = SamplingParams(max_new_tokens=new, temperature=0, ignore_eot=True)
    for index, prompt in enumerate(prompts):
        own.submit(Request(str(index), prompt, params))
    done = own.run()
    wrong = [result for result in done if not isinstance(result, Answer)]
    expect(not wrong, f"the engine refused {len(wrong)} requests: {wrong[:1]}")
    return sorted((result for result in done if isinstance(result, Answer)), key=lambda answer: int(answer.request))


@torch.inference_mode()
def _check_answers(probe: Probe, name: str, own: Engine, model: Transformer, prompts: Prompts) -> None:
    """Against one fp32 forward pass over prompt and answer: no cache, no batch."""
    device, worst = probe.world.device, 0.0
    for prompt, answer in zip(prompts, _answers(own, prompts, 12), strict=True):
        row = torch.tensor([*prompt, *answer.tokens], device=device)
        logprobs_NV = model(row[None])[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        expected = logprobs_NV.gather(1, row[len(prompt) :, None])[:, 0]
        errors = torch.tensor(answer.raw_logprobs, device=device) - expected
        behind = float((logprobs_NV.amax(-1) - expected).max())
        where = f"{name}, prompt of {len(prompt)} tokens"
        expect(behind <= BEHIND, f"{where}: a greedy token is {behind:.2g} nats less likely than the likeliest one")
        worst = max(worst, float(errors.abs().mean()))
        expect(worst <= LOGPROB_ERROR, f"{where}: log-probabilities are off by {worst:.2g} nats")
    probe.note(f"{name}, log-probability off nats", worst)


def _note_speed(probe: Probe, own: Engine, prompt: list[int], sequences: int) -> None:
    new = 8 if probe.rehearsal else 96
    _answers(own, [prompt] * sequences, 4)  # captures the graph of this size
    began = time.perf_counter()
    _answers(own, [prompt] * sequences, new)
    seconds = time.perf_counter() - began
    probe.note(f"batch {sequences} tokens/s", sequences * new / seconds)
    probe.note(f"batch {sequences} ms/step", 1e3 * seconds / new)
