"""Every stage gives its model documents that begin as its tokenizer begins them."""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_lm.data.batch import Batch
from dist_lm.prepare.compose import compose_config
from dist_lm.stages import text
from dist_lm.stages.reward import ranks as reward_ranks
from dist_lm.stages.rlhf.prompts import read_all
from dist_lm.storage.run_directory import WorkDirectory
from dist_lm.tokenizer.tokenizer import FirstToken, Tokenizer
from tests.conftest import tiny
from tests.data.rankings.made_rankings import random_rankings
from tests.data.synthetic_corpus import write


@pytest.fixture
def tokenizer(tiny_work: WorkDirectory) -> Tokenizer:
    """One that opens texts with another token: a special one that stands nowhere else."""
    found = Tokenizer.load(tiny_work.tokenizer_model)
    found.first_token = FirstToken(found.eot_id, found.mark_id("<|file_sep|>"))
    return found


@pytest.fixture
def with_rankings(work: WorkDirectory, tokenizer: Tokenizer) -> WorkDirectory:
    documents = random_rankings(30)
    for document in documents:
        document.tokens[document.tokens == tokenizer.eot_id] = 20
        document.tokens[0] = tokenizer.eot_id
    write(work.corpus("rankings"), documents[:20], documents[20:], vocab_size=tokenizer.vocab_size)
    return work


def data_arguments(work: WorkDirectory, tokenizer: Tokenizer, stage: str, *overrides: str) -> Any:
    config = compose_config([f"stage={stage}", *tiny(stage), f"work_dir={work.path}", *overrides])
    return SimpleNamespace(
        config=config,
        run=work.run(stage, "any"),
        tokenizer=tokenizer,
        world=SimpleNamespace(device=torch.device("cpu"), is_first=True),
        data_ranks=None,
        dp_rank=0,
        dp_size=1,
        position=0,
    )


def check(batches: Iterable[Batch], tokenizer: Tokenizer) -> None:
    tokens = torch.cat([batch.tokens_BT.flatten() for batch in batches])
    assert (tokens == tokenizer.first_token.id).any()
    assert not (tokens == tokenizer.eot_id).any()


def caught(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, result: Any) -> list[Any]:
    """The batches that a function of `module` is called with."""
    found: list[Any] = []

    def catch(_model: Any, batches: Iterable[Any], *_: Any) -> Any:
        found.extend(batches)
        return result

    monkeypatch.setattr(module, name, catch)
    return found


@pytest.mark.parametrize("stage", ["code", "tools"])
def test_texts_and_conversations(stage: str, tiny_work: WorkDirectory, tokenizer: Tokenizer, monkeypatch) -> None:
    from dist_lm.training import objective

    opened = data_arguments(tiny_work, tokenizer, stage)
    with text.open_stream(opened) as stream:
        check(next(stream).micro_batches, tokenizer)
    found = caught(monkeypatch, objective, "summed_losses", torch.ones(9, 3, dtype=torch.float64))
    monkeypatch.setattr(objective, "loss_metrics", lambda *_: {})
    monkeypatch.setattr(objective, "mixed_metrics", lambda *_: {})
    text.evaluator(opened)(None, False, lambda: None)  # type: ignore[arg-type]
    check([one.batch for one in found], tokenizer)


def test_rankings(with_rankings: WorkDirectory, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = reward_ranks.open_data(data_arguments(with_rankings, tokenizer, "reward"))
    with data.stream as stream:
        check(next(stream).micro_batches, tokenizer)
    found = caught(monkeypatch, reward_ranks, "scores_of_rankings", {})
    monkeypatch.setattr(reward_ranks, "scored_rankings", lambda *_: [])
    monkeypatch.setattr(reward_ranks, "reward_metrics", lambda *_: {})
    evaluate: Callable[..., Any] = data.evaluate
    evaluate(None, False, lambda: None)
    check([batch for batch, _ in found], tokenizer)


@pytest.mark.parametrize("corpus", ["tools", "rankings"])
def test_prompts_of_rlhf(corpus: str, with_rankings: WorkDirectory, tokenizer: Tokenizer) -> None:
    settings = ("rlhf.pool.cache_tokens=4096", f"stage.corpus={corpus}", "rlhf.max_new_tokens=16")
    opened = data_arguments(with_rankings, tokenizer, "rlhf", *settings)
    for prompts in read_all(opened.config, opened.run, tokenizer):
        assert prompts
        assert all(prompt[0] == tokenizer.first_token.id for prompt in prompts)
