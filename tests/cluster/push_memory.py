"""`python -m tests.cluster.push_memory WAY OVERRIDE...`: how far a push of weights raises a rank's private memory.

Prints one line of JSON: bytes of the rise, and of the largest parameter. Private memory is RssAnon of the kernel, which
excludes Ray's object store (shared memory).
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from dist_lm.cluster.pool_weights import store
from dist_lm.cluster.ray_cluster import connect
from dist_lm.config.cluster import ClusterConfig, ParallelConfig
from dist_lm.generation.engine import Engine
from dist_lm.generation.engine_options import EngineOptions
from dist_lm.model.keyed_random import initialise
from dist_lm.model.transformer import Transformer
from dist_lm.parallel.mesh import World
from dist_lm.prepare.compose import compose_config
from dist_lm.rlhf.models import sent_weights
from dist_lm.rlhf.rollouts import EngineRollouts

LOOK_S = 0.0005


def private_bytes() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) * 1024


def rise(push: Callable[[], object]) -> int:
    """The largest private memory during a push, above that before it."""
    before, done, seen = private_bytes(), threading.Event(), [0]

    def look() -> None:
        while not done.wait(LOOK_S):
            seen.append(private_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    push()
    done.set()
    thread.join()
    return max(seen) - before


def main() -> None:
    way, *overrides = sys.argv[1:]
    torch.set_num_threads(1)
    model = Transformer(compose_config(["stage=language", *overrides]).model)
    initialise(model, seed=0)
    world, parallel = World(0, 1, 0, torch.device("cpu")), ParallelConfig()

    def weights():
        return sent_weights(model, parallel, world)

    if way == "engine":
        options = EngineOptions(cache_tokens=model.config.max_seq_len)
        source = EngineRollouts(Engine(model.config, weights(), eot_id=0, options=options))
        found = [rise(lambda: source.load_weights(weights(), 1)) for _ in range(2)]
    else:
        with connect(ClusterConfig(name="local", connect_timeout_s=120.0)):
            held = [store(weights(), model.config, torch.float32)]
            found = [rise(lambda: held.append(store(weights(), model.config, torch.float32))) for _ in range(2)]
    print(json.dumps({"rise": max(found), "largest": max(p.nbytes for p in model.parameters())}))


if __name__ == "__main__":
    main()
