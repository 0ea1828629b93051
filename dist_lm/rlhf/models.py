"""The four models of RLHF, and how one rank runs them. `dist_lm/stages/rlhf/models.py` loads them.

The rank program builds all of them with `parallel.sharding.build_model` on one mesh and loads their weights. None has
dropout: nothing here gives a forward pass a dropout key.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from dist_lm.config.cluster import ParallelConfig
from dist_lm.errors import ConfigError
from dist_lm.generation.decoder import WeightStream
from dist_lm.model.quantised import quantised_matrices
from dist_lm.model.size import ADAPTERS
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.host_copies import HostCopies
from dist_lm.parallel.mesh import World, data_mesh
from dist_lm.parallel.sharding import compute_dtype, reshard
from dist_lm.parallel.values import shard_of, stream_weights
from dist_lm.rlhf.config import RlhfConfig
from dist_lm.rlhf.packed_rollouts import Dealing
from dist_lm.training.optimizer import ShardedAdamW, build_optimizer

SCALAR_HEAD = "scalar_head."

First = TypeVar("First")  # type of the result of the first of two functions
Second = TypeVar("Second")


@dataclass(frozen=True)
class Trained:
    """A model with its optimizer."""

    model: Transformer
    optimizer: ShardedAdamW


@dataclass(frozen=True)
class RlhfModels:
    """Policy and critic are trained; reference and reward model are frozen."""

    policy: Trained
    critic: Trained | None = None  # with a scalar head; None: the algorithm has no critic
    # None: no KL penalty. A policy of adapters is its own reference: the same model with the adapters switched off
    reference: Transformer | None = None
    reward: Transformer | None = None  # with a scalar head; None: all reward parts are rules


def as_reference(models: RlhfModels) -> AbstractContextManager[None]:
    """Makes `models.reference` compute as the reference inside the block, where it may be the policy itself."""
    if models.reference is not models.policy.model:
        return nullcontext()
    from dist_lm.model.lora import without_adapters

    return without_adapters(models.policy.model)


def trained(model: Transformer, config: RlhfConfig, lr: float) -> Trained:
    """Returns the model with a new optimizer at the rate `lr`."""
    # The optimizer reads its keys from the configuration, where policy and critic have different rates.
    return Trained(model, build_optimizer(model, replace(config, lr=lr)))


@torch.no_grad()
def start_critic(critic: Transformer, source: Transformer, head: str) -> None:
    """Copies the trunk of the reward model or of the policy, of the same shape and layout, into a critic, in place.

    Adapters of the critic stay as they are. Afterwards all parameters are sharded again.

    Args:
        head: zero (all values start at 0: Huang et al. 2024, detail 6) | reward_model (the head of `source`).

    Raises:
        ConfigError: `source` has no such head, or has another shape; a part of the critic may have been copied.
    """
    # Parameters gathered by an earlier forward pass are not the shards that are copied here.
    for model in (critic, source):
        reshard(model)

    trunk = dict(source.named_parameters())
    if critic.config.is_in_4bit:
        bits = quantised_matrices(source)
        for name, matrix in quantised_matrices(critic).items():
            if name in bits:
                matrix.copy(bits[name])
            else:
                matrix.quantise(shard_of(trunk[name]).cpu())  # a reward model is whole on every rank

    for name, parameter in critic.named_parameters():
        # Adapters begin as they are: they add nothing to the trunk yet.
        if ADAPTERS in name:
            continue
        if name.startswith(SCALAR_HEAD) and head == "zero":
            shard_of(parameter).zero_()
        elif name not in trunk:
            raise ConfigError("rlhf.value_head=reward_model: expected zero, as there is no reward model")
        elif trunk[name].shape != parameter.shape:
            raise ConfigError(
                f"a critic whose {name} has shape {tuple(parameter.shape)} cannot start from a model where it has "
                f"shape {tuple(trunk[name].shape)}: reward model and policy must have the same shape"
            )
        else:
            shard_of(parameter).copy_(shard_of(trunk[name]))


def sent_weights(model: Transformer, parallel: ParallelConfig, world: World) -> WeightStream:
    """Returns a stream of a model's whole weights in the engine's dtype, by name; tensors arrive on the first rank only
    (collective).

    This call shards all parameters again, and frees cached memory of a GPU. The stream gathers a parameter when it is
    read, so every rank must read it to its end.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
    """
    reshard(model)
    # An engine in another process may use the same card next.
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return stream_weights(model, model.config, compute_dtype(parallel, world.device), receives=world.is_first)


@contextmanager
def optimizers_away(optimizers: Iterable[torch.optim.Optimizer], copies: HostCopies) -> Iterator[None]:
    """Moves the state of optimizers on a GPU to the host inside the block. State in host memory stays."""
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    shards = [shard_of(value) for value in states if isinstance(value, torch.Tensor)]
    copies.move(shard for shard in shards if shard.device.type == "cuda")
    if copies.n_bytes:
        torch.cuda.empty_cache()  # to the process that generates
    try:
        yield
    finally:
        copies.restore()


# --- how a rank runs them ---


class RunBoth(Protocol):
    """Runs two independent functions and returns both results."""

    def __call__(self, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]: ...


def one_after_other(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """Runs `first`, then `second`."""
    return first(), second()


@contextmanager
def own_threads(world: World) -> Iterator[RunBoth]:
    """Yields a function that runs the work of policy and critic. On a single rank on a CPU both run at the same time,
    each on half of the threads; otherwise one after the other.

    Two small models on one thread each are faster than each of them in turn on two threads. With several ranks, or on a
    GPU, they run one after the other: both models would communicate at the same time, and a GPU serialises them anyway.

    An error of either function is raised after both have ended; if both fail, that of the first, with a note about the
    second.
    """
    threads = torch.get_num_threads()
    # Collectives of two models at the same time could meet in another order on another rank.
    if world.size > 1 or world.device.type != "cpu" or threads < 2:
        yield one_after_other
        return

    with ThreadPoolExecutor(1, "second model") as second_thread:

        def run_both(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
            """Runs `second` in the thread and `first` in this one, and returns both results after both have ended."""
            torch.set_num_threads(threads // 2)  # each function computes with that many
            future = second_thread.submit(second)
            try:
                first_result = first()
            except BaseException as error:
                if second_error := future.exception():
                    error.add_note(f"the function beside it failed too: {second_error!r}")
                raise
            finally:
                # The second function must not run on while an error of the first propagates.
                wait([future])
                torch.set_num_threads(threads)
            return first_result, future.result()

        yield run_both


@dataclass(frozen=True)
class Execution:
    """The models of a run as one rank runs them."""

    config: RlhfConfig
    models: RlhfModels
    device: torch.device
    dealing: Dealing
    adds_sums: bool  # whether this rank adds its sums: one of the ranks that see the same rollouts does
    reduce_every_micro_batch: bool
    alive: Callable[[], None]  # called before every forward pass and update, from any thread
    run_both: RunBoth
    scoring: Callable[[float], None] = lambda done: None  # called before forward passes with the share that is done


def dealing(mesh: DeviceMesh, parallel: ParallelConfig, micro_batch_tokens: int) -> Dealing:
    """Returns how the ranks of the mesh divide rollouts among themselves, as this rank sees it."""
    ranks = data_mesh(mesh)
    multiple = mesh["tp"].size() if parallel.sp else 1  # sequence parallelism splits a row among the ranks of tp
    return Dealing(micro_batch_tokens, ranks.get_local_rank(), ranks.size(), multiple)
