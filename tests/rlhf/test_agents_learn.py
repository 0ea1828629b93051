"""GRPO over several turns: an agent repairs more programs and serves more errands that no training has seen."""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_lm.chat.messages import Conversation
from dist_lm.chat.template import layout, render
from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.corpus import TokenizerConfig
from dist_lm.config.model import ModelConfig
from dist_lm.data.batch import Batch
from dist_lm.demo import errands, repairs
from dist_lm.environments.host import Host
from dist_lm.environments.protocol import Limits, Task
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.model.transformer import Transformer
from dist_lm.rlhf.config import RewardPartConfig, RlhfConfig
from dist_lm.rlhf.conversation_loop import ConversationLoop
from dist_lm.rlhf.environment_rollouts import EnvironmentJudge, EnvironmentSupply, VersionedSource
from dist_lm.rlhf.learner import IterationReport
from dist_lm.rlhf.models import sent_weights, trained
from dist_lm.rlhf.rollouts import EngineRollouts, Rollouts, ShuffledPrompts
from dist_lm.tokenizer.tokenizer import Tokenizer
from dist_lm.tokenizer.train import train_tokenizer
from dist_lm.training.objective import next_token
from tests.rlhf.toy import MODEL, WORLD, Toy, supply_in, toy, with_supply

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.bars, pytest.mark.timeout(7200)]

NANO = replace(MODEL, d_model=160, n_layers=4, n_heads=5, d_ff=640, init_std=0.02)  # conf/model/nano
AT_ONCE = 64  # conversations
SAMPLES = 2  # of each held-out task
RATE = 2e-3  # of supervised steps
ROWS = 16  # of a supervised step
START = 0.3  # reward on CHECKED tasks at which supervised training ends
CHECKED = 64
CHECK_EVERY = 5  # supervised steps
GRPO = RlhfConfig(
    algorithm="grpo",
    prompts=16,
    samples=8,
    max_new_tokens=40,
    minibatches=4,
    warmup_iterations=2,
    min_lr_ratio=0.25,
    kl_coefficient=0.0,
    missing_eos_penalty=0.0,
    rewards={"environment": RewardPartConfig(kind="environment")},
)


@dataclass(frozen=True)
class Course:
    """What an agent learns: an environment, its tasks, and conversations to begin with."""

    environment: str
    tasks: Callable[[int, Any], Sequence[Task]]  # (seed, part) -> the tasks of a part
    conversations: Callable[[int], Sequence[Conversation]]  # seed -> conversations to begin with
    vocabulary: int  # pieces of the tokenizer
    context: int  # tokens of the longest conversation
    limits: Limits
    loss: float  # nats a token of supervised training above which no agent succeeds, so that none is tried
    iterations: int
    lr: float


def errand_tasks(seed: int, part: Any) -> list[Task]:
    rows = errands.tasks(seed, part, errands.SIZES[part])
    return [Task.of(f"{part} {number}", row) for number, row in enumerate(rows)]


def repair_tasks(seed: int, part: Any) -> list[Task]:
    made = repairs.tasks(seed, part, repairs.SIZES[part])
    return [Task.of(f"{part} {number}", repair.fields) for number, repair in enumerate(made)]


