"""Batched generation with the cache equals one full forward a token."""

import pytest
import torch

from dist_lm.config import ModelConfig
from dist_lm.generation.generate import PromptTooLongError, generate
from dist_lm.generation.sampling import SamplingParams, choose
from dist_lm.model.initialise import initialise
from dist_lm.model.transformer import Transformer

EOT = 1
CONFIG = ModelConfig(
    name="small",
    d_model=40,
    n_layers=2,
    n_heads=5,
    d_ff=72,
    max_seq_len=48,
    vocab_size=64,
    init_std=0.3,
)
PROMPTS = [[1, 5, 6], [], [9] * 20, [1, 2, 3, 4, 5, 6, 7, 8], [63]]
SEEDS = [3, 1 << 40, -5, 0, 3]


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG)
    initialise(model, seed=0)
    return model


@torch.inference_mode()
def plainly(model: Transformer, prompt: list[int], params: SamplingParams, seed: int) -> tuple[list[int], bool]:
    """One prompt, no cache, no batch."""
    row = prompt or [EOT]
    start = len(row)
    while len(row) < start + params.max_new_tokens and len(row) < CONFIG.max_seq_len:
        logits = model(torch.tensor([row]))[:, -1]
        token = int(choose(logits, params, torch.tensor([seed]), torch.tensor([len(row)]))[0])
        if token == EOT:
            return row[start:], True
        row = [*row, token]
    return row[start:], False


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=12, temperature=0),
        SamplingParams(max_new_tokens=100, temperature=1.0),
        SamplingParams(max_new_tokens=12, temperature=0.8, top_k=10, top_p=0.9),
    ],
    ids=["greedy", "to the end of the context", "filtered"],
)
def test_equals_plain_decoding(model: Transformer, params: SamplingParams) -> None:
    completions = generate(model, PROMPTS, params, eot_id=EOT, seeds=SEEDS)
    expected = [plainly(model, prompt, params, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert [(c.tokens, c.finished) for c in completions] == expected


def test_a_row_does_not_depend_on_the_batch(model: Transformer) -> None:
    params = SamplingParams(max_new_tokens=20, temperature=1.2)
    together = generate(model, PROMPTS, params, eot_id=EOT, seeds=SEEDS)
    for index in (4, 1):
        alone = generate(model, [PROMPTS[index]], params, eot_id=EOT, seeds=[SEEDS[index]])[0]
        assert alone.tokens == together[index].tokens
        assert alone.logprobs == pytest.approx(together[index].logprobs, abs=1e-4)


def test_end_of_text_ends_a_row_and_all_rows_end_the_loop(model: Transformer) -> None:
    """With every token an end of text, one choice is made and no further forward."""
    params = SamplingParams(max_new_tokens=30, temperature=0)
    first = generate(model, [[5]], params, eot_id=EOT, seeds=[0])[0].tokens[0]
    lengths: list[int] = []
    handle = model.embedding.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    ended = generate(model, [[5], [5]], params, eot_id=first, seeds=[0, 1])
    handle.remove()
    assert lengths == [1]
    assert all(c.finished and c.tokens == [] and len(c.logprobs) == 1 for c in ended)


def test_logprobs_are_those_of_a_full_forward(model: Transformer) -> None:
    params = SamplingParams(max_new_tokens=10, temperature=0.7)
    prompt = [1, 5, 6]
    completion = generate(model, [[9] * 9, prompt], params, eot_id=EOT, seeds=[0, 1])[1]
    followed = completion.tokens + [EOT] * completion.finished
    row = torch.tensor([prompt + followed])
    logprobs = (model(row)[0].detach() / 0.7).log_softmax(-1)
    expected = [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(followed)]
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_computes_each_token_once(model: Transformer) -> None:
    """The cost of n tokens is O(n): the prompt once, then one token a row a forward."""
    lengths: list[int] = []
    handle = model.embedding.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    generate(model, [[5] * 10, [6]], SamplingParams(max_new_tokens=8, temperature=0), eot_id=0, seeds=[0, 0])
    handle.remove()
    assert lengths[0] == 10
    assert set(lengths[1:]) <= {1}
    assert len(lengths) <= 8


def test_prompt_that_fills_the_context(model: Transformer) -> None:
    with pytest.raises(PromptTooLongError, match=r"prompt 1 has 48 tokens and model\.max_seq_len is 48"):
        generate(model, [[1], [1] * 48], SamplingParams(), eot_id=EOT, seeds=[0, 0])
    longest = generate(model, [[1] * 47], SamplingParams(temperature=0), eot_id=-1, seeds=[0])[0]
    assert len(longest.tokens) == 1


def test_no_prompts(model: Transformer) -> None:
    assert generate(model, [], SamplingParams(), eot_id=EOT, seeds=[]) == []
