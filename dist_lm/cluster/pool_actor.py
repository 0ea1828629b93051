"""What runs in each actor of a pool: an engine, worked in slices.

A plain class; the pool makes a Ray actor of it. A call brings new requests and takes away what is done, so there is one
message for many tokens. It opens no port and dies with its node's Ray.
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch

from dist_lm.config.model import ModelConfig
from dist_lm.generation.engine import Engine, EngineOptions
from dist_lm.generation.request import Answer, Refusal, Request, RequestError
from dist_lm.storage.process import die_with_parent

LEAST_S, MOST_S = 0.2, 0.5  # of work in a call: until something is done, and in any case


@dataclass(frozen=True)
class EngineSpec:
    """The engine that every actor of a pool builds."""

    model: ModelConfig
    options: EngineOptions
    eot_id: int
    vocabulary: tuple[bytes, ...] | None = None  # bytes of every token, for texts
    dtype: torch.dtype = torch.float32
    device: str = "cpu"  # cpu | cuda
    tp: int = 1  # devices that share the model

    @property
    def gpus(self) -> int:
        """That an actor takes; 0: it computes on the CPU."""
        return self.tp if self.device == "cuda" else 0


@dataclass(frozen=True)
class WorkReport:
    """What came of a slice of work."""

    done: list[Answer | Refusal]
    tokens_in_flight: int


class PoolActor:
    """One engine."""

    def __init__(self, spec: EngineSpec, threads: int, devices: tuple[int, ...] = ()) -> None:
        """Weights come with `load`.

        Args:
            threads: that torch computes with, where the node's environment does not say it (OMP_NUM_THREADS).
            devices: GPUs of the node that are its own; none: those that Ray has given it.
        """
        die_with_parent()
        if devices:  # CUDA looks at it when it is first used
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        given = psutil.Process().environ().get("OMP_NUM_THREADS", "")  # as it began: Ray sets it to 1 later
        threads = int(given) if given.isdigit() and int(given) else threads
        torch.set_num_threads(max(1, threads // spec.tp))  # each process that shares the model takes as many
        self._spec = spec
        self._engine: Engine | None = None
        self._known: set[str] = set()  # requests under way

    def load(self, weights: Mapping[str, np.ndarray], version: int) -> int:
        """Go on with these weights; returns the id of this process.

        Args:
            weights: views of Ray's object store, which torch must not write to: copied.
        """
        spec = self._spec
        tensors = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
        if self._engine:
            self._engine.load_weights(tensors, version)
        else:
            self._engine = Engine(
                spec.model,
                tensors,
                eot_id=spec.eot_id,
                vocabulary=spec.vocabulary,
                options=spec.options,
                version=version,
                dtype=spec.dtype,
                device=torch.device(spec.device),
                tp=spec.tp,
            )
        return os.getpid()

    def work(self, requests: Sequence[Request]) -> WorkReport:
        """Take in requests and work for a moment. One that cannot be done comes back as a refusal."""
        engine = self._engine
        assert engine
        done: list[Answer | Refusal] = []
        for request in requests:
            try:
                engine.submit(request)
                self._known.add(request.id)
            except RequestError as error:
                done.append(Refusal(request.id, error.reason))
        started = time.monotonic()
        while engine.busy:
            done += engine.step()
            if time.monotonic() - started > (LEAST_S if done else MOST_S):
                break
        if not engine.busy:
            self._known.clear()
        return WorkReport(done, engine.tokens_in_flight)

    def drop_all(self) -> None:
        """Forget every request: nobody waits for it any more."""
        assert self._engine
        for request in self._known:
            self._engine.cancel(request)
        self._engine.run()
        self._known.clear()
