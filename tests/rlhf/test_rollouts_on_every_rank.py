"""The first rank's rollouts on every rank, with and without memory that ranks share."""

from dataclasses import replace

import numpy as np
import psutil
import pytest

from dist_lm.parallel.mesh import World
from dist_lm.parallel.messages import all_gather
from dist_lm.parallel.node_memory import HAS_SHARED_MEMORY, NodeMemory
from dist_lm.rlhf.controller import on_every_rank
from dist_lm.rlhf.rollouts import ScoredRollouts
from dist_lm.rlhf.schedule import Drawn
from tests.rlhf.toy import rollouts_with

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not HAS_SHARED_MEMORY, reason="needs Linux"),
]

ROLLOUTS = rollouts_with([2, 3], [1, 4])
SCORES = [0.25, -1.0]


def received(world: World, denied: int) -> list:
    """Returns the tokens and scores that each rank has received, where rank `denied` may open no memory of others."""

    def refuses(place: object) -> NodeMemory:
        raise PermissionError(13, "Permission denied")

    n_before = psutil.Process().num_fds()
    drawn = Drawn(ScoredRollouts(ROLLOUTS, {"a": np.array(SCORES)}), 1.0, 0.5) if world.is_first else None
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == denied:
            patch.setattr(NodeMemory, "opened", refuses)
        scored = on_every_rank(drawn, replace(world, local_rank=world.rank)).scored

    pair = (scored.rollouts.tokens_N.tolist(), scored.scores["a"].tolist())
    del scored
    assert psutil.Process().num_fds() <= n_before
    return all_gather(pair, tuple[list[int], list[float]])


@pytest.mark.parametrize("denied", [-1, 2])
def test_every_rank_gets_the_rollouts_even_if_one_may_not_open_the_memory_of_another(ranks, denied):
    """Finds ranks that wait forever for one that `/proc` denies the memory of another, and memory that stays open."""
    assert ranks.run(4, received, denied) == [(ROLLOUTS.tokens_N.tolist(), SCORES)] * 4
