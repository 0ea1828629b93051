"""What a run would hold, from arithmetic alone: nothing is allocated and nothing is started."""

from dataclasses import dataclass

from dist_lm.config import Config
from dist_lm.model.size import flops_per_token, parameter_count
from dist_lm.parallel.layout import Layout

FP32_BYTES, BF16_BYTES = 4, 2


@dataclass(frozen=True)
class RankEstimate:
    """Bytes one rank holds for the whole of training, and what a step asks of it."""

    parameters: int  # fp32 master weights, its shard
    gradients: int  # fp32, its shard
    optimizer: int  # two fp32 moments, its shard
    sequences_a_step: int
    flops_a_step: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def estimate(config: Config, layout: Layout) -> RankEstimate:
    """What a rank of `layout` would hold and do; activations are not part of it."""
    shard = -(-parameter_count(config.model) // layout.dp_shard)
    sequences = config.stage.global_batch // layout.dp
    tokens = sequences * config.stage.seq_len
    return RankEstimate(
        parameters=shard * FP32_BYTES,
        gradients=shard * FP32_BYTES,
        optimizer=2 * shard * FP32_BYTES,
        sequences_a_step=sequences,
        flops_a_step=tokens * flops_per_token(config.model, config.stage.seq_len),
    )


def describe(config: Config, layout: Layout) -> list[tuple[str, str]]:
    """(what, how much) for people."""
    rank = estimate(config, layout)
    micro_batches = -(-rank.sequences_a_step // config.stage.micro_batch)
    count = parameter_count(config.model)
    return [
        ("model", f"{config.model.name}, {count:,} parameters ({readable_count(count)})"),
        ("layout", f"{layout} on {layout.world_size} ranks"),
        ("a rank holds", f"{_gib(rank.total)} GiB for the whole run, activations apart"),
        ("  parameters", f"{_gib(rank.parameters)} GiB (fp32)"),
        ("  gradients", f"{_gib(rank.gradients)} GiB (fp32)"),
        ("  optimizer", f"{_gib(rank.optimizer)} GiB (two fp32 moments)"),
        (
            "a step",
            f"{config.stage.global_batch} sequences of {config.stage.seq_len} tokens; a rank takes "
            f"{rank.sequences_a_step} in {micro_batches} micro-batches, {rank.flops_a_step / 1e12:.2f} TFLOP",
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
