"""Eager tensor parallelism on two ranks: a training step of ours against torch's `parallelize_module`.

Forward, backward and AdamW, in the same processes and rounds, on the same weights and tokens. Ceiling: the same step
in one process with as many threads, where nothing is sent (on CUDA: on one GPU).
"""

from collections.abc import Sequence

from torch.distributed.device_mesh import init_device_mesh

from dist_lm.bench import tensor_parallel_peer as peer
from dist_lm.bench.case import Case, Comparison, CrewSize, configurations, describe
from dist_lm.bench.trial import OwnTraining, Trial, made_up_batch, own_rows
from dist_lm.config.root import Config
from dist_lm.parallel.layout import Layout
from dist_lm.parallel.mesh import World, build_mesh
from dist_lm.parallel.sharding import build_model

TP = 2
OURS, TORCH, ONE = "ours", "torch", "one process"
SHORT = ("stage.global_batch=2", "stage.seq_len=64")
PLAIN = ("model.tie_embeddings=false", "model.qk_norm=false")  # as the peer has it
WIDE = ("model=tiny", "model.d_model=512", "model.d_ff=2048", "model.n_heads=8", "model.vocab_size=4096")
SHAPES = (
    ("model=nano", *PLAIN, "model.n_heads=4", *SHORT),
    ("model=tiny", "model.vocab_size=4096", *SHORT),
    (*WIDE, *SHORT),
    (*WIDE, "stage.global_batch=4", "stage.seq_len=256"),
    ("model=nano", *PLAIN, "model.n_heads=25", "model.d_model=200", *SHORT),
)


def cases(overrides: Sequence[str], quick: bool) -> list[Case]:
    """The shapes above, or the one that `overrides` give."""
    return [_case(config) for config in configurations(SHAPES, overrides, quick)]


def _case(config: Config) -> Case:
    reason = peer.misfit(config.model, TP)
    pair, single = CrewSize(TP), CrewSize(1, threads=TP)
    ways = {OURS: pair, TORCH: pair, ONE: single} if not reason else {OURS: pair, ONE: single}
    return Case(
        name=describe(config),
        config=config,
        ways=ways,
        comparisons=(
            Comparison(
                own=OURS,
                peer=None if reason else TORCH,
                peer_name=f"{peer.NAME}: {reason}" if reason else peer.NAME,
                ceiling=ONE,
            ),
        ),
        same_losses=frozenset(ways),
    )


def build(way: str, config: Config, world: World) -> Trial:
    """A rank's part of one way."""
    if way == TORCH:
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("tp",))
        batch = made_up_batch(config, slice(None), world.device)
        return Trial(peer.PeerTraining(config, mesh, batch).bare_step)
    mesh = build_mesh(Layout(1, 1, world.size), world.device)
    model = build_model(config.model, config.parallel, mesh, world.device, config.seed)
    return Trial(OwnTraining(model, config, own_rows(config, mesh), world).bare_step)
