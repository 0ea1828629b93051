"""State that the routes share: the models by their names, and counts of requests."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from dist_lm.chat.openai_errors import ProtocolError
from dist_lm.chat.openai_fields import Json, typed
from dist_lm.errors import require, shown_value
from dist_lm.generation.grammar import Grammars
from dist_lm.server.backend import Backend
from dist_lm.server.scoring import RewardModel
from dist_lm.server.served import Served, ServeLimits


@dataclass(frozen=True)
class ServedModel:
    """A model, and what computes its answers."""

    served: Served
    thread: Backend
    grammars: Grammars


@dataclass
class Serving:
    """All models of the server, and what is under way."""

    models: Sequence[ServedModel]  # those that answer with text
    most_requests: int  # requests that may be under way at a time
    stop_s: float = 10.0  # seconds for the engines to end
    limits: ServeLimits = field(default_factory=ServeLimits)
    rewards: Sequence[RewardModel] = ()
    open_requests: int = 0
    counts: dict[tuple[str, int], int] = field(default_factory=dict)  # responses by path and status
    # Constraints that take long delay other new ones, and nothing else.
    compiler: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "compiler"))

    def __post_init__(self) -> None:
        names = [name for served in self.all_served for name in served.names]
        repeated = sorted({name for name in names if names.count(name) > 1})
        require(not repeated, "--name", ", ".join(repeated), "another name for each model")

    @property
    def all_served(self) -> list[Served]:
        """Every model, in the order of /v1/models."""
        return [model.served for model in (*self.models, *self.rewards)]

    @property
    def threads(self) -> list[Backend]:
        """What computes the answers; models that share a base have one."""
        return [*dict.fromkeys(model.thread for model in self.models)]

    @property
    def failure(self) -> str:
        """Why an engine computes no more; empty while all do."""
        return next((model.thread.failure for model in self.models if model.thread.failure), "")

    def model_of(self, body: Mapping[str, Json]) -> ServedModel:
        """Returns the model that a request names; one that names none gets the only one.

        Raises:
            ProtocolError: there is none of this name, or the request must choose.
        """
        return _chosen(body, self.models)

    def reward_of(self, body: Mapping[str, Json]) -> RewardModel:
        """Returns the reward model that a request names; one that names none gets the only one.

        Raises:
            ProtocolError: there is none of this name, or the request must choose.
        """
        return _chosen(body, self.rewards)

    def served_named(self, name: str) -> Served:
        """Returns the model of a name.

        Raises:
            ProtocolError: there is none.
        """
        for served in self.all_served:
            if name in served.names:
                return served
        raise _unknown(name, self.all_served)

    def count(self, path: str, status: int) -> None:
        """Counts a response."""
        self.counts[path, status] = self.counts.get((path, status), 0) + 1


Chosen = TypeVar("Chosen", ServedModel, RewardModel)


def _chosen(body: Mapping[str, Json], models: Sequence[Chosen]) -> Chosen:
    """Returns the model that a request names; one that names none gets the only one.

    Raises:
        ProtocolError: there is none of this name, or the request must choose.
    """
    name = typed(body, "model", str, None)
    if name is None and len(models) > 1:
        names = ", ".join(model.served.name for model in models)
        raise ProtocolError(f"model: missing; expected one of {names}", param="model")
    for model in models:
        if name is None or name in model.served.names:
            return model
    raise _unknown(name, [model.served for model in models])


def _unknown(name: str | None, models: Sequence[Served]) -> ProtocolError:
    names = ", ".join(served.name for served in models) or "no model: the server has none of this kind"
    return ProtocolError(f"model={shown_value(name)}: expected {names}", 404, "model", "model_not_found")
