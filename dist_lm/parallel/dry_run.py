"""What a run would hold, from arithmetic alone: nothing is allocated and nothing is started."""

import math
from dataclasses import dataclass

from dist_lm.config import Config
from dist_lm.model.size import flops_per_token, parameter_count, parameter_shapes
from dist_lm.parallel.layout import Layout, shard_dim

FP32_BYTES = 4


@dataclass(frozen=True)
class RankEstimate:
    """Bytes the rank with the largest shards holds for the whole of training, and what a step asks of it."""

    parameters: int  # fp32 master weights, its shards
    gradients: int  # fp32: its shards, or all of them while micro-batches add up before they are reduced
    optimizer: int  # two fp32 moments, its shards
    gathered: int  # parameters outside the blocks, which stay gathered, and those of one block, in the compute dtype
    micro_batches: int
    sequences_a_step: int
    flops_a_step: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.gathered


def estimate(config: Config, layout: Layout, compute_bytes: int) -> RankEstimate:
    """What a rank of `layout` would hold and do; activations are not part of it.

    Args:
        compute_bytes: of one element in the forward and backward pass.
    """
    shapes = parameter_shapes(config.model)
    own = sum(largest_shard(shape, layout.dp_shard) for shape in shapes.values())
    block = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("blocks.0."))
    outside = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("blocks."))
    sequences = config.stage.global_batch // layout.dp
    micro_batches = -(-sequences // config.stage.micro_batch)
    accumulates = micro_batches > 1 or layout.dp_shard == 1
    return RankEstimate(
        parameters=own * FP32_BYTES,
        gradients=(parameter_count(config.model) if accumulates else own) * FP32_BYTES,
        optimizer=2 * own * FP32_BYTES,
        gathered=0 if layout.dp_shard == 1 else (outside + block) * compute_bytes,
        micro_batches=micro_batches,
        sequences_a_step=sequences,
        flops_a_step=sequences * config.stage.seq_len * flops_per_token(config.model, config.stage.seq_len),
    )


def largest_shard(shape: tuple[int, ...], ranks: int) -> int:
    """Elements of the largest part when FSDP cuts a parameter over `ranks`."""
    dim = shard_dim(shape, ranks)
    return math.prod(shape) // shape[dim] * -(-shape[dim] // ranks)


def describe(config: Config, layout: Layout, compute_bytes: int) -> list[tuple[str, str]]:
    """(what, how much) for people."""
    rank = estimate(config, layout, compute_bytes)
    count = parameter_count(config.model)
    whole = "whole, while micro-batches add up" if rank.micro_batches > 1 and layout.dp_shard > 1 else "fp32"
    return [
        ("model", f"{config.model.name}, {count:,} parameters ({readable_count(count)})"),
        ("layout", f"{layout} on {layout.world_size} ranks"),
        ("a rank holds", f"{_gib(rank.total)} GiB for the whole run, activations apart"),
        ("  parameters", f"{_gib(rank.parameters)} GiB (fp32)"),
        ("  gradients", f"{_gib(rank.gradients)} GiB ({whole})"),
        ("  optimizer", f"{_gib(rank.optimizer)} GiB (two fp32 moments)"),
        ("  gathered", f"{_gib(rank.gathered)} GiB (embedding, head and one block)"),
        (
            "a step",
            f"{config.stage.global_batch} sequences of {config.stage.seq_len} tokens; a rank takes "
            f"{rank.sequences_a_step} in {rank.micro_batches} micro-batches, {rank.flops_a_step / 1e12:.2f} TFLOP",
        ),
    ]


def readable_count(count: int) -> str:
    """1,087,000,000 -> `1.09 B`."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
