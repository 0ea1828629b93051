"""Files of a checkpoint on more ranks than any test can start: they are counted from the plan, which needs no rank."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_lm.parallel.layout import resolve_layout
from dist_lm.parallel.mesh import build_mesh, leave_groups
from dist_lm.parallel.sharding import arrange_model
from dist_lm.prepare.compose import compose_config
from dist_lm.training.checkpoint import tensors_of
from dist_lm.training.checkpoint_plan import FILE_BYTES, plan_of
from dist_lm.training.optimizer import build_optimizer

pytestmark = pytest.mark.heavy

N_RANKS, PER_NODE = 512, 8


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=N_RANKS, store=FakeStore())
    yield
    leave_groups()


@pytest.mark.parametrize("overrides", [("model=large", "parallel.dp_shard=8"), ("model=llama_8b",)])
@pytest.mark.usefixtures("fake_ranks")
def test_512_ranks_write_a_file_a_node_or_a_gib(overrides: tuple[str, ...]):
    """Finds files that grow with ranks, an entry that is saved twice or never, and a tensor twice in one file."""
    config = compose_config(["stage=language", "hardware=h100", *overrides])
    mesh = build_mesh(resolve_layout(config.parallel, config.trained_shape, N_RANKS), torch.device("cpu"))
    model = arrange_model(config.trained_shape, config.parallel, mesh, torch.device("meta"), exchange=False)
    optimizer = build_optimizer(model, config.stage, config.stage.muon)
    tensors = tensors_of(model, optimizer, config.model)

    saved = Counter()
    n_files = 0
    for first in range(0, N_RANKS, PER_NODE):
        plan = plan_of(tensors, N_RANKS, range(first, first + PER_NODE))
        n_files += len(plan)
        for file in plan:
            assert file.parts
            assert len({part.name for part in file.parts}) == len(file.parts)
            saved.update({part.name: part.bytes for part in file.parts})

    assert saved == {name: tensor.numel() * tensor.itemsize for name, tensor in tensors.items()}
    assert n_files <= max(N_RANKS // PER_NODE, saved.total() // FILE_BYTES)
