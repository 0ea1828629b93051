"""Eager tensor parallelism on two ranks: our training step against torch's `parallelize_module`.

Forward, backward and AdamW, in the same processes and rounds, on the same weights and tokens. Ceiling: the same step in
one process with as many threads, which sends nothing (on CUDA: on one GPU).

The peer is written as torch's documentation shows: `nn.Linear` layers, `parallelize_module` with column- and row-wise
plans that give local tensors to the attention, a vocabulary-parallel embedding and head, and `loss_parallel`, so that
it gathers no logits either. Rotation and attention kernels are those of our model. The input of an attention becomes a
DTensor once and not in query, key and value separately: their gradients are then reduced in one message, which made the
peer's step 15 to 25 % faster.

Dimensions: B sequences, T tokens, D d_model, H heads (of this rank), K d_head.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name the field uses
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from dist_lm.bench.case import Case, GroupSize, against, configurations, describe
from dist_lm.bench.models import peer_optimizer
from dist_lm.bench.rank import OwnTraining, Trial, made_up_batch, own_rows
from dist_lm.config.model import ModelConfig
from dist_lm.config.root import Config
from dist_lm.config.stage import StageConfig
from dist_lm.data.batch import Batch
from dist_lm.model.attention import CAUSAL, attend
from dist_lm.model.keyed_random import initial_value
from dist_lm.model.layers import FeedForward, RopeTables, build_norm, rope_tables, rotate
from dist_lm.model.size import parameter_shapes
from dist_lm.parallel.guarded_gloo import guarded
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model
from dist_lm.training.optimizer import is_decayed

TP = 2
OURS, TORCH, ONE = "ours", "torch parallelize_module", "one process"
SHORT = ("stage.global_batch=2", "stage.seq_len=64")
PLAIN = ("model.tie_embeddings=false", "model.qk_norm=false")  # the peer has neither option
WIDE = ("model=tiny", "model.d_model=512", "model.d_ff=2048", "model.n_heads=8", "model.vocab_size=4096")
SHAPES = (
    ("model=nano", *PLAIN, "model.n_heads=4", *SHORT),
    ("model=tiny", "model.vocab_size=4096", *SHORT),
    (*WIDE, *SHORT),
    (*WIDE, "stage.global_batch=4", "stage.seq_len=256"),
    ("model=nano", *PLAIN, "model.n_heads=25", "model.d_model=200", *SHORT),
)


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """Returns cases of SHAPES (`quick`: of the first), or the one of `overrides`.

    Raises:
        ConfigError, ArtefactError, UserError: as `compose_config`.
    """
    return [_case(config) for config in configurations(SHAPES, overrides, quick)]


def _case(config: Config) -> Case:
    """Returns the case of one configuration on two ranks; the peer is only named if it cannot shard the model."""
    reason = misfit(config.model, TP)
    pair, single = GroupSize(TP), GroupSize(1, threads=TP)
    variants = {OURS: pair, ONE: single}
    if not reason:
        variants[TORCH] = pair
    return Case(
        name=describe(config),
        config=config,
        variants=variants,
        comparisons=[against(OURS, TORCH, reason, ONE)],
        same_losses=frozenset(variants),
    )


def build(variant: str, config: Config, world: World) -> Trial:
    """Builds a rank's part of one variant.

    Raises:
        ConfigError: bf16 is asked for on a GPU without it.
        StrangerError: another user has connected to a port of this rank.
    """
    if variant == TORCH:
        with guarded():
            mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("tp",))
        batch = made_up_batch(config, slice(None), world.device)
        return Trial(PeerTraining(config, mesh, batch).bare_step)

    mesh = build_mesh(Layout(1, 1, world.size), world.device)
    model = build_model(config.model, config.parallel, mesh, world.device, config.seed)
    return Trial(OwnTraining(model, config, own_rows(config, mesh), world).bare_step)


# --- the peer ---


def misfit(model: ModelConfig, tp: int) -> str:
    """Returns the reason why torch cannot shard this model over `tp` ranks; empty if it can."""
    keys = ("n_heads", "n_kv_heads", "d_ff", "vocab_size")
    uneven = [f"{key}={size}" for key in keys if (size := getattr(model, key)) is not None and size % tp]
    if uneven:
        return f"{', '.join(uneven)}: not divisible by tp={tp}"

    options = {
        "tied embedding": model.tie_embeddings,
        "norm of queries and keys": model.qk_norm,
        "parallel residual": model.parallel_residual,
        "sliding window": model.window is not None,
        "layers without RoPE": bool(model.rope_free_layers),
        "norm after a branch": model.norm_place == "after",
        "scale of embedding, residual, attention or logits": any(
            getattr(model, key) != getattr(ModelConfig, key)
            for key in ("embedding_scale", "residual_scale", "attention_scale", "logit_divisor")
        ),
    }
    return next((f"the peer has no {name}" for name, is_on in options.items() if is_on), "")


class PeerAttention(nn.Module):
    """Attention with a `nn.Linear` for each projection; x_BTD and its result are (B, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.d_head = config.d_head
        width, key_width = config.n_heads * config.d_head, config.kv_heads * config.d_head
        self.query = nn.Linear(config.d_model, width, bias=config.has_qkv_bias)
        self.key = nn.Linear(config.d_model, key_width, bias=config.has_qkv_bias)
        self.value = nn.Linear(config.d_model, key_width, bias=config.has_qkv_bias)
        self.output = nn.Linear(width, config.d_model, bias=config.has_output_bias)

    def forward(self, x_BTD: torch.Tensor, rope: RopeTables) -> torch.Tensor:
        q_BTHK, k_BTHK, v_BTHK = (
            layer(x_BTD).unflatten(-1, (-1, self.d_head)) for layer in (self.query, self.key, self.value)
        )
        o_BTHK = attend(rotate(q_BTHK, rope), rotate(k_BTHK, rope), v_BTHK, CAUSAL)
        return self.output(o_BTHK.flatten(2))


class PeerBlock(nn.Module):
    """A pre-norm block, (B, T, D) to (B, T, D)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = build_norm(config)
        self.attention = PeerAttention(config)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: torch.Tensor, rope: RopeTables) -> torch.Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class PeerTransformer(nn.Module):
    """Returns logits (B, T, V), a DTensor sharded over V on the tp axis."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(PeerBlock(config) for _ in range(config.n_layers))
        self.final_norm = build_norm(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, batch: Batch) -> torch.Tensor:
        x_BTD = self.embedding(batch.tokens_BT)
        rope = rope_tables(batch.position_BT, self.config, x_BTD.dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, rope)
        return self.lm_head(self.final_norm(x_BTD))


@torch.no_grad()
def fill(peer: PeerTransformer, seed: int) -> None:
    """Gives an unsharded peer, in place, the initial values of our model with this seed."""
    for name, shape in parameter_shapes(peer.config).items():
        value = initial_value(name, shape, peer.config, seed)
        head, _, last = name.rpartition(".")
        if len(shape) == 3:
            # Our attention weights are (H, K, D); the output projection maps in the other direction.
            value = value.flatten(0, 1)
            if last == "output":
                value = value.t()
            name = f"{name}.weight"
        elif last.endswith("_bias"):
            name, value = f"{head}.{last.removesuffix('_bias')}.bias", value.flatten()
        peer.get_parameter(name).copy_(value)


def parallelise(peer: PeerTransformer, mesh: DeviceMesh) -> None:
    """Shards an unsharded peer over a one-dimensional mesh, in place (collective)."""
    widening = ("gate", "up") if peer.config.is_gated else ("up",)
    # x, and the rotation tables, which are plain tensors.
    replicated = (Replicate(), None)
    inner = {
        "attention": PrepareModuleInput(input_layouts=replicated, desired_input_layouts=replicated),
        **{f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")},
        "attention.output": RowwiseParallel(),
        **{f"feed_forward.{name}": ColwiseParallel() for name in widening},
        "feed_forward.down": RowwiseParallel(),
    }
    for block in peer.blocks:
        parallelize_module(block, mesh, inner)

    # The head keeps its logits sharded, as `loss_parallel` wants them: no logits are gathered.
    outer = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(peer, mesh, outer)


def parameter_groups(peer: nn.Module, stage: StageConfig) -> list[dict[str, Any]]:
    """Returns the parameters in groups, of which those of decayed parameters have stage.weight_decay."""
    # DTensors and plain tensors cannot share a group.
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in peer.named_parameters():
        weight_decay = stage.weight_decay * is_decayed(name)
        groups.setdefault((weight_decay, isinstance(parameter, DTensor)), []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for (decay, _), parameters in groups.items()]


class PeerTraining:
    """Runs the peer's training step on `batch`."""

    def __init__(self, config: Config, mesh: DeviceMesh, batch: Batch) -> None:
        self.model = PeerTransformer(config.model)
        fill(self.model, config.seed)
        self.model.to(batch.tokens_BT.device)
        parallelise(self.model, mesh)
        self.optimizer = peer_optimizer(parameter_groups(self.model, config.stage), config.stage)
        self.batch = batch

    def bare_step(self) -> float:
        """Runs forward, backward and AdamW, nothing else (collective); returns the mean loss, nats a token, the same on
        every rank."""
        # The logits are sharded over the vocabulary, and `loss_parallel` lets them stay so.
        targets_N = self.batch.targets_BT.flatten()
        with loss_parallel():
            total = F.cross_entropy(self.model(self.batch).flatten(0, 1).float(), targets_N, reduction="sum")
            total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        total = total.detach()
        if isinstance(total, DTensor):
            total = total.full_tensor()
        return float(total) / len(targets_N)
