"""An RLHF iteration at the widths of `large` on fake CUDA tensors: forward passes of four models, updates of two."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_lm.data.batch import Batch
from dist_lm.dry_run.watch import ANSWER
from dist_lm.parallel.host_copies import HostCopies
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import axis_of_group, build_mesh
from dist_lm.parallel.sharding import RECOMPILATIONS, arrange_model, materialise
from dist_lm.parallel.values import shard_of
from dist_lm.prepare.compose import compose_config
from dist_lm.rlhf import experience, packed_rollouts
from dist_lm.rlhf.algorithms.ppo import Ppo
from dist_lm.rlhf.experience import collect
from dist_lm.rlhf.learner import Updater
from dist_lm.rlhf.models import Execution, RlhfModels, dealing, one_after_other, optimizers_away, trained
from dist_lm.rlhf.packed_rollouts import Passes
from dist_lm.rlhf.rollouts import FINISHES, Rollouts
from dist_lm.rlhf.state import KlController, RlhfState
from dist_lm.stages.rlhf.config import RlhfRunConfig
from dist_lm.training.heartbeat import StopRequest
from tests.cuda.card import CARD, Traffic, empty_on_card, stand_in

pytestmark = pytest.mark.cuda

RANKS = 8
SETTINGS = (
    *("stage=rlhf", "model=large", "model.n_layers=2", "hardware=h100", "device=cuda", "parallel=fsdp"),
    *("rlhf.epochs=1", "rlhf.minibatches=2", "rlhf.micro_batch_tokens=2048"),
)
LENGTHS = ((300, 500), (200, 640))  # tokens of the longest prompt and completion of each iteration


@dataclass
class Run:
    """The learner's parts on rank 0 of a world of ranks that are not there."""

    config: RlhfRunConfig
    execution: Execution
    axes: dict[str, str]

    def iteration(self, number: int, watched: bool = False) -> Traffic:
        """Forward passes and updates; `watched`: eagerly, with a count of what the updates ask."""
        with unset_fake_temporarily():
            drawn = rollouts(number)
        config, run = self.config.rlhf, self.execution
        passes = Passes(drawn, run.dealing, CARD, seed=0, iteration=number, minibatches=config.minibatches)
        traffic = Traffic(self.axes)
        first = [batch for minibatch in passes(0) for batch in minibatch.batches]
        collected = collect(run, drawn, {}, first, None, number)
        prepared = Ppo(config).prepare(collected.experience, config.kl_coefficient)
        updater = Updater(run, Ppo(config), StopRequest())
        state = RlhfState(KlController(config.kl_coefficient), iteration=number)
        with torch.enable_grad(), traffic if watched else nullcontext():
            updates = updater(state, prepared, passes)
        assert len(updates.metrics) == config.epochs * config.minibatches
        return traffic


def rollouts(number: int, count: int = 24) -> Rollouts:
    """Rollouts of many lengths."""
    longest_prompt, longest_new = LENGTHS[number]
    draw = np.random.default_rng(number)
    prompt_B, new_B = (draw.integers(9, most + 1, count) for most in (longest_prompt, longest_new))
    prompt_B[0], new_B[0] = longest_prompt, longest_new
    return Rollouts(
        tokens_N=draw.integers(1, 32000, prompt_B.sum() + new_B.sum()),
        logprobs_M=-draw.random(new_B.sum(), np.float32),
        prompt_tokens_B=prompt_B,
        new_tokens_B=new_B,
        finish_B=np.full(count, FINISHES.index("eot")),
        version_B=np.zeros(count, np.int64),
        position_B=np.arange(count),
        sample_B=np.zeros(count, np.int64),
    )


