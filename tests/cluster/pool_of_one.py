"""A stand-in for the pool: one engine in this process, without Ray."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch

from dist_lm.cluster.pool_actor import EngineSpec
from dist_lm.cluster.ray_cluster import RayCluster
from dist_lm.generation.engine import Engine
from dist_lm.generation.request import Answer, Refusal, Request, RequestError
from dist_lm.launcher.process import Interrupt


class Alone:
    """A pool of one engine in this process, whose answers come in another order than they were asked for."""

    members = (None,)

    def __init__(self, spec: EngineSpec, weights: dict, keep_going: Callable[[], bool]) -> None:
        tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
        self._engine = Engine(spec.model, tensors, eot_id=spec.eot_id, vocabulary=spec.vocabulary, options=spec.options)
        self._keep_going = keep_going

    @classmethod
    def start(cls, cluster: RayCluster, spec: EngineSpec, weights: dict, *, actors, keep_going, warn) -> "Alone":
        return cls(spec, weights, keep_going)

    def __enter__(self) -> "Alone":
        return self

    def __exit__(self, *exception: object) -> None:
        return

    def generate(self, requests: Iterable[Request]) -> Iterator[Answer | Refusal]:
        waiting = iter(requests)
        while (some := list(itertools.islice(waiting, 30))) and self._keep_going():
            for request in some:
                try:
                    self._engine.submit(request)
                except RequestError as error:
                    yield Refusal(request.id, error.reason)
            yield from reversed(self._engine.run())


class Meanwhile(Interrupt):
    """No signal; changes something when it is first asked, which is after the first requests have been made."""

    def __init__(self, change: Callable[[], object]) -> None:
        super().__init__()
        self._changes = [change]

    @property
    def requested(self) -> bool:
        while self._changes:
            self._changes.pop()()
        return False
