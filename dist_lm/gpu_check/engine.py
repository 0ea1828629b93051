"""A check of the generation engine on one card, against a plain forward pass of the model."""

import time
from collections.abc import Sequence

import torch

from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.generation.request import Answer, Request, SamplingParams
from dist_lm.gpu_check.probe import Probe, expect
from dist_lm.gpu_check.training import whole_model
from dist_lm.model.transformer import Transformer

LOGPROB_ERROR = 0.15  # nats, mean over the tokens of an answer in bf16; a wrong page or mask costs at least one nat
GREEDY_GAP = 0.7  # nats that a greedy token may be less likely than the best one of the plain forward pass
Prompts = Sequence[list[int]]


def engine(probe: Probe) -> None:
    """Checks greedy answers to prompts of many lengths, with and without CUDA graphs, before and after new weights.

    Notes the errors of log-probabilities, and tokens/s and ms/step with 1 and 16 sequences.

    Raises:
        CheckFailedError: pages or CUDA graphs are not those of a card, new weights capture graphs again, or an answer
            differs from the model's forward pass.
    """
    device = probe.world.device
    tiny = ("model=nano", "model.n_layers=2", "model.vocab_size=512", "model.max_seq_len=256")
    shape = ("model=large", "model.n_layers=8", "model.max_seq_len=2048", "model.init_std=0.05", "stage.seq_len=64")
    config = probe.config(*shape, tiny=tiny).model
    models = [whole_model(config, seed, device).requires_grad_(requires_grad=False) for seed in range(2)]

    # Lengths around a page of 256 tokens, and far beyond it.
    lengths = probe.sized((1, 255, 256, 257, 700, 1500), rehearsal=(1, 40, 70))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    dtype = probe.sized(torch.bfloat16, rehearsal=torch.float32)
    weights = [dict(model.named_parameters()) for model in models]
    options = EngineOptions(cache_tokens=max(len(prompts), 64) * config.max_seq_len // 4)

    with Engine(config, weights[0], eot_id=0, options=options, dtype=dtype, device=device) as tested:
        graphs = getattr(tested._decoder, "_graphs", None)
        if not probe.rehearsal:
            page_tokens = tested.options.page_tokens
            expect(page_tokens == 256, f"pages of {page_tokens} tokens: the kernel needs 256")
            expect(graphs is not None, "the engine captures no CUDA graphs")

        _check_answers(probe, "first weights", tested, models[0], prompts)

        captured = dict(getattr(graphs, "_graphs", {}))
        tested.load_weights(weights[1], version=1)
        _check_answers(probe, "new weights", tested, models[1], prompts)

        if graphs:
            expect(graphs._graphs == captured, "new weights made the engine capture its CUDA graphs again")
            _set_graphs(tested, None)
            _check_answers(probe, "without graphs", tested, models[1], prompts)
            _set_graphs(tested, graphs)

        for sequences in (1, 16):
            _note_speed(probe, tested, prompts[1], sequences)


def _set_graphs(engine: Engine, graphs) -> None:
    engine._decoder._graphs = graphs  # type: ignore[union-attr]


def _answers(engine: Engine, prompts: Prompts, num_tokens: int) -> list[Answer]:
    """Returns greedy answers of `num_tokens` tokens, in the order of the prompts.

    Raises:
        CheckFailedError: the engine refused a request.
    """
    params = SamplingParams(max_new_tokens=num_tokens, temperature=0, ignore_eot=True)
    for index, prompt in enumerate(prompts):
        engine.submit(Request(str(index), prompt, params))

    results = engine.run()
    refused = [result for result in results if not isinstance(result, Answer)]
    expect(not refused, f"the engine refused {len(refused)} requests: {refused[:1]}")

    # Answers arrive in the order in which they end.
    return sorted((result for result in results if isinstance(result, Answer)), key=lambda answer: int(answer.request))


@torch.inference_mode()
def _check_answers(probe: Probe, name: str, engine: Engine, model: Transformer, prompts: Prompts) -> None:
    """Compares answers with one forward pass over prompt and answer, without cache and batch; notes the largest mean
    error of an answer's log-probabilities, nats.

    Raises:
        CheckFailedError: a token is less likely than the likeliest by more than GREEDY_GAP, or log-probabilities are
            off by more than LOGPROB_ERROR, nats each.
    """
    device = probe.world.device
    worst = 0.0
    for prompt, answer in zip(prompts, _answers(engine, prompts, 12), strict=True):
        # Position i of the model predicts token i + 1.
        row = torch.tensor([*prompt, *answer.tokens], device=device)
        logprobs_NV = model(row[None])[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        expected = logprobs_NV.gather(1, row[len(prompt) :, None])[:, 0]

        errors = torch.tensor(answer.raw_logprobs, device=device) - expected
        gap = float((logprobs_NV.amax(-1) - expected).max())
        location = f"{name}, prompt of {len(prompt)} tokens"
        expect(gap <= GREEDY_GAP, f"{location}: a greedy token is {gap:.2g} nats less likely than the likeliest one")

        worst = max(worst, float(errors.abs().mean()))
        expect(worst <= LOGPROB_ERROR, f"{location}: log-probabilities are off by {worst:.2g} nats")
    probe.note(f"{name}, log-probability off nats", worst)


def _note_speed(probe: Probe, engine: Engine, prompt: list[int], sequences: int) -> None:
    """Notes tokens/s and ms/step of `sequences` answers to one prompt at the same time, prefill included, warm-up
    excluded.

    Raises:
        CheckFailedError: the engine refused a request.
    """
    num_tokens = probe.sized(96, rehearsal=8)

    # Captures the CUDA graph of this size.
    _answers(engine, [prompt] * sequences, 4)
    started = time.perf_counter()
    _answers(engine, [prompt] * sequences, num_tokens)
    seconds = time.perf_counter() - started

    probe.note(f"batch {sequences} tokens/s", sequences * num_tokens / seconds)
    probe.note(f"batch {sequences} ms/step", 1e3 * seconds / num_tokens)
