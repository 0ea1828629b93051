"""The conf groups `cluster`, `parallel`, `hardware`: where ranks run, how they share a model, what machines can do."""

import os
from dataclasses import dataclass

from omegaconf import MISSING

from dist_lm.errors import require

CPU_RANKS = 2  # they run every code path of several ranks; more would only divide the same cores


@dataclass
class ClusterConfig:
    """Place of the ranks, timeouts, restarts, and checks of nodes."""

    name: str = MISSING  # local (start Ray on this machine) | ray (join a running cluster)
    nodes: int = 1
    ranks_per_node: int = -1  # -1: one for each GPU; without GPUs 2, or 1 on a single core
    address: str | None = None  # host:port of a running Ray head, for name=ray
    token_path: str | None = None  # file with the Ray token (mode 0600), for name=ray; null: RAY_AUTH_TOKEN_PATH
    connect_timeout_s: float = 20.0
    start_timeout_s: float = 120.0  # from the request for nodes until all agents are ready
    stop_timeout_s: float = 120.0  # from the request to stop until the last rank has left, including a checkpoint
    min_nodes: int = -1  # a run that has lost nodes continues with at least this many; -1: cluster.nodes
    node_wait_s: float = 60.0  # wait for replacements of lost nodes before the run shrinks
    grow_after_s: float = 30.0  # a shrunk run takes in a node that has been available for this long
    max_restarts: int = 3  # in a row, after failures without a new checkpoint in between; 0: never restart
    hang_steps: float = 20.0  # ranks without heartbeat for this many median steps are hung: log stacks, restart
    hang_min_s: float = 120.0  # but at least this long
    hang_otherwise_s: float = 1800.0  # the same at the start, in the first step, in evaluations and saves
    # free disk space of a node for temporary files; the run directory needs a checkpoint more
    min_free_gib: float = 1.0
    max_clock_skew_s: float = 5.0  # between the clocks of a node and the launcher
    # seconds of matrix products on each GPU before a start, then an all-reduce; 0: only NVML is read
    gpu_check_s: float = 2.0
    link_check_mib: int = 4  # MiB sent between every two nodes before a start; 0: links are not measured
    min_link_ratio: float = 0.25  # a node with links slower than this share of the median is replaced if possible

    def __post_init__(self) -> None:
        require(self.name in ("local", "ray"), "cluster.name", self.name, "local or ray")
        is_reachable = self.name == "local" or bool(self.address)
        require(is_reachable, "cluster.address", self.address, "host:port of a running Ray head when cluster=ray")

        ranks, accepted = self.ranks_per_node, "a positive integer, or -1 for one for each GPU"
        require(self.nodes > 0, "cluster.nodes", self.nodes, "a positive integer")
        require(ranks == -1 or ranks > 0, "cluster.ranks_per_node", ranks, accepted)
        fewest, accepted = self.min_nodes, f"1 to cluster.nodes={self.nodes}, or -1 for cluster.nodes"
        require(fewest == -1 or 0 < fewest <= self.nodes, "cluster.min_nodes", fewest, accepted)

        # Without these waits nothing could start or stop; the others may be 0, which turns them off.
        for key in ("connect_timeout_s", "start_timeout_s", "stop_timeout_s", "max_clock_skew_s"):
            require(getattr(self, key) > 0, f"cluster.{key}", getattr(self, key), "a positive number")
        for key in ("hang_steps", "hang_min_s", "hang_otherwise_s"):
            require(getattr(self, key) > 0, f"cluster.{key}", getattr(self, key), "a positive number")
        for key in ("node_wait_s", "grow_after_s", "max_restarts", "min_free_gib"):
            require(getattr(self, key) >= 0, f"cluster.{key}", getattr(self, key), "0 or more")
        for key in ("gpu_check_s", "link_check_mib", "min_link_ratio"):
            require(getattr(self, key) >= 0, f"cluster.{key}", getattr(self, key), "0 or more")

    def ranks_of_node(self, gpus: int) -> int:
        """Returns `ranks_per_node`; if that is -1, one for each of `gpus`, or without GPUs 2 (1 on a single core)."""
        if self.ranks_per_node != -1:
            return self.ranks_per_node
        return gpus or min(CPU_RANKS, os.cpu_count() or 1)


@dataclass
class ParallelConfig:
    """How one model is spread over ranks. -1 means all remaining ranks."""

    dp_replicate: int = 1  # replicas (DDP, or the outer axis of HSDP)
    dp_shard: int = -1  # ranks that share one copy of parameters, gradients and optimizer state (FSDP)
    tp: int = 1  # ranks that share the attention heads, the feed-forward width and the vocabulary of one layer
    # ranks that share the tokens of each sequence (context parallelism): attention exchanges heads for tokens
    cp: int = 1
    sp: bool = False  # norms, dropout and residuals hold 1/tp of the tokens of a sequence (sequence parallelism)
    # free gathered parameters before the backward pass (false: gather and cast them once a step); null: on GPUs if they
    # do not fit hardware.memory_gib for a whole step, elsewhere if over 64 MiB
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

        require(self.cp > 0, "parallel.cp", self.cp, "a positive integer")
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


@dataclass
class HardwareConfig:
    """The hardware of a rank, for the dry run, parallel=auto and perf/mfu. The defaults are hardware=cpu."""

    name: str = "cpu"  # a file of conf/hardware; for GPUs a part of the driver's name of the card
    device: str = "cpu"  # cuda | cpu
    bf16_tflops: float = 0.2  # dense matrix products on one device
    fp32_tflops: float = 0.083
    attainable: float = 0.9  # share of these figures that large matrix products reach
    # the same of attention, whose products count in full although half is masked; null: as attainable
    attention_attainable: float | None = None
    memory_gib: float = 8.0  # memory of one device
    memory_gb_s: float = 12.0  # bandwidth of that memory, 1e9 bytes/s
    devices_per_node: int = 2
    intra_node_gb_s: float = 0.5  # bandwidth of a device inside its node, 1e9 bytes/s, one direction
    intra_node_us: float = 200.0  # latency of a message
    inter_node_gb_s: float = 0.5  # bandwidth of a device to other nodes
    inter_node_us: float = 300.0
    overlap: float = 0.0  # share of the data axes' messages that overlaps computation

    def __post_init__(self) -> None:
        require(self.device in ("cuda", "cpu"), "hardware.device", self.device, "cuda or cpu")
        require(self.devices_per_node > 0, "hardware.devices_per_node", self.devices_per_node, "a positive integer")

        for name in ("bf16_tflops", "fp32_tflops", "memory_gib", "memory_gb_s", "intra_node_gb_s", "inter_node_gb_s"):
            require(getattr(self, name) > 0, f"hardware.{name}", getattr(self, name), "a positive number")
        for name in ("intra_node_us", "inter_node_us"):
            require(getattr(self, name) >= 0, f"hardware.{name}", getattr(self, name), "microseconds, >= 0")

        require(0 < self.attainable <= 1, "hardware.attainable", self.attainable, "in (0, 1]")
        share = self.attention_attainable
        require(share is None or 0 < share <= 1, "hardware.attention_attainable", share, "null or in (0, 1]")
        require(0 <= self.overlap <= 1, "hardware.overlap", self.overlap, "in [0, 1]")
