"""Memory of a rank in stage `rlhf`, by arithmetic: while it trains, and while the engine beside it generates.

Iterations are not played; an update is estimated as a step of sequences. Imports no torch.
"""

from dataclasses import dataclass, replace

from dist_lm.config.pool import CACHE_SHARE
from dist_lm.config.root import Config
from dist_lm.config.stage import TrainerGroup
from dist_lm.dry_run.estimate import FP32_BYTES, element_bytes, estimate_memory
from dist_lm.dry_run.work import share_of_device
from dist_lm.model.size import kv_bytes_per_token, parameter_count
from dist_lm.parallel.layout import Layout, keys_of, shards_key_heads
from dist_lm.stages.rlhf.config import PROCESS, RlhfRunConfig, rlhf_config
from dist_lm.tracking.readable import gib


@dataclass(frozen=True)
class RlhfMemory:
    """Bytes on the device of a rank and on that of an engine, which are one device if `beside`."""

    models: int  # parameters of all models
    gradients: int
    optimizer: int  # moments of all trained models
    activations: int
    engine: int  # weights of the engine
    cache: int  # KV cache of the engine while it generates
    cache_tokens: int  # tokens that the cache has room for
    beside: bool  # whether the engine is on the device of the rank
    in_turns: bool  # whether the cache is freed while the rank trains
    moves: bool  # whether weights of the engine and the optimizer wait on the host while the other works
    restart: int  # host memory of the first rank's node: weights for a restart of the controller's process

    @property
    def training(self) -> int:
        """Returns the peak bytes of the device while the rank trains."""
        total = self.models + self.gradients + self.optimizer + self.activations
        if self.beside and not self.moves:
            total += self.engine
        if self.beside and not self.in_turns:
            total += self.cache
        return total

    @property
    def generating(self) -> int:
        """Returns the peak bytes of the device while the engine generates."""
        total = self.engine + self.cache
        if self.beside:
            total += self.models
        if self.beside and not self.moves:
            total += self.optimizer
        return total

    @property
    def waiting(self) -> int:
        """Returns the bytes of host memory, for each rank and its engine, of what waits there."""
        return self.engine + self.optimizer if self.moves else 0


def rlhf_memory(config: RlhfRunConfig, layout: Layout) -> RlhfMemory:
    """Returns the memory of the fullest rank of `layout`, and of an engine, on `config.hardware`.

    The KV cache has rlhf.pool.cache_tokens; with 0, what fits into a share of the memory that is free beside the
    models, at most what all sequences can use.
    """
    model = config.model
    pool = config.pool
    step = estimate_memory(update_of(config), layout)

    # Policy and critic have fp32 masters. The reference (with adapters their base, which is there) and the reward model
    # are frozen, so they are stored in the compute dtype.
    size = element_bytes(config)
    of_frozen_model = step.parameters * size // FP32_BYTES
    if config.trained_shape.is_in_4bit:
        of_frozen_model = size * parameter_count(model)  # no adapters, no four bits
    frozen_models = (config.trained_shape.lora is None) + config.rlhf.asks_reward_model
    models = config.trained_models * step.parameters + frozen_models * of_frozen_model
    optimizer = config.trained_models * step.optimizer

    engine = size * parameter_count(model) // pool.tp
    # Ranks of an engine that do not share out the key heads may need all of them.
    keys = model.kv_heads
    if shards_key_heads(model, pool.tp):
        keys = keys_of(model, pool.tp, 0)[0].held
    token_bytes = kv_bytes_per_token(model, keys, size)

    # The cache gets a share of the memory that is free, at most what all sequences can use.
    moves = config.in_turns and config.hardware.device == "cuda"
    occupied = engine
    if config.engine_shares_device:
        occupied += models + optimizer * (not moves)
    free = max(0, int(config.hardware.memory_gib * 2**30) - occupied)
    fit = int(CACHE_SHARE[config.hardware.device] * free / token_bytes)
    tokens = pool.cache_tokens or min(fit, pool.max_sequences * model.max_seq_len)

    # The weights that draw what is still to come, and new ones on their way (`rlhf/controller_process.py`).
    copies = config.rlhf.drawing_staleness + 2 if config.rlhf.controller == PROCESS else 0

    return RlhfMemory(
        models=models,
        gradients=step.gradients,
        optimizer=optimizer,
        activations=step.activations,
        engine=engine,
        cache=tokens * token_bytes,
        cache_tokens=tokens,
        beside=config.engine_shares_device,
        in_turns=config.in_turns,
        moves=moves,
        restart=copies * size * parameter_count(model),
    )


def memory_rows(config: Config, layout: Layout) -> list[tuple[str, str]]:
    """Returns (name, text) of each part of the memory, for people."""
    memory = rlhf_memory(rlhf_config(config), layout)
    place = "" if memory.beside else " (another device)"

    # What gives its memory back while the other one works.
    freed = ", freed while the rank trains" if memory.in_turns else ""
    weights_wait, optimizer_waits = "", ""
    if memory.moves:
        weights_wait, optimizer_waits = (
            ", on the host while the rank trains",
            ", on the host while the engine generates",
        )

    rows = [
        ("models", gib(memory.models)),
        ("gradients", gib(memory.gradients)),
        ("optimizer", gib(memory.optimizer) + optimizer_waits),
        ("activations, buffers", gib(memory.activations)),
        (f"engine{place}: weights", gib(memory.engine) + weights_wait),
        ("engine: KV cache", f"{gib(memory.cache)} ({memory.cache_tokens:,} tokens{freed})"),
        ("peak of the rank that trains", share_of_device(memory.training, config.hardware)),
        ("peak of the device that generates", share_of_device(memory.generating, config.hardware)),
    ]
    if memory.waiting:
        rows.append(("host memory of a rank and its engine", f"{gib(memory.waiting)}, locked"))
    if memory.restart:
        rows.append(("host memory of rank 0: weights for the controller", f"{gib(memory.restart)} at most"))
    return rows


def update_of(config: RlhfRunConfig) -> RlhfRunConfig:
    """Returns a copy of `config` with a stage that describes one update as a step of sequences: a minibatch of
    rollouts, as long as a micro-batch and the model allow."""
    rlhf = config.rlhf
    length = min(config.model.max_seq_len, rlhf.micro_batch_tokens)
    rollouts = max(1, rlhf.rollouts_per_iteration // rlhf.minibatches)
    sequences = max(1, rlhf.micro_batch_tokens // length)

    stage = TrainerGroup(
        name=config.stage.name,
        init_from=config.stage.init_from,
        lora=config.stage.lora,
        seq_len=length,
        micro_batch=sequences,
        global_batch=rollouts,
    )
    return replace(config, stage=stage)
