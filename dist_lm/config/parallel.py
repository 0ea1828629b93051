"""The conf group `parallel`: how one model is spread over ranks."""

from dataclasses import dataclass

from dist_lm.errors import require


@dataclass
class ParallelConfig:
    """How one model is spread over ranks. -1 means all remaining ranks."""

    dp_replicate: int = 1  # replicas (DDP, or the outer axis of HSDP)
    dp_shard: int = -1  # ranks that share one copy of parameters, gradients and optimizer state (FSDP)
    tp: int = 1  # ranks that share the attention heads, the feed-forward width and the vocabulary of one layer
    sp: bool = False  # norms, dropout and residuals hold 1/tp of the tokens of a sequence (sequence parallelism)
    # free gathered parameters before the backward pass (false: gather them once a step); null: on GPUs if they do not
    # fit hardware.memory_gib for a whole step, elsewhere if over 64 MiB
    reshard_after_forward: bool | None = None
    reduce_every_micro_batch: bool = False  # reduce gradients after each micro-batch: sends more, holds only shards
    # auto (bf16 on GPUs that have it, else fp32) | fastest (bf16 on CPUs that multiply it too) | fp32 | bf16
    compute_dtype: str = "auto"
    activation_checkpointing: str = "none"  # none | selective (keep matmul and attention outputs) | full (keep inputs)
    compile: str = "auto"  # torch.compile of each block: auto (on CUDA) | always | never
    cpu_offload: bool = False  # parameters, gradients and optimizer state live in host memory
    loss_chunk_mib: int = 256  # largest block of fp32 logits; the loss takes as many tokens at a time as fit
    # choose the fastest estimated layout: sets axes that are -1, and sp, activation_checkpointing,
    # reshard_after_forward and reduce_every_micro_batch where they have their default
    auto: bool = False

    def __post_init__(self) -> None:
        for axis in ("dp_replicate", "dp_shard", "tp"):
            ranks = getattr(self, axis)
            accepted = "a positive integer, or -1 for all remaining ranks"
            require(ranks == -1 or ranks > 0, f"parallel.{axis}", ranks, accepted)

        for key, choices in (
            ("compute_dtype", ("auto", "fastest", "fp32", "bf16")),
            ("activation_checkpointing", ("none", "selective", "full")),
            ("compile", ("auto", "always", "never")),
        ):
            choice = getattr(self, key)
            require(choice in choices, f"parallel.{key}", choice, f"{', '.join(choices[:-1])} or {choices[-1]}")

        require(self.loss_chunk_mib > 0, "parallel.loss_chunk_mib", self.loss_chunk_mib, "a positive number of MiB")
        has_ranks = self.tp != 1 or self.auto  # parallel.auto may choose another tp
        require(not self.sp or has_ranks, "parallel.sp", self.sp, "false with parallel.tp=1 (it splits over tp)")