ERRANDS = Course(
    "dist_lm.demo.errands:Errands",
    errand_tasks,
    lambda seed: errands.examples(seed, errands.SIZES["examples"]),
    vocabulary=900,
    context=320,
    limits=Limits(turns=6, tokens=300),
    loss=0.13,
    iterations=16,
    lr=4e-4,  # at 8e-4 the first updates broke the form of answers: 0.47 -> 0.09
)
REPAIRS = Course(
    "code_repair",
    repair_tasks,
    lambda seed: repairs.conversations(seed, repairs.SIZES["solved"]),
    vocabulary=640,
    context=192,
    limits=Limits(turns=4, tokens=180),
    loss=0.42,
    iterations=24,
    lr=8e-4,
)


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has started and that have ended."""
    return sum(os.times()[:4])


def tokenizer_of(conversations: Sequence[Conversation], size: int, path: Path) -> Tokenizer:
    """A tokenizer that knows the words of a course, and no more: conversations become short."""
    texts = ["".join(part.text for part in layout(one) if not part.is_mark) for one in conversations[:300]]
    config = TokenizerConfig(vocab_size=size, split_by_unicode_script=False, max_piece_length=128)
    train_tokenizer(texts, path, config)
    return Tokenizer.load(path)


def batch_of(conversations: Sequence[Conversation], tokenizer: Tokenizer) -> Batch:
    """Conversations as rows, of which the turns of the assistant are learned."""
    rows = [render(one, tokenizer) for one in conversations]
    width = max(len(row.tokens) for row in rows)
    tokens_BT = torch.full((len(rows), width), tokenizer.eot_id)
    learned_BT = torch.zeros(len(rows), width)
    for number, row in enumerate(rows):
        tokens_BT[number, : len(row.tokens)] = torch.from_numpy(row.tokens.astype(np.int64))
        learned_BT[number, : len(row.tokens)] = torch.from_numpy(row.loss_mask.astype(np.float32))
    plain = Batch.plain(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous())
    return replace(plain, loss_mask_BT=learned_BT[:, 1:].contiguous(), n_tokens=plain.tokens_BT.numel())


def learn_the_form(agent: Toy, course: Course, conversations: Sequence[Conversation], seed: int) -> int:
    """Supervised steps until the agent succeeds at times on tasks to train on; their number."""
    supply = supply_in(agent)
    policy = trained(agent.learner.models.policy.model, GRPO, RATE)
    objective, order = next_token(), np.random.default_rng(seed)
    losses: list[float] = []
    while True:
        chosen = order.choice(len(conversations), ROWS, replace=False)
        batch = batch_of([conversations[number] for number in chosen], supply.tokenizer)
        loss = objective(policy.model, batch.to(WORLD.device))
        policy.optimizer.zero_grad()
        (loss.total / loss.count).backward()
        policy.optimizer.step()
        losses.append(float(loss.total.detach() / loss.count))

        is_time = len(losses) % CHECK_EVERY == 0 and sum(losses[-CHECK_EVERY:]) < CHECK_EVERY * course.loss
        if is_time and mean_reward(drawn(agent, course.tasks(seed, "train")[:CHECKED], 1, seed)) >= START:
            return len(losses)


def engine_for(model: ModelConfig, eot_id: int) -> EngineRollouts:
    pages = -(-model.max_seq_len // 64)
    options = EngineOptions(
        cache_tokens=2 * pages * AT_ONCE * 64, page_tokens=64, max_sequences=AT_ONCE, prefix_cache=True
    )
    return EngineRollouts(Engine(model, Transformer(model).state_dict(), eot_id=eot_id, options=options))


def agent_of(
    course: Course, tokenizer: Tokenizer, config: RlhfConfig, iterations: int, seed: int, stack: ExitStack, folder: Path
) -> Toy:
    """A policy that acts in the environment of a course, with the parts that stage rlhf gives it."""
    model = replace(NANO, vocab_size=tokenizer.vocab_size, max_seq_len=course.context)
    source = partial(engine_for, model, tokenizer.eot_id)
    agent = toy(config, iterations, seed=seed, model=model, reference=False, source=source)
    supply = EnvironmentSupply(
        VersionedSource(supply_in(agent).source),
        ShuffledPrompts(course.tasks(seed, "train"), seed),
        EnvironmentJudge(course.environment, "environment", config.max_failed_fraction),
        tokenizer,
        stack.enter_context(ConversationLoop(partial(Host, course.environment, course.limits))),
        course.limits,
        model.max_seq_len,
        at_once=AT_ONCE,
        folder=folder,
    )
    with_supply(agent, supply)
    report = agent.learner.report

    def told(one: IterationReport) -> None:
        report(one)
        print(f" {one.metrics['rlhf/score_mean']:.2f}", end="", flush=True)

    agent.learner = replace(agent.learner, report=told)
    return agent


def drawn(agent: Toy, tasks: Sequence[Task], samples: int, seed: int) -> Rollouts:
    """Conversations about tasks, held by the policy as it is."""
    supply = replace(supply_in(agent), folder=None)
    supply.source.load_weights(sent_weights(agent.learner.models.policy.model, ParallelConfig(), WORLD), -2)
    return supply.draw(tasks, 0, samples, GRPO, seed + 1)


def mean_reward(rollouts: Rollouts) -> float:
    assert (rollouts.failure_B < 0).all()
    return float(rollouts.reward_B.mean())


def learn(course: Course, seed: int, folder: Path) -> tuple[float, float]:
    """Held-out reward before and after GRPO."""
    began = cpu_seconds()
    conversations, held_out = course.conversations(seed), course.tasks(seed, "held_out")
    tokenizer = tokenizer_of(conversations, course.vocabulary, folder / "tokenizer.model")
    rewards = []
    with ExitStack() as stack:
        config = replace(GRPO, lr=course.lr)
        agent = agent_of(course, tokenizer, config, course.iterations, seed, stack, folder / "conversations")

        def measure() -> None:
            rollouts = drawn(agent, held_out, SAMPLES, seed)
            rewards.append(mean_reward(rollouts))
            told = f"held-out reward {rewards[-1]:.3f}, {rollouts.turns_B.mean():.2f} turns"
            print(f" {told}, {cpu_seconds() - began:.0f} CPU s;", end="", flush=True)

        steps = learn_the_form(agent, course, conversations, seed)
        print(f"\nseed {seed}: {steps} steps,", end="")
        measure()
        agent.run()
        measure()
    print(f" {cpu_seconds() - began:.0f} with processes that have ended")
    return rewards[0], rewards[1]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_agent_repairs_a_fifth_more_programs(seed: int, tmp_path: Path):
    """Finds output of tests that does not reach the model, or second turns that are not learned."""
    before, after = learn(REPAIRS, seed, tmp_path)
    assert before > 0.02
    assert after - before >= 0.2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_agent_with_tools_serves_a_fifth_more_errands(seed: int, tmp_path: Path):
    """Finds results of tools that do not reach the model, or turns after an error that are not learned."""
    before, after = learn(ERRANDS, seed, tmp_path)
    assert before > 0.02
    assert after - before >= 0.2
