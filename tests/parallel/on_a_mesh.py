"""The same training on the ranks of a mesh, in two micro-batches a step, by the parts a run is made of."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from dist_lm.config.cluster import ParallelConfig
from dist_lm.config.model import ModelConfig
from dist_lm.config.stage import MuonConfig
from dist_lm.model.quantised import quantised_matrices
from dist_lm.model.size import Shape, neuron_shape, parameter_shapes
from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import World, adds_sums, build_mesh, data_mesh
from dist_lm.parallel.sharding import build_model, reshard
from dist_lm.parallel.values import fill, shard_of, unsharded_copy
from dist_lm.training import checkpoint, checkpoint_saver
from dist_lm.training.heartbeat import StopRequest
from dist_lm.training.muon import Arithmetic
from dist_lm.training.optimizer import VARIANCE, build_optimizer, named_state
from dist_lm.training.state import TrainState
from dist_lm.training.step import accumulate_gradients, update
from tests.parallel.training_task import (
    SEED,
    STAGE,
    Arrays,
    Tensors,
    Trajectory,
    batch_of,
    dropout_key,
    gradients,
    objective_of,
    parameter_value,
    parameters_and_moments,
    rows,
    trained_tokens_of,
)


@dataclass
class MeshTrajectory(Trajectory):
    """What the steps left behind, with what only a mesh can get wrong."""

    start: Arrays = field(default_factory=dict)  # parameters and moments as loaded from a checkpoint
    padded: set[str] = field(default_factory=set)  # state that holds more than the logical entries
    dirty: set[str] = field(default_factory=set)  # gradients and state whose padding is not exactly zero
    torn: set[str] = field(default_factory=set)  # gradients and state of which some rank holds other bits than rank 0


def rank_steps(
    world: World,
    model_config: ModelConfig,
    parallel: ParallelConfig,
    steps: range,
    *,
    chunk_bytes: int = 0,
    load: Path | None = None,
    save: Path | None = None,
    muon: MuonConfig | None = None,
    arithmetic: Arithmetic | None = None,
    between: bool = False,
) -> MeshTrajectory:
    """`steps` on the mesh that `parallel` asks for (collective).

    Args:
        load: a checkpoint of step `steps.start`; none: the parameters of the task.
        save: a folder that gets a checkpoint of step `steps.stop`.
        muon: how matrices are stepped.
        arithmetic: how Muon shares its work; none: as on a CPU.
        between: evaluate after every step, and look at the tensors of a checkpoint.
    """
    mesh = build_mesh(resolve_layout(parallel, model_config, world.size), world.device)
    ranks, shapes = data_mesh(mesh), parameter_shapes(model_config)
    model = build_model(model_config, parallel, mesh, world.device, SEED)
    model.chunk_bytes = chunk_bytes
    model.trained_tokens = trained_tokens_of(model_config)
    optimizer = build_optimizer(model, STAGE, muon, arithmetic)
    outcome = MeshTrajectory()
    if load is None:
        fill(model, model_config, lambda name, shape: parameter_value(name, shape, model_config))
        for name, matrix in quantised_matrices(model).items():
            matrix.quantise(parameter_value(name, tuple(matrix.shape), model_config))
    else:
        assert checkpoint.load(load, model, optimizer, model_config).step == steps.start
        outcome.start = logical_arrays(parameters_and_moments(model, optimizer), shapes)
    last: Tensors = {}
    # `update` has divided and clipped the gradients by then, and drops them after
    optimizer.register_step_pre_hook(lambda *_: last.update(gradients(model)))
    for step in steps:
        own = rows(batch_of(model_config, step), slice(ranks.get_local_rank(), None, ranks.size()))
        half = len(own.sequence_B) // 2
        model.dropout = dropout_key(step, model_config)
        micro_batches = [rows(own, slice(half)), rows(own, slice(half, None))]
        sums = accumulate_gradients(model, objective_of(model_config), micro_batches, parallel.reduce_every_micro_batch)
        result = update(
            model, optimizer, sums, grad_clip=STAGE.grad_clip, adds_sums=adds_sums(mesh), stop=StopRequest()
        )
        outcome.losses.append(result.loss)
        outcome.norms.append(result.grad_norm)
        if between:
            with torch.no_grad():
                outcome.losses.append(float(model.token_losses(own).sum()))
            reshard(model)
            checkpoint.tensors_of(model, optimizer, model_config)
    optimizer.gather_variances()
    if save is not None:
        tensors = checkpoint.tensors_of(model, optimizer, model_config)
        checkpoint_saver.write(save, tensors, TrainState(step=steps.stop), model_config, world)
    end = parameters_and_moments(model, optimizer)
    outcome.gradients, outcome.end = logical_arrays(last, shapes), logical_arrays(end, shapes)
    outcome.padded = {name for name, value in end.items() if value.shape != outcome.end[name].shape}
    outcome.dirty = {f"gradient of {name}" for name in dirty(last, shapes)} | dirty(end, shapes)
    outcome.torn = {f"gradient of {name}" for name in torn(last)} | torn(end)
    return outcome


def changed_by_a_skipped_step(
    world: World, model_config: ModelConfig, parallel: ParallelConfig, muon: MuonConfig | None
) -> tuple[list[bool], list[str]]:
    """(Whether each of three steps was applied, the parameters and state of this rank that the second one changed);
    the last rank's gradients of that step are not finite (collective)."""
    mesh = build_mesh(resolve_layout(parallel, model_config, world.size), world.device)
    ranks = data_mesh(mesh)
    model = build_model(model_config, parallel, mesh, world.device, SEED)
    optimizer = build_optimizer(model, STAGE, muon)
    applied: list[bool] = []
    bits: list[Tensors] = []

    for step in range(3):
        own = rows(batch_of(model_config, step), slice(ranks.get_local_rank(), None, ranks.size()))
        sums = accumulate_gradients(model, objective_of(model_config), [own])
        if step == 1 and world.rank == world.size - 1:
            gradient = next(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
            shard_of(gradient).view(-1)[-1] = float("inf")
        result = update(
            model, optimizer, sums, grad_clip=STAGE.grad_clip, adds_sums=adds_sums(mesh), stop=StopRequest()
        )
        applied.append(result.applied)
        state = {**dict(model.named_parameters()), **dict(named_state(model, optimizer))}
        bits.append({name: shard_of(value).detach().clone() for name, value in state.items()})

    before, after = bits[:2]
    return applied, [name for name, value in before.items() if not torch.equal(value, after[name])]


def initial_weights(world: World, model_config: ModelConfig, parallel: ParallelConfig) -> Arrays:
    """The weights of a new model, as sampling gets them (collective)."""
    mesh = build_mesh(resolve_layout(parallel, model_config, world.size), world.device)
    model = build_model(model_config, parallel, mesh, world.device, SEED)
    copy = unsharded_copy(model, model_config, torch.float32)
    return {name: parameter.detach().numpy() for name, parameter in copy.named_parameters()}


def forget_graphs(world: World) -> None:
    """What earlier tests compiled on this rank is gone, and not counted."""
    torch.compiler.reset()
    counters.clear()


def compiled_graphs(world: World) -> int:
    """How many graphs torch.compile has made on this rank: none where it fell back without a word."""
    return counters["stats"]["unique_graphs"]


def cut(value: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The logical entries of a padded tensor: its first ones along each dimension."""
    return value[tuple(slice(size) for size in shape)]


def shape_of(name: str, shapes: dict[str, Shape]) -> Shape:
    """The logical shape of a parameter, a gradient or a moment."""
    if name.endswith(VARIANCE):
        parameter = name.removesuffix(f".{VARIANCE}")
        return neuron_shape(parameter, shapes[parameter])
    return shapes[name.removesuffix(".exp_avg").removesuffix(".exp_avg_sq")]


def logical_arrays(values: Tensors, shapes: dict[str, Shape]) -> Arrays:
    return {name: cut(value, shape_of(name, shapes)).numpy() for name, value in values.items()}


def dirty(values: Tensors, shapes: dict[str, Shape]) -> set[str]:
    """Names of tensors with an entry outside the logical ones that is not zero."""
    return {
        n for n, value in values.items() if value.count_nonzero() != cut(value, shape_of(n, shapes)).count_nonzero()
    }


def torn(values: Tensors) -> set[str]:
    """Names of tensors of which some rank holds other bits than rank 0 (collective)."""
    flat = torch.cat([value.flatten() for value in values.values()])
    of_first = flat.clone()
    dist.broadcast(of_first, 0)
    sizes = [value.numel() for value in values.values()]
    differs = torch.stack([part.any() for part in (flat != of_first).split(sizes)]).long()
    dist.all_reduce(differs)
    return {name for name, count in zip(values, differs.tolist(), strict=True) if count}