@pytest.fixture(autouse=True)
def numbers(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Fake tensors have a number for those who ask, without a mode, which would keep the compiler out. Counts them."""
    asked: Counter[str] = Counter()

    def number(tensor: FakeTensor) -> float:
        asked[tensor.device.type] += 1
        return ANSWER

    monkeypatch.setattr(FakeTensor, "__float__", number)
    monkeypatch.setattr(FakeTensor, "__bool__", lambda tensor: bool(number(tensor)))
    monkeypatch.setattr(FakeTensor, "item", number)
    return asked


@pytest.fixture(autouse=True)
def batches_with_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches are made on the host with values, as boundaries of documents need them."""

    def with_values(make: Callable[..., list[Batch]]) -> Callable[..., list[Batch]]:
        def made(*args: Any) -> list[Batch]:
            with unset_fake_temporarily():
                return [batch.pin_memory() for batch in make(*args)]

        return made

    for module, name in ((packed_rollouts, "rollout_batches"), (experience, "scoring_batches")):
        monkeypatch.setattr(module, name, with_values(getattr(module, name)))


@contextmanager
def run_of(*overrides: str) -> Iterator[Run]:
    """Policy, critic, reference and reward model on a mesh of `RANKS` ranks."""
    config = compose_config([*SETTINGS, *overrides])
    assert isinstance(config, RlhfRunConfig)
    scored = replace(config.model, head="scalar")
    with unset_fake_temporarily(), torch.no_grad():
        dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
        try:
            mesh = build_mesh(resolve_layout(config.parallel, config.model, RANKS), CARD)
            shares = dealing(mesh, config.parallel, config.rlhf.micro_batch_tokens)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "empty", empty_on_card)
                policy, reference, critic, reward = (
                    arrange_model(shape, config.parallel, mesh, CARD, exchange=False, frozen=frozen)
                    for shape, frozen in ((config.model, False), (config.model, True), (scored, False), (scored, True))
                )
            with FakeTensorMode(allow_non_fake_inputs=True):
                for model in (policy, reference, critic, reward):
                    materialise(model, config.parallel, CARD)
                models = RlhfModels(
                    policy=trained(policy, config.rlhf, config.rlhf.lr),
                    critic=trained(critic, config.rlhf, config.rlhf.value_lr),
                    reference=reference,
                    reward=reward,
                )
                execution = Execution(
                    config=config.rlhf,
                    models=models,
                    device=CARD,
                    dealing=shares,
                    adds_sums=True,
                    reduce_every_micro_batch=config.parallel.reduce_every_micro_batch,
                    alive=lambda: None,
                    run_both=one_after_other,
                )
                yield Run(config, execution, axis_of_group(mesh))
        finally:
            dist.destroy_process_group()


def bytes_on_card(models: RlhfModels) -> int:
    """The memory of the moments of policy and critic."""
    assert models.critic
    states = [*models.policy.optimizer.state.values(), *models.critic.optimizer.state.values()]
    return sum(shard_of(tensor).untyped_storage().nbytes() for state in states for tensor in state.values())


def test_no_model_of_an_iteration_reaches_the_recompile_limit(graphs):
    with run_of("parallel.compile=always") as run:
        run.iteration(0)
    assert 8 < len(graphs) <= 4 * RECOMPILATIONS  # 8: the default limit of the compiler, for all models together


def test_state_is_on_the_card_and_updates_hardly_wait(monkeypatch):
    explicit = stand_in(monkeypatch)
    with run_of("parallel.compile=never", "rlhf.epochs=2") as run:
        run.iteration(0)
        models = run.execution.models
        assert models.critic

        # While an engine draws, the moments are on the host; the next updates find them on the card.
        copies = HostCopies()
        with monkeypatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
            patch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # host memory of fake tensors is not locked
            for _ in range(2):
                with optimizers_away([models.policy.optimizer, models.critic.optimizer], copies):
                    shards = [shard_of(p) for m in (models.policy, models.critic) for p in m.model.parameters()]
                    n_elements = sum(shard.numel() for shard in shards)
                    assert copies.n_bytes >= 2 * 4 * n_elements
                    assert not bytes_on_card(models)
        assert bytes_on_card(models)
        explicit.clear()
        traffic = run.iteration(1, watched=True)
        for one in (models.policy, models.critic):
            state = [tensor for moments in one.optimizer.state.values() for tensor in moments.values()]
            assert {shard_of(tensor).device.type for tensor in [*one.model.parameters(), *state]} == {"cuda"}
    assert explicit == {"tolist": 2 * 4}  # one for each update of policy and critic
    assert not traffic.waits
    assert set(traffic.uploads) == {"pinned"}
